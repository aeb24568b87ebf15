"""A bounded thread pool that yields results in completion order."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

from distill.errors import RunError

I = TypeVar("I")  # noqa: E741
T = TypeVar("T")


def as_completed(
    work: Callable[[I, threading.Event], T],
    items: Iterable[I],
    max_workers: int,
    has_capacity: Callable[[], bool] = lambda: True,
) -> Iterator[tuple[I, T]]:
    """Yield each item with the result of `work(item, stop)`, in completion order.

    An item is taken from `items` only when it can start: while fewer than `max_workers` items are running or not yet
    yielded, and `has_capacity()` is true. After a RunError of `work`, or any error of `items`, no new item starts;
    running items finish and are yielded before the error is raised. If the consumer stops early, running items finish
    as well.

    Args:
        work: called on a worker thread. Its second argument is set when no new items start, so that `work` can cut
            waits short.
        max_workers: number of threads.
        has_capacity: whether the consumer accepts another item.
    """
    stop = threading.Event()
    remaining = iter(items)
    finished: SimpleQueue[tuple[I, Future[T]]] = SimpleQueue()
    running = 0
    failure: Exception | None = None
    pool = ThreadPoolExecutor(max_workers)

    def start_items() -> None:
        nonlocal running, failure
        try:
            while failure is None and running < max_workers and has_capacity():
                item = next(remaining)
                running += 1
                pool.submit(copy_context().run, work, item, stop).add_done_callback(partial(_report, finished, item))
        except StopIteration:
            return
        except Exception as error:  # noqa: BLE001 - raised once no item is running
            failure = error
            stop.set()

    try:
        start_items()
        while running:
            item, future = finished.get()
            running -= 1
            try:
                result = future.result()
            except RunError as error:
                failure = failure or error
                stop.set()
                continue
            start_items()
            yield item, result
            start_items()  # the consumer may have freed capacity
        if failure is not None:
            raise failure
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)  # wait, so that running items can store answers that were already paid for


def _report(finished: "SimpleQueue[tuple[I, Future[T]]]", item: I, future: "Future[T]") -> None:
    finished.put((item, future))
