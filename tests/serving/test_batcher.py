"""Dynamic batching: collection, priorities, deadlines and failures."""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from distill.serving.batcher import Batcher, DeadlineExceeded, wait_for_result


class Worker:
    """Work that waits for an event and records its batches."""

    def __init__(self) -> None:
        self.proceed = threading.Event()
        self.begun = threading.Semaphore(0)
        self.batches: list[tuple[Any, list[Any]]] = []

    def work(self, kind: Any, items: list[Any]) -> list[Any]:
        self.batches.append((kind, items))
        self.begun.release()
        assert self.proceed.wait(10)
        if "bad" in items:
            raise ValueError("bad item")
        return [f"{kind} {item}" for item in items]


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.proceed.set()


def keep_busy(worker: Worker, batcher: Batcher) -> "Future[Any]":
    """Keep the only thread busy, so that further items are queued."""
    future = batcher.submit("busy", 0)
    worker.begun.acquire()
    return future


def test_queued_items_are_batched_up_to_the_size(worker: Worker) -> None:
    sizes: list[tuple[Any, int]] = []
    batcher = Batcher(worker.work, 3, 0.0, observe=lambda kind, size: sizes.append((kind, size)))
    keep_busy(worker, batcher)
    futures = [batcher.submit("label", n) for n in range(7)]
    worker.proceed.set()
    assert [future.result(10) for future in futures] == [f"label {n}" for n in range(7)]
    assert sizes == [("busy", 1), ("label", 3), ("label", 3), ("label", 1)]
    batcher.close()


def test_a_batch_waits_for_more_items_until_the_time_limit(worker: Worker) -> None:
    worker.proceed.set()
    batcher = Batcher(worker.work, 2, 0.2)
    begin = time.monotonic()
    both = [batcher.submit("label", n) for n in range(2)]
    assert [future.result(10) for future in both] == ["label 0", "label 1"]
    alone = batcher.submit("label", 2)
    alone.result(10)
    assert time.monotonic() - begin >= 0.2
    assert [items for _, items in worker.batches] == [[0, 1], [2]]
    batcher.close()


def test_kinds_are_not_mixed_and_the_lowest_priority_value_is_first(worker: Worker) -> None:
    batcher = Batcher(worker.work, 8, 0.0)
    keep_busy(worker, batcher)
    futures = [
        batcher.submit(kind, n, priority) for n, (kind, priority) in enumerate([("reason", 2), ("label", 0)] * 2)
    ]
    worker.proceed.set()
    for future in futures:
        future.result(10)
    assert worker.batches[1:] == [("label", [1, 3]), ("reason", [0, 2])]
    batcher.close()


def test_items_past_their_deadline_are_never_processed(worker: Worker) -> None:
    batcher = Batcher(worker.work, 8, 0.0)
    busy = keep_busy(worker, batcher)

    async def wait() -> list[DeadlineExceeded]:
        found = []
        for future in (busy, batcher.submit("label", 1)):
            with pytest.raises(DeadlineExceeded) as caught:
                await wait_for_result(future, time.monotonic() + 0.05)
            found.append(caught.value)
        return found

    begun, waiting = asyncio.run(wait())
    assert (begun.begun, waiting.begun) == (True, False)
    worker.proceed.set()
    batcher.close()
    assert worker.batches == [("busy", [0])]


def test_only_the_failing_item_of_a_batch_gets_the_error(worker: Worker) -> None:
    batcher = Batcher(worker.work, 8, 0.0)
    keep_busy(worker, batcher)
    good, bad, other = (batcher.submit("label", item) for item in ("a", "bad", "b"))
    worker.proceed.set()
    assert (good.result(10), other.result(10)) == ("label a", "label b")
    with pytest.raises(ValueError, match="bad item"):
        bad.result(10)
    assert batcher.submit("label", "c").result(10) == "label c"
    batcher.close()


def test_threads_process_batches_concurrently(worker: Worker) -> None:
    batcher = Batcher(worker.work, 1, 0.0, threads=3)
    futures = [batcher.submit("ask", n) for n in range(4)]
    for _ in range(3):
        assert worker.begun.acquire(timeout=10)
    assert len(worker.batches) == 3
    worker.proceed.set()
    assert [future.result(10) for future in futures] == [f"ask {n}" for n in range(4)]
    batcher.close()


def test_close_processes_the_queue_and_ends_the_threads(worker: Worker) -> None:
    before = threading.active_count()
    batcher = Batcher(worker.work, 1, 5.0, threads=2)
    futures = [batcher.submit("label", n) for n in range(4)]
    worker.proceed.set()
    batcher.close()
    assert [future.result(0) for future in futures] == [f"label {n}" for n in range(4)]
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit("label", 5)


def test_close_returns_after_its_timeout(worker: Worker) -> None:
    batcher = Batcher(worker.work, 1, 0.0)
    keep_busy(worker, batcher)
    begin = time.monotonic()
    batcher.close(0.1)
    assert time.monotonic() - begin < 5
