"""Check of thresholds and deferral curve on logged answers of two language models.

    python benchmarks/deferral.py [FOLDER] [--json FILE]        # ../shared/data/cascade_logs, runs/deferral.json

The student is llama3.1-8b, the teacher llama3.1-70b. The data are four-choice questions: thresholds are fitted on 285
and evaluated on 1531. Uncertainty is 1 - exp(conf), where conf is the log-probability of the student's answer. Takes a
few seconds.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.cascade.thresholds import (
    Threshold,
    smallest_risk,
    threshold_for_budget,
    threshold_for_quality,
    threshold_for_risk,
)
from distill.evaluation.selective import bootstrap_interval, deferral_curve, gain_over_random, oracle_scores

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data" / "cascade_logs"
STUDENT, TEACHER = "llama3.1-8b", "llama3.1-70b"
BUDGETS = (0.1, 0.2, 0.3, 0.5)
RISKS = (0.2, 0.25, 0.3, 0.1)  # 285 rows do not support the last one
QUALITIES = (0.65, 0.7, 0.72, 0.75)
CONFIDENCE = 0.9
SPLITS = 200
FRACTIONS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Logs:
    """Columns [n] over n questions: uncertainty of the student, correctness (0 or 1) and answer cost of both models."""

    uncertainty: np.ndarray
    student: np.ndarray
    teacher: np.ndarray
    student_cost: np.ndarray
    teacher_cost: np.ndarray

    def select(self, indices: np.ndarray) -> "Logs":
        return Logs(*(column[indices] for column in vars(self).values()))

    def concatenate(self, other: "Logs") -> "Logs":
        return Logs(*(np.append(*columns) for columns in zip(vars(self).values(), vars(other).values(), strict=True)))


def read_logs(path: Path) -> Logs:
    """Read one file of logs."""
    lines = path.read_text(encoding="utf-8").splitlines()
    answers = [[json.loads(line)["models"][name] for name in (STUDENT, TEACHER)] for line in lines]
    return Logs(
        np.array([1 - np.exp(student["conf"]) for student, _ in answers]),
        *(np.array([row[model][field] for row in answers]) for field in ("correct", "cost") for model in (0, 1)),
    )


def fit_budget(logs: Logs, budget: float) -> Threshold:
    """The threshold for a budget. There is no review stage, so a deferred question is one teacher call."""
    return threshold_for_budget(logs.uncertainty, np.ones(len(logs.uncertainty)), budget)


def random_splits(train: Logs, test: Logs, count: int = SPLITS, seed: int = 0) -> list[tuple[Logs, Logs]]:
    """Random splits of both files together; the first part of a split has as many rows as `train`."""
    both, size, random = train.concatenate(test), len(train.uncertainty), np.random.default_rng(seed)
    orders = [random.permutation(len(both.uncertainty)) for _ in range(count)]
    return [(both.select(order[:size]), both.select(order[size:])) for order in orders]


def evaluate_budgets(train: Logs, test: Logs, resampled: list[tuple[Logs, Logs]]) -> list[dict[str, Any]]:
    """For each budget: the predicted interval of the deferral rate, the rate on `test`, and results over the splits.

    `inside` is the fraction of splits whose deferral rate lies in the predicted interval. The interval is one for the
    expected rate. A rate over 1531 rows has sampling noise of its own, so a correct 95% interval contains it in about
    93% of the splits.
    """
    rows = []
    for budget in BUDGETS:
        threshold = fit_budget(train, budget)
        fitted = [(fit_budget(part, budget), rest) for part, rest in resampled]
        rates = np.array([(rest.uncertainty > each.tau).mean() for each, rest in fitted])
        realised = float((test.uncertainty > threshold.tau).mean())
        lows, highs = (np.array([getattr(each, end) for each, _ in fitted]) for end in ("calls_low", "calls_high"))
        rows.append(
            {
                "budget": budget,
                "tau": threshold.tau,
                "interval": [threshold.calls_low, threshold.calls_high],
                "realised": realised,
                "realised_inside": bool(threshold.calls_low <= realised <= threshold.calls_high),
                "mean_realised": float(rates.mean()),
                "inside": float(((lows <= rates) & (rates <= highs)).mean()),
            }
        )
    return rows


def evaluate_risks(train: Logs, test: Logs, resampled: list[tuple[Logs, Logs]]) -> list[dict[str, Any]]:
    """For each risk target: the error rate on `test`, or why it is refused, and results over the splits.

    `kept` is the fraction, among splits with a threshold, in which the error rate on the second part is within the
    target. It is None if no split supports the target.
    """
    rows = []
    for target in RISKS:
        results = [evaluate_risk(part, rest, target) for part, rest in resampled]
        supported = [result for result in results if "error" not in result]
        rows.append(
            {
                "risk": target,
                "confidence": CONFIDENCE,
                "test": evaluate_risk(train, test, target),
                "refused": 1 - len(supported) / len(results),
                "kept": float(np.mean([result["realised"] <= target for result in supported])) if supported else None,
                "mean_realised": float(np.mean([result["realised"] for result in supported])) if supported else None,
                "mean_coverage": float(np.mean([result["coverage"] for result in supported])) if supported else None,
            }
        )
    return rows


def evaluate_risk(part: Logs, rest: Logs, target: float) -> dict[str, Any]:
    """Fit a threshold for a risk target on one part; error rate and coverage of the student on the other part."""
    try:
        threshold = threshold_for_risk(part.uncertainty, 1 - part.student, target, CONFIDENCE)
    except ValueError as error:
        return {"error": str(error)}
    kept = rest.uncertainty <= threshold.tau
    return {"tau": threshold.tau, "realised": float(1 - rest.student[kept].mean()), "coverage": float(kept.mean())}


def evaluate_qualities(train: Logs, test: Logs, resampled: list[tuple[Logs, Logs]]) -> list[dict[str, Any]]:
    """For each accuracy of the cascade: what is reached on `test`, or why it is refused, and results over the splits.

    `missed` is the fraction of all splits that give a threshold which misses the target on the second part. The
    guarantee is one for the expected accuracy; one over 1531 rows has sampling noise of its own.
    """
    rows = []
    for target in QUALITIES:
        results = [evaluate_quality(part, rest, target) for part, rest in resampled]
        supported = [result for result in results if "error" not in result]
        missed = [result for result in supported if result["realised"] < target]
        rows.append(
            {
                "quality": target,
                "confidence": CONFIDENCE,
                "test": evaluate_quality(train, test, target),
                "refused": 1 - len(supported) / len(results),
                "missed": len(missed) / len(results),
                "mean_calls": float(np.mean([result["calls"] for result in supported])) if supported else None,
            }
        )
    return rows


def evaluate_quality(part: Logs, rest: Logs, target: float) -> dict[str, Any]:
    """Fit a threshold for an accuracy on one part; accuracy and teacher calls of the cascade on the other part."""
    once = np.ones(len(part.student))
    try:
        threshold = threshold_for_quality(part.uncertainty, part.student, part.teacher, once, target, CONFIDENCE)
    except ValueError as error:
        return {"error": str(error)}
    deferred = rest.uncertainty > threshold.tau
    right = np.where(deferred, rest.teacher, rest.student)
    return {"tau": threshold.tau, "realised": float(right.mean()), "calls": float(deferred.mean())}


def deferral_metrics(test: Logs) -> dict[str, Any]:
    """The deferral curve on `test`, with its bootstrap interval, compared with random deferral and the oracle.

    Margins are accuracy minus that of random deferral: the smallest over the 99 whole percentages, and the smallest
    over all numbers of deferred questions. `below_random` lists the numbers of deferred questions with a negative
    margin.
    """
    n = len(test.uncertainty)

    def curve(score: np.ndarray, student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
        return deferral_curve(score, student, teacher, fractions=FRACTIONS)

    def margin(score: np.ndarray, student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
        return curve(score, student, teacher) - curve(np.zeros(len(score)), student, teacher)

    columns = test.uncertainty, test.student, test.teacher
    whole = deferral_curve(*columns) - deferral_curve(np.zeros(n), *columns[1:])
    margins, (lows, highs) = margin(*columns), bootstrap_interval(margin, *columns)
    low, high = bootstrap_interval(curve, *columns)
    area_low, area_high = bootstrap_interval(lambda *drawn: gain_over_random(curve(*drawn)), *columns)
    costs = test.student_cost, test.student_cost + test.teacher_cost
    least = 1 + int(margins[1:-1].argmin())
    return {
        "fraction": FRACTIONS.tolist(),
        "quality": curve(*columns).tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "oracle": curve(oracle_scores(*columns[1:]), *columns[1:]).tolist(),
        "random": curve(np.zeros(n), *columns[1:]).tolist(),
        "cost_ratio": (curve(test.uncertainty, *costs) / test.teacher_cost.mean()).tolist(),
        "smallest_margin": {"fraction": float(FRACTIONS[least]), "margin": float(margins[least])},
        "smallest_margin_of_all": {"deferred": 1 + int(whole[1:-1].argmin()), "margin": float(whole[1:-1].min())},
        "below_random": (1 + np.flatnonzero(whole[1:-1] < -1e-12)).tolist(),
        "intervals_above": int((lows[1:-1] > 0).sum()),
        "intervals_below": int((highs[1:-1] < 0).sum()),
        "gain_over_random": {
            "area": gain_over_random(curve(*columns)),
            "low": float(area_low),
            "high": float(area_high),
        },
    }


def measure(folder: Path = FOLDER) -> dict[str, Any]:
    """All results.

    Raises:
        OSError: the logs are missing.
    """
    train, test = (read_logs(folder / f"mmlu_llama_{split}.jsonl") for split in ("train", "test"))
    resampled = random_splits(train, test)
    return {
        "n": [len(train.uncertainty), len(test.uncertainty)],
        "budgets": evaluate_budgets(train, test, resampled),
        "smallest_risk": smallest_risk(train.uncertainty, 1 - train.student, CONFIDENCE),
        "risks": evaluate_risks(train, test, resampled),
        "qualities": evaluate_qualities(train, test, resampled),
        "deferral": deferral_metrics(test),
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown tables, rates in percent."""
    lines = [
        f"Budgets: fitted on {results['n'][0]}, evaluated on {results['n'][1]}, and on {SPLITS} random splits.\n",
        "| budget | predicted 95% interval | deferral rate | inside | mean over splits | splits inside |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["budgets"]:
        low, high = row["interval"]
        lines.append(
            f"| {row['budget']:.0%} | {low:.1%} to {high:.1%} | {row['realised']:.1%} | "
            f"{'yes' if row['realised_inside'] else 'no'} | {row['mean_realised']:.2%} | {row['inside']:.1%} |"
        )
    lines += [
        f"\nRisk targets at a confidence of {CONFIDENCE:.0%}; smallest supported target: "
        f"{results['smallest_risk']:.1%}.\n",
        "| risk | error rate on test | coverage on test | splits refused | splits within target | mean coverage |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["risks"]:
        test = row["test"]
        evaluated = "refused | -" if "error" in test else f"{test['realised']:.1%} | {test['coverage']:.1%}"
        splits = "- | -" if row["kept"] is None else f"{row['kept']:.1%} | {row['mean_coverage']:.1%}"
        lines.append(f"| {row['risk']:.0%} | {evaluated} | {row['refused']:.1%} | {splits} |")
    lines += [
        f"\nAccuracy of the cascade at a confidence of {CONFIDENCE:.0%}.\n",
        "| target | accuracy on test | calls on test | splits refused | splits that miss it | mean calls |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["qualities"]:
        test = row["test"]
        evaluated = "refused | -" if "error" in test else f"{test['realised']:.1%} | {test['calls']:.1%}"
        calls = "-" if row["mean_calls"] is None else f"{row['mean_calls']:.1%}"
        lines.append(f"| {row['quality']:.0%} | {evaluated} | {row['refused']:.1%} | {row['missed']:.1%} | {calls} |")
    curve = results["deferral"]
    lines += [
        "\nDeferral on test: accuracy by fraction of deferred questions.\n",
        "| deferred | accuracy | 95% interval | random | oracle | cost relative to the teacher alone |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for percent in (0, 1, 5, 10, 20, 30, 50, 70, 90, 100):
        accuracy, low, high, line, oracle, cost = (
            curve[name][percent] for name in ("quality", "low", "high", "random", "oracle", "cost_ratio")
        )
        lines.append(
            f"| {percent}% | {accuracy:.1%} | {low:.1%} to {high:.1%} | {line:.1%} | {oracle:.1%} | {cost:.2f} |"
        )
    area, least, least_of_all = (curve[k] for k in ("gain_over_random", "smallest_margin", "smallest_margin_of_all"))
    below = curve["below_random"]
    lines += [
        f"\nArea over random deferral: {100 * area['area']:.2f} points (95% interval {100 * area['low']:.2f} to "
        f"{100 * area['high']:.2f}).",
        f"Smallest margin at whole percentages: {100 * least['margin']:+.3f} points at {least['fraction']:.0%}; "
        f"the 95% interval is above 0 at {curve['intervals_above']} of 99, below at {curve['intervals_below']}.",
        f"Over all numbers of deferred questions: {100 * least_of_all['margin']:+.3f} points at "
        f"{least_of_all['deferred']}; below random at {len(below)} of {results['n'][1] - 1}"
        + (f", the last of them {below[-1]}." if below else "."),
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Thresholds and deferral curve on logged answers, as Markdown tables.")
    parser.add_argument(
        "folder", nargs="?", type=Path, default=FOLDER, help="folder of the logs (default: %(default)s)"
    )
    parser.add_argument(
        "--json", type=Path, default=Path("runs/deferral.json"), help="file for all results (default: %(default)s)"
    )
    arguments = parser.parse_args()
    try:
        results = measure(arguments.folder)
    except FileNotFoundError as error:
        print(f"{error.filename} is missing; pass the folder of the logs as argument", file=sys.stderr)
        return 2
    print(table(results))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
