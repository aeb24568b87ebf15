"""Stage `cascade`: the keys of its files, and metrics that follow from the decisions."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from distill.recipe import Recipe
from distill.stages.cascade import read_metrics

KEYS = {
    "accuracy", "weighted_f1", "macro_f1", "stage_fractions", "teacher_calls_per_sample", "cost_ratio",
    "student_accuracy", "teacher_accuracy", "review_flips",
}  # fmt: skip


@pytest.fixture(scope="module")
def metrics(folder: Path) -> dict:
    return json.loads((folder / "cascade" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def decisions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "cascade" / "decisions.jsonl").read_text().splitlines()]


def test_the_metrics_are_complete_and_follow_from_the_decisions(metrics: dict, decisions: list[dict]) -> None:
    assert set(metrics) >= KEYS and metrics["n"] == len(decisions) == 9
    right = sum(row["label"] == row["gold"] for row in decisions)
    assert metrics["accuracy"] == pytest.approx(right / 9)
    for stage, share in metrics["stage_fractions"].items():
        assert share == pytest.approx(sum(row["stage"] == stage for row in decisions) / 9)
    assert metrics["teacher_calls_per_sample"] == pytest.approx(sum(row["teacher_calls"] for row in decisions) / 9)


def test_the_metrics_of_single_models_equal_those_of_evaluate(folder: Path, metrics: dict) -> None:
    roles = json.loads((folder / "evaluate" / "metrics.json").read_text())
    assert metrics["student_accuracy"] == pytest.approx(roles["student"]["accuracy"])
    assert metrics["teacher_accuracy"] == pytest.approx(roles["teacher"]["accuracy"])
    assert metrics["selective"]["student"]["before"]["ece"] == pytest.approx(roles["student"]["ece"], abs=1e-6)


def test_a_decision_has_its_stage_reason_and_predictions(decisions: list[dict], folder: Path) -> None:
    calibration = json.loads((folder / "calibrate" / "calibration.json").read_text())
    for row in decisions:
        certain = row["student"]["uncertainty"] <= min(calibration["student_threshold"], 1 - 1e-12)
        assert (row["stage"] == "student") == certain and row["reason"]
        assert (row["teacher"] is None) == certain
        assert sum(row["probabilities"]) == pytest.approx(1)
        assert row["cost"]["calls"] == 1 + row["teacher_calls"]


def test_a_teacher_that_did_not_learn_to_review_is_not_asked_to(
    finished: Recipe, folder: Path, metrics: dict, decisions: list[dict]
) -> None:
    assert finished.teacher is not None and "review" not in finished.teacher.tasks
    assert metrics["reviews"] is False and metrics["stage_fractions"]["teacher_review"] == 0
    assert json.loads((folder / "calibrate" / "calibration.json").read_text())["reviews"] is False
    assert all(row["review"] is None and row["teacher_calls"] <= 1 and not row["degraded"] for row in decisions)
    lines = (folder / "evaluate" / "ledger.jsonl").read_text().splitlines()
    assert "review" not in {json.loads(line)["template"] for line in lines}


def test_the_deferral_curve_is_a_table(folder: Path, metrics: dict) -> None:
    with (folder / "cascade" / "deferral_curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["policy"] for row in rows} == {"entropy", "max_probability", "margin", "error", "random", "oracle"}
    first = next(row for row in rows if row["policy"] == "entropy")
    assert float(first["deferred"]) == 0 and float(first["quality"]) == pytest.approx(metrics["student_accuracy"])
    assert all(float(row["low"]) <= float(row["high"]) for row in rows)


def test_the_curves_are_in_files_of_their_own(folder: Path, metrics: dict) -> None:
    assert "risk_coverage" not in json.dumps(metrics)
    with (folder / "cascade" / "risk_coverage.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["coverage"] for row in rows[:9]] == [str(count / 9) for count in range(1, 10)]
    known = [(role, when) for role, model in metrics["selective"].items() for when in model]
    assert len(rows) == 9 * len(known) == 36
    whole = read_metrics(folder)
    for role, when in known:
        risk = [float(row["risk"]) for row in rows if (row["role"], row["calibration"]) == (role, when)]
        assert whole["selective"][role][when]["risk_coverage"]["risk"] == risk
        assert sum(risk) / 9 == pytest.approx(metrics["selective"][role][when]["aurc"])


def test_the_file_of_an_earlier_version_is_read(folder: Path, tmp_path: Path) -> None:
    """Its curves are in `metrics.json`."""
    whole = read_metrics(folder)
    (tmp_path / "cascade").mkdir()
    earlier = {name: value for name, value in whole.items() if name != "deferral"}
    (tmp_path / "cascade" / "metrics.json").write_text(json.dumps(earlier))
    shutil.copy(folder / "cascade" / "deferral_curve.csv", tmp_path / "cascade")
    assert read_metrics(tmp_path) == whole
