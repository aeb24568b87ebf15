"""Dynamic batching: items of concurrent requests are collected into batches and processed on worker threads."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Job:
    kind: Any
    item: Any
    priority: int
    submitted: float = field(default_factory=time.monotonic)
    future: "Future[Any]" = field(default_factory=Future)
    context: Context = field(default_factory=copy_context)  # of the request


class Batcher:
    """Worker threads that collect items of one kind, at most `size` of them for at most `wait_s`, and process them.

    Items with the lowest priority value are processed first, then the oldest. An item whose future is cancelled before
    its batch starts is dropped, so that abandoned items do not accumulate. If a batch fails, its items are processed
    again one by one, and only those that fail again get the error.

    Args:
        work: maps a kind and its items to as many results. It runs in the context of the first item (`contextvars`).
        threads: number of batches processed concurrently.
        observe: called with the kind and the size of each batch.
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

    def submit(self, kind: Any, item: Any, priority: int = 0) -> "Future[Any]":
        """Queue an item and return the future of its result. Raises RuntimeError after `close`."""
        job = _Job(kind, item, priority)
        with self._changed:
            if self._closing:
                raise RuntimeError("the batcher is closed")
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def close(self, timeout_s: float | None = None) -> None:
        """Process what is queued and end the threads; threads still busy after `timeout_s` are abandoned."""
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
                self._process(jobs)

    def _take(self) -> list[_Job]:
        """Wait for the next batch and remove it from the queue; returns an empty list once closed."""
        with self._changed:
            while True:
                batch = self._next_batch()
                if not batch and self._closing:
                    return []
                left = batch[0].submitted + self._wait_s - time.monotonic() if batch else None
                if left is not None and (left <= 0 or len(batch) == self._size or self._closing):
                    self._waiting = [job for job in self._waiting if job not in batch]
                    return batch
                self._changed.wait(left)

    def _next_batch(self) -> list[_Job]:
        self._waiting = [job for job in self._waiting if not job.future.cancelled()]
        first = min(self._waiting, key=lambda job: job.priority, default=None)
        return [job for job in self._waiting if first is not None and job.kind == first.kind][: self._size]

    def _process(self, jobs: list[_Job]) -> None:
        try:
            results = jobs[0].context.run(self._work, jobs[0].kind, [job.item for job in jobs])
        except Exception as error:  # noqa: BLE001 - raised by the future, in the thread that waits for it
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
                return
            log.warning("a batch of %d failed; its items are processed one by one: %s", len(jobs), error)
            for job in jobs:
                self._process([job])
            return
        for job, result in zip(jobs, results, strict=True):
            job.future.set_result(result)


class DeadlineExceeded(TimeoutError):
    """There is no result by the deadline. `begun` is true if processing had started."""

    def __init__(self, begun: bool) -> None:
        super().__init__("no result in time")
        self.begun = begun


async def wait_for_result(future: "Future[Any]", deadline: float) -> Any:
    """Wait for a future until a deadline on the clock of `time.monotonic`, then cancel it.

    Raises:
        DeadlineExceeded: there is no result by the deadline.
    """
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), max(deadline - time.monotonic(), 0))
    except TimeoutError:
        if future.done() and not future.cancelled():  # completed at the last moment
            return future.result()
        raise DeadlineExceeded(begun=not future.cancel()) from None
