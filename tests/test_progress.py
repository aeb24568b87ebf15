"""The lines at the start and at the end of each stage."""

import logging
from typing import Any

import pytest

from distill import progress
from distill.progress import Progress, duration

STAGES = ("annotate", "assistant", "student")
DONE = {
    name: {"status": "done", "seconds": seconds} for name, seconds in zip(STAGES, (30.0, 600.0, 3000.0), strict=True)
}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the clock shows one after the other."""
    times: list[float] = []
    monkeypatch.setattr(progress.time, "monotonic", lambda: times.pop(0))
    return times


@pytest.fixture(autouse=True)
def shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "distill.progress")


def fields(record: Any) -> dict[str, Any]:
    return dict(record.fields)


def test_a_stage_is_numbered_and_the_time_left_is_that_of_the_last_run(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    clock += [0, 10, 50, 60]
    shown = Progress(STAGES, ("assistant", "student"), DONE)
    shown.begin("assistant")
    shown.end("assistant")
    shown.begin("student")
    assert caplog.messages == [
        "stage 2 of 3: assistant, 10 s, about 1 h 0 min left",
        "stage 2 of 3: assistant done, 50 s, about 50 min left",
        "stage 3 of 3: student, 1 min 0 s, about 50 min left",
    ]
    assert fields(caplog.records[0]) == {
        "stage": "assistant",
        "number": 2,
        "of": 3,
        "elapsed_s": 10,
        "remaining_s": 3600,
    }


@pytest.mark.parametrize(
    "earlier", [{}, {"annotate": DONE["annotate"]}, DONE | {"student": {"status": "failed", "seconds": 9.0}}]
)
def test_unknown_times_are_not_guessed(
    earlier: dict[str, Any], clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    clock += [0, 10]
    Progress(STAGES, STAGES, earlier).begin("annotate")
    assert caplog.messages == ["stage 1 of 3: annotate, 10 s"]
    assert fields(caplog.records[0])["remaining_s"] is None


def test_after_the_last_stage_no_time_is_left(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    clock += [0, 7]
    Progress(STAGES, STAGES, DONE).end("student")
    assert caplog.messages == ["stage 3 of 3: student done, 7 s"]


@pytest.mark.parametrize(
    ("seconds", "exact", "rounded"),
    [
        (0, "0 s", "0 s"),
        (59.4, "59 s", "59 s"),
        (59.6, "1 min", "1 min"),
        (130, "2 min 10 s", "2 min"),
        (3599.7, "1 h 0 min", "1 h 0 min"),
        (11_100, "3 h 5 min", "3 h 5 min"),
    ],
)
def test_durations(seconds: float, exact: str, rounded: str) -> None:
    assert (duration(seconds), duration(seconds, exact=False)) == (exact, rounded)
