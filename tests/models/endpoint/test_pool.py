"""The thread pool: bounded, without barriers, and running items always finish."""

import threading
from collections.abc import Iterator

import pytest

from distill.errors import RunError, SettingsError
from distill.models.endpoint.pool import as_completed


def endless_items(taken: list[int]) -> Iterator[int]:
    while True:
        taken.append(len(taken))
        yield taken[-1]


def test_a_slow_item_delays_no_other() -> None:
    release = threading.Event()

    def work(item: int, stop: threading.Event) -> int:
        if item == 0:
            release.wait(10)
        return item * item

    found = as_completed(work, range(50), 4)
    first = [next(found) for _ in range(49)]
    assert sorted(first) == [(item, item * item) for item in range(1, 50)]
    release.set()
    assert list(found) == [(0, 0)]


def test_items_are_taken_only_when_they_can_start() -> None:
    taken: list[int] = []
    found = as_completed(lambda item, stop: item, endless_items(taken), 3)
    for yielded in range(1, 20):
        next(found)
        assert len(taken) <= yielded + 3
    found.close()  # type: ignore[attr-defined]


def test_items_start_only_while_the_consumer_has_capacity() -> None:
    taken: list[int] = []
    held: list[int] = []
    results = as_completed(
        lambda item, stop: item, endless_items(taken), 8, has_capacity=lambda: len(taken) - len(held) < 2
    )
    for item, _ in results:
        assert len(taken) - len(held) <= 2
        held.append(item)
        if len(held) == 20:
            break
    assert sorted(held) == list(range(20))


def test_after_a_failure_running_items_finish_and_are_yielded() -> None:
    started: list[int] = []
    all_started = threading.Barrier(4)

    def work(item: int, stop: threading.Event) -> int:
        started.append(item)
        if item < 4:
            all_started.wait(10)
        if item == 2:
            raise RunError("gone")
        assert stop.wait(10), "the other items are notified"
        return item

    found = []
    with pytest.raises(RunError, match="gone"):
        for item, _ in as_completed(work, range(100), 4):
            found.append(item)
    assert sorted(found) == [0, 1, 3] and sorted(started) == [0, 1, 2, 3]


def test_a_consumer_that_stops_early_waits_for_running_items() -> None:
    written: list[int] = []
    second = threading.Event()

    def work(item: int, stop: threading.Event) -> None:
        if item == 1:
            second.set()
            assert stop.wait(10)
        written.append(item)

    found = as_completed(work, range(9), 2)
    next(found)
    assert second.wait(10)
    found.close()  # type: ignore[attr-defined]
    assert 1 in written, "a paid answer is stored while its ledger is open"


def test_after_an_error_of_the_items_running_items_are_yielded() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise SettingsError("row 4 is bad")

    found = []
    with pytest.raises(SettingsError, match="row 4"):
        for item, _ in as_completed(lambda item, stop: item, items(), 8):
            found.append(item)
    assert sorted(found) == [0, 1, 2]
