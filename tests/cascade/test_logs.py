"""Guarantees of the thresholds, and the deferral curve, on the predictions of two real language models."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.deferral import (
    CONFIDENCE,
    FOLDER,
    deferral_metrics,
    evaluate_budgets,
    evaluate_qualities,
    evaluate_risk,
    evaluate_risks,
    random_splits,
    read_logs,
)

SPLITS = ("train", "test")
missing = pytest.mark.skipif(
    not all((FOLDER / f"mmlu_llama_{split}.jsonl").is_file() for split in SPLITS),
    reason=f"the logs of two language models are not in {FOLDER}",
)


@pytest.fixture(scope="module")
def logs() -> tuple:
    train, test = (read_logs(FOLDER / f"mmlu_llama_{split}.jsonl") for split in SPLITS)
    return train, test, random_splits(train, test)


@missing
def test_the_logs_have_the_expected_sizes(logs: tuple) -> None:
    train, test, resampled = logs
    assert (len(train.uncertainty), len(test.uncertainty), len(resampled)) == (285, 1531, 200)
    assert {(len(part.uncertainty), len(rest.uncertainty)) for part, rest in resampled} == {(285, 1531)}
    assert train.student.mean() < train.teacher.mean()


@missing
def test_realised_calls_lie_within_the_interval_of_budgets_fitted_on_285_rows(logs: tuple) -> None:
    found = evaluate_budgets(*logs)
    assert [row["budget"] for row in found] == [0.1, 0.2, 0.3, 0.5]
    for row in found:
        low, high = row["interval"]
        assert low <= row["realised"] <= high and row["realised_inside"]
        assert low < row["budget"] < high < low + 0.13  # a very wide interval would contain everything
        assert abs(row["mean_realised"] - row["budget"]) < 0.005
        assert row["inside"] > 0.88  # 93% if the interval is right; 200 splits leave 2 points of noise


@missing
def test_risk_targets_are_kept_with_the_given_confidence_or_refused(logs: tuple) -> None:
    found = {row["risk"]: row for row in evaluate_risks(*logs)}
    for target in (0.2, 0.25, 0.3):
        assert found[target]["test"]["realised"] <= target
        assert found[target]["kept"] >= CONFIDENCE
        assert found[target]["mean_coverage"] > 0.2
        assert found[target]["refused"] < 0.05
    refusal = found[0.1]["test"]["error"]
    assert refusal.startswith("285 validation samples cannot support a risk of 0.1 at a confidence of 0.9")
    smallest = float(refusal.rsplit(maxsplit=1)[-1])
    train, test, _ = logs
    assert evaluate_risk(train, test, smallest)["realised"] <= smallest


@missing
def test_a_quality_is_missed_no_more_often_than_stated_and_saves_calls(logs: tuple) -> None:
    for row in evaluate_qualities(*logs):
        assert row["missed"] <= 1 - CONFIDENCE + 0.04  # 200 splits leave 2 points of noise, and each test split as much
        assert row["mean_calls"] < 0.6
        assert row["test"]["realised"] >= row["quality"]


@missing
def test_the_deferral_curve_lies_above_random_deferral(logs: tuple) -> None:
    """Checked at every whole percent. Below one percent, about a dozen samples, the difference is within noise."""
    found = deferral_metrics(logs[1])
    curve, line, oracle = (np.array(found[name]) for name in ("quality", "random", "oracle"))
    assert len(curve) == 101
    assert (curve[1:-1] > line[1:-1]).all() and found["smallest_margin"]["margin"] > 0
    assert (curve <= oracle + 1e-12).all()
    assert max(found["below_random"], default=0) < 0.01 * 1531
    assert found["intervals_above"] >= 95 and found["intervals_below"] == 0
    assert found["gain_over_random"]["low"] > 0.02
    assert (np.diff(found["cost_ratio"]) > 0).all()


@missing
def test_the_benchmark_prints_its_tables_and_writes_all_figures(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "deferral.py"
    command = [sys.executable, str(script), str(FOLDER), "--json", str(tmp_path / "figures.json")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["n"] == [285, 1531]
    assert all(f"| {row['budget']:.0%} | {row['interval'][0]:.1%} to" in printed for row in figures["budgets"])
    assert "refused" in printed and "Smallest margin" in printed


def test_the_benchmark_says_which_file_is_missing(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "deferral.py"
    outcome = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False)
    assert outcome.returncode == 2
    assert outcome.stderr.startswith(f"{tmp_path / 'mmlu_llama_train.jsonl'} is missing")
