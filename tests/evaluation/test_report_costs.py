"""Costs of roles, cascade and stages: measured figures, and None or a dash for what is unknown."""

import pytest

from distill.evaluation.report_costs import amount, cascade_cost, costs_per_post, duration, memory, stage_rows
from tests.report_pages import cascade, metrics


def test_the_cost_of_a_post_is_that_of_all_stages() -> None:
    assert cascade_cost(cascade(), "seconds") == pytest.approx(4.1 / 10)
    assert cascade_cost(cascade(), "currency") is None
    assert cascade_cost(cascade(currency=0.5), "currency") == pytest.approx(2.0 / 10)
    unknown = cascade(currency=0.5)
    unknown["stages"]["teacher_review"]["cost"]["currency"] = None
    assert cascade_cost(unknown, "currency") is None


def test_the_teachers_cost_is_that_of_all_posts_if_it_is_known() -> None:
    roles = {"teacher": metrics(0.9), "student": metrics(0.8), "assistant": metrics(0.8)}
    costs = costs_per_post(roles, cascade(currency=2.0))
    assert list(costs) == ["teacher", "assistant", "student", "cascade"]
    assert costs["teacher"] == {"seconds": pytest.approx(1.0), "currency": pytest.approx(2.0)}
    assert costs["assistant"] == {"seconds": None, "currency": None}
    assert costs["student"] == {"seconds": pytest.approx(0.01), "currency": None}
    deferred_alone = costs_per_post(roles, cascade(currency=3.0, deferral=[]))
    assert deferred_alone["teacher"] == {"seconds": pytest.approx(1.0), "currency": pytest.approx(3.0)}


def test_a_sum_with_an_unknown_part_is_unknown() -> None:
    stages = {"student": {"seconds": 3.0, "peak_memory_mb": {"host": 700}}, "export": {}}
    assert [list(row.values()) for row in stage_rows(stages)] == [
        ["student", "3.0 s", "700 MiB", "–"], ["export", "–", "–", "–"], ["total", "–", "700 MiB", "–"],
    ]  # fmt: skip
    assert stage_rows({}) == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (0.0, "0.0 s"), (59.9, "59.9 s"), (146.3, "2 min 26 s"), (3900.0, "1 h 05 min")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_amounts_have_no_exponent() -> None:
    assert [amount(value) for value in (None, 0.0, 0.00291234, 12.345, 0.00002)] == [
        "–",
        "0",
        "0.00291",
        "12.3",
        "0.00002",
    ]
    assert [memory(value) for value in (None, 762, 20_480)] == ["–", "762 MiB", "20.0 GiB"]
