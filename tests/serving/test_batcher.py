"""Batches across threads: what is collected, what goes first, what is given up, and what fails."""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from distill.serving.batcher import Batcher, DeadlineExceeded, result


class Desk:
    """Work that waits at a gate and remembers its batches."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)
        self.batches: list[tuple[Any, list[Any]]] = []

    def work(self, kind: Any, items: list[Any]) -> list[Any]:
        self.batches.append((kind, items))
        self.begun.release()
        assert self.gate.wait(10)
        if "poison" in items:
            raise ValueError("poisoned")
        return [f"{kind} {item}" for item in items]


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.gate.set()


def occupied(desk: Desk, batcher: Batcher) -> "Future[Any]":
    """Keep the one thread busy, so that what comes next must wait."""
    future = batcher.submit("busy", 0)
    desk.begun.acquire()
    return future


def test_what_waits_goes_together_up_to_the_size(desk: Desk) -> None:
    sizes: list[tuple[Any, int]] = []
    batcher = Batcher(desk.work, 3, 0.0, observe=lambda kind, size: sizes.append((kind, size)))
    occupied(desk, batcher)
    futures = [batcher.submit("label", n) for n in range(7)]
    desk.gate.set()
    assert [future.result(10) for future in futures] == [f"label {n}" for n in range(7)]
    assert sizes == [("busy", 1), ("label", 3), ("label", 3), ("label", 1)]
    batcher.close()


def test_a_batch_waits_for_others_but_not_longer_than_told(desk: Desk) -> None:
    desk.gate.set()
    batcher = Batcher(desk.work, 2, 0.2)
    begin = time.monotonic()
    pair = [batcher.submit("label", n) for n in range(2)]
    assert [future.result(10) for future in pair] == ["label 0", "label 1"]
    alone = batcher.submit("label", 2)
    alone.result(10)
    assert time.monotonic() - begin >= 0.2
    assert [items for _, items in desk.batches] == [[0, 1], [2]]
    batcher.close()


def test_kinds_are_not_mixed_and_the_lowest_rank_goes_first(desk: Desk) -> None:
    batcher = Batcher(desk.work, 8, 0.0)
    occupied(desk, batcher)
    futures = [batcher.submit(kind, n, rank) for n, (kind, rank) in enumerate([("why", 2), ("label", 0)] * 2)]
    desk.gate.set()
    for future in futures:
        future.result(10)
    assert desk.batches[1:] == [("label", [1, 3]), ("why", [0, 2])]
    batcher.close()


def test_what_nobody_waits_for_any_more_is_never_worked_on(desk: Desk) -> None:
    batcher = Batcher(desk.work, 8, 0.0)
    busy = occupied(desk, batcher)

    async def give_up() -> list[DeadlineExceeded]:
        found = []
        for future in (busy, batcher.submit("label", 1)):
            with pytest.raises(DeadlineExceeded) as caught:
                await result(future, time.monotonic() + 0.05)
            found.append(caught.value)
        return found

    begun, waiting = asyncio.run(give_up())
    assert (begun.begun, waiting.begun) == (True, False)
    desk.gate.set()
    batcher.close()
    assert desk.batches == [("busy", [0])]


def test_an_item_that_breaks_its_batch_fails_alone(desk: Desk) -> None:
    batcher = Batcher(desk.work, 8, 0.0)
    occupied(desk, batcher)
    good, bad, other = (batcher.submit("label", item) for item in ("a", "poison", "b"))
    desk.gate.set()
    assert (good.result(10), other.result(10)) == ("label a", "label b")
    with pytest.raises(ValueError, match="poisoned"):
        bad.result(10)
    assert batcher.submit("label", "c").result(10) == "label c"
    batcher.close()


def test_several_threads_work_at_once(desk: Desk) -> None:
    batcher = Batcher(desk.work, 1, 0.0, threads=3)
    futures = [batcher.submit("ask", n) for n in range(4)]
    for _ in range(3):
        assert desk.begun.acquire(timeout=10)
    assert len(desk.batches) == 3
    desk.gate.set()
    assert [future.result(10) for future in futures] == [f"ask {n}" for n in range(4)]
    batcher.close()


def test_closing_finishes_what_waits_and_ends_the_threads(desk: Desk) -> None:
    before = threading.active_count()
    batcher = Batcher(desk.work, 1, 5.0, threads=2)
    futures = [batcher.submit("label", n) for n in range(4)]
    desk.gate.set()
    batcher.close()
    assert [future.result(0) for future in futures] == [f"label {n}" for n in range(4)]
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit("label", 5)


def test_closing_does_not_wait_for_ever(desk: Desk) -> None:
    batcher = Batcher(desk.work, 1, 0.0)
    occupied(desk, batcher)
    begin = time.monotonic()
    batcher.close(0.1)
    assert time.monotonic() - begin < 5
