"""The table of a recipe over seeds."""

from benchmarks.seeds import Run, table


def run(mae: float, calls: float | None) -> Run:
    """A run of a teacher and a student on a scale; without calls it has no cascade."""
    roles = {"teacher": {"mae": mae, "correlation": None}, "student": {"mae": 2 * mae, "acc2_without_zero": 0.75}}
    chain = {"stages": {"teacher": {"seconds": 90, "peak_memory_mb": {"host": 1500}}, "export": {"seconds": 30}}}
    if calls is None:
        return Run(roles, {}, chain)
    asked = {"asked": 4, "cost": {"seconds": 2.0}}
    stages = {"student": asked, "teacher_first": {"asked": 0, "cost": {"seconds": 0.0}}}
    return Run(roles, {"mae": 1.0, "teacher_calls_per_sample": calls, "stages": stages}, chain)


def test_a_table_has_the_metrics_of_the_runs_and_dashes_for_what_is_not_known() -> None:
    assert table({1: run(0.5, 0.25), 7: run(0.7, None)}).splitlines() == [
        "| | seed 1 | seed 7 | mean |",
        "| --- | --- | --- | --- |",
        "| teacher: MAE | 0.500 | 0.700 | 0.600 |",
        "| student: MAE | 1.000 | 1.400 | 1.200 |",
        "| cascade: MAE | 1.000 | – | – |",
        "| student: Acc-2 without 0, % | 75.0 | 75.0 | 75.0 |",
        "| teacher calls per post | 0.250 | – | – |",
        "| seconds per post, student | 0.5000 | – | – |",
        "| minutes, whole chain | 2.0 | 2.0 | 2.0 |",
        "| peak memory, GB | 1.5 | 1.5 | 1.5 |",
    ]
