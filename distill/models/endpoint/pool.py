"""Work on threads: so much at once, and the next begun as soon as one is done."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

from distill.errors import RunError

I = TypeVar("I")  # noqa: E741
T = TypeVar("T")


def as_completed(
    work: Callable[[I, threading.Event], T],
    items: Iterable[I],
    at_once: int,
    room: Callable[[], bool] = lambda: True,
) -> Iterator[tuple[I, T]]:
    """Items with the results of `work(item, stop)`, in the order of their completion.

    An item is taken only when it can be begun: while fewer than `at_once` are under way or not handed over, and while
    the consumer has `room`. After a RunError, or an error of `items`, nothing more is begun, but what is under way is
    finished and handed over before the error is raised. For a consumer that stops early it is finished, too.

    Args:
        stop: set when nothing more is to be begun, so that work may cut its waits short.
    """
    stop = threading.Event()
    waiting = iter(items)
    done: SimpleQueue[tuple[I, Future[T]]] = SimpleQueue()
    running = 0
    failure: Exception | None = None
    pool = ThreadPoolExecutor(at_once)

    def begin() -> None:
        nonlocal running, failure
        try:
            while failure is None and running < at_once and room():
                item = next(waiting)
                running += 1
                pool.submit(work, item, stop).add_done_callback(partial(_report, done, item))
        except StopIteration:
            return
        except Exception as error:  # noqa: BLE001 - raised again when nothing is under way
            failure = error
            stop.set()

    try:
        begin()
        while running:
            item, future = done.get()
            running -= 1
            try:
                result = future.result()
            except RunError as error:
                failure = failure or error
                stop.set()
                continue
            begin()
            yield item, result
            begin()  # the consumer may have made room
        if failure is not None:
            raise failure
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)  # what is under way may write down what it was paid for


def _report(done: "SimpleQueue[tuple[I, Future[T]]]", item: I, future: "Future[T]") -> None:
    done.put((item, future))
