"""Questions of many requests answered in batches, on threads of their own."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Job:
    kind: Any
    item: Any
    rank: int
    since: float = field(default_factory=time.monotonic)
    future: "Future[Any]" = field(default_factory=Future)


class Batcher:
    """Threads that collect items of one kind, up to `size` of them for up to `wait_s`, and work on them together.

    Of what waits, the lowest rank goes first, then the oldest. An item whose future is cancelled before its batch
    begins is never worked on, so that what nobody waits for any more does not pile up. An item on which the work fails
    fails alone: the others of its batch are done again one by one.

    Args:
        work: takes a kind and its items and returns as many results.
        threads: how many batches are worked on at once.
        observe: told the kind and the size of each batch.
    """

    def __init__(
        self,
        work: Callable[[Any, list[Any]], Sequence[Any]],
        size: int,
        wait_s: float,
        *,
        threads: int = 1,
        name: str = "batcher",
        observe: Callable[[Any, int], None] = lambda kind, size: None,
    ) -> None:
        self._work, self._size, self._wait_s, self._observe = work, size, wait_s, observe
        self._waiting: list[_Job] = []
        self._changed = threading.Condition()
        self._closing = False
        self._threads = [threading.Thread(target=self._run, name=f"{name}-{n}", daemon=True) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, kind: Any, item: Any, rank: int = 0) -> "Future[Any]":
        """The future result of one item. Raises RuntimeError after `close`."""
        job = _Job(kind, item, rank)
        with self._changed:
            if self._closing:
                raise RuntimeError("the batcher is closed")
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def close(self, timeout_s: float | None = None) -> None:
        """Finish what is waiting and end the threads; those still at work after `timeout_s` are left behind."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        end = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(None if end is None else max(end - time.monotonic(), 0))

    def _run(self) -> None:
        while batch := self._take():
            jobs = [job for job in batch if job.future.set_running_or_notify_cancel()]
            if jobs:
                self._observe(jobs[0].kind, len(jobs))
                self._do(jobs)

    def _take(self) -> list[_Job]:
        """The next batch, waited for; an empty one when closed."""
        with self._changed:
            while True:
                batch = self._next()
                if not batch and self._closing:
                    return []
                left = batch[0].since + self._wait_s - time.monotonic() if batch else None
                if left is not None and (left <= 0 or len(batch) == self._size or self._closing):
                    self._waiting = [job for job in self._waiting if job not in batch]
                    return batch
                self._changed.wait(left)

    def _next(self) -> list[_Job]:
        self._waiting = [job for job in self._waiting if not job.future.cancelled()]
        first = min(self._waiting, key=lambda job: job.rank, default=None)
        return [job for job in self._waiting if first is not None and job.kind == first.kind][: self._size]

    def _do(self, jobs: list[_Job]) -> None:
        try:
            results = self._work(jobs[0].kind, [job.item for job in jobs])
        except Exception as error:  # noqa: BLE001 - it belongs to whoever waits for the item
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
                return
            log.warning("a batch of %d failed and is done again one by one: %s", len(jobs), error)
            for job in jobs:
                self._do([job])
            return
        for job, result in zip(jobs, results, strict=True):
            job.future.set_result(result)


class DeadlineExceeded(TimeoutError):
    """No result in time. `begun` says whether anybody had begun to work on it."""

    def __init__(self, begun: bool) -> None:
        super().__init__("no result in time")
        self.begun = begun


async def result(future: "Future[Any]", by: float) -> Any:
    """What a future gives until `by` (of `time.monotonic`); after that it is given up.

    Raises:
        DeadlineExceeded: there is no result by then.
    """
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), max(by - time.monotonic(), 0))
    except TimeoutError:
        if future.done() and not future.cancelled():  # just now
            return future.result()
        raise DeadlineExceeded(begun=not future.cancel()) from None
