"""Thresholds and the deferral curve on the answers of two real language models: do the promises hold?

    python benchmarks/deferral.py [FOLDER] [--json FILE]        # ../shared/data/cascade_logs, runs/deferral.json

The student is llama3.1-8b, the teacher llama3.1-70b, on four-choice questions: 285 to fit thresholds on, 1531 to judge
them. Uncertainty is 1 - exp(conf), conf being the log-probability of the student's answer. Takes a few seconds.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.cascade.thresholds import Threshold, by_budget, by_risk, smallest_risk
from distill.evaluation.selective import bootstrap_interval, deferral_curve, gain_over_random, oracle_scores

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data" / "cascade_logs"
STUDENT, TEACHER = "llama3.1-8b", "llama3.1-70b"
BUDGETS = (0.1, 0.2, 0.3, 0.5)
RISKS = (0.2, 0.25, 0.3, 0.1)  # 285 rows do not support the last one
CONFIDENCE = 0.9
SPLITS = 200
FRACTIONS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Logs:
    """n questions: the student's uncertainty, whether each model is right (0 or 1), and what each answer cost."""

    uncertainty: np.ndarray
    student: np.ndarray
    teacher: np.ndarray
    student_cost: np.ndarray
    teacher_cost: np.ndarray

    def rows(self, chosen: np.ndarray) -> "Logs":
        return Logs(*(column[chosen] for column in vars(self).values()))

    def together(self, other: "Logs") -> "Logs":
        return Logs(*(np.append(*pair) for pair in zip(vars(self).values(), vars(other).values(), strict=True)))


def read(path: Path) -> Logs:
    """One file of the logs."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [[json.loads(line)["models"][name] for name in (STUDENT, TEACHER)] for line in lines]
    return Logs(
        np.array([1 - np.exp(student["conf"]) for student, _ in pairs]),
        *(np.array([pair[role][field] for pair in pairs]) for field in ("correct", "cost") for role in (0, 1)),
    )


def fit(logs: Logs, budget: float) -> Threshold:
    """The threshold of a budget; there is no review here, so the teacher is asked once."""
    return by_budget(logs.uncertainty, np.ones(len(logs.uncertainty)), budget)


def splits(train: Logs, test: Logs, count: int = SPLITS, seed: int = 0) -> list[tuple[Logs, Logs]]:
    """Both files together, parted anew at random: as many rows as `train` has to fit on, the rest to judge."""
    both, size, random = train.together(test), len(train.uncertainty), np.random.default_rng(seed)
    orders = [random.permutation(len(both.uncertainty)) for _ in range(count)]
    return [(both.rows(order[:size]), both.rows(order[size:])) for order in orders]


def budgets(train: Logs, test: Logs, resampled: list[tuple[Logs, Logs]]) -> list[dict[str, Any]]:
    """For each budget: the threshold's promise, what it comes to on `test`, and over the resampled splits.

    `inside` counts splits whose realised rate lies in the interval stated. That interval is for the long run; a rate
    among 1531 rows has its own noise, so that a right interval of 95% is met in about 93% of the splits.
    """
    found = []
    for budget in BUDGETS:
        threshold = fit(train, budget)
        fitted = [(fit(part, budget), rest) for part, rest in resampled]
        rates = np.array([(rest.uncertainty > each.tau).mean() for each, rest in fitted])
        realised = float((test.uncertainty > threshold.tau).mean())
        lows, highs = (np.array([getattr(each, end) for each, _ in fitted]) for end in ("calls_low", "calls_high"))
        found.append(
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
    return found


def risks(train: Logs, test: Logs, resampled: list[tuple[Logs, Logs]]) -> list[dict[str, Any]]:
    """For each risk target: what it comes to on `test`, or why it is refused; and over the resampled splits.

    `kept` is the share of the splits with a threshold in which the rest's error rate below it is within the target;
    None where no split supports the target.
    """
    found = []
    for target in RISKS:
        outcomes = [judge(part, rest, target) for part, rest in resampled]
        held = [outcome for outcome in outcomes if "error" not in outcome]
        found.append(
            {
                "risk": target,
                "confidence": CONFIDENCE,
                "test": judge(train, test, target),
                "refused": 1 - len(held) / len(outcomes),
                "kept": float(np.mean([outcome["realised"] <= target for outcome in held])) if held else None,
                "mean_realised": float(np.mean([outcome["realised"] for outcome in held])) if held else None,
                "mean_coverage": float(np.mean([outcome["coverage"] for outcome in held])) if held else None,
            }
        )
    return found


def judge(part: Logs, rest: Logs, target: float) -> dict[str, Any]:
    """Fit a risk target on one part; the error rate and the share of what the student then answers of the rest."""
    try:
        threshold = by_risk(part.uncertainty, 1 - part.student, target, CONFIDENCE)
    except ValueError as error:
        return {"error": str(error)}
    stands = rest.uncertainty <= threshold.tau
    return {"tau": threshold.tau, "realised": float(1 - rest.student[stands].mean()), "coverage": float(stands.mean())}


def deferral(test: Logs) -> dict[str, Any]:
    """The deferral curve on `test`, with its bootstrap interval, against random deferral and the oracle.

    Margins are over random deferral: the smallest over the 99 whole percents, and the smallest over all numbers of
    deferred questions; `below_random` lists the numbers of deferred questions at which the margin is negative.
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
    """All figures. Raises OSError where the logs are missing."""
    train, test = (read(folder / f"mmlu_llama_{split}.jsonl") for split in ("train", "test"))
    resampled = splits(train, test)
    return {
        "n": [len(train.uncertainty), len(test.uncertainty)],
        "budgets": budgets(train, test, resampled),
        "smallest_risk": smallest_risk(train.uncertainty, 1 - train.student, CONFIDENCE),
        "risks": risks(train, test, resampled),
        "deferral": deferral(test),
    }


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown, rates in percent."""
    lines = [
        f"Budgets: fitted on {found['n'][0]}, judged on {found['n'][1]}; then over {SPLITS} splits of both together.\n",
        "| budget | stated 95% interval | realised | inside | mean over splits | splits inside |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["budgets"]:
        low, high = row["interval"]
        lines.append(
            f"| {row['budget']:.0%} | {low:.1%} to {high:.1%} | {row['realised']:.1%} | "
            f"{'yes' if row['realised_inside'] else 'no'} | {row['mean_realised']:.2%} | {row['inside']:.1%} |"
        )
    lines += [
        f"\nRisk targets at a confidence of {CONFIDENCE:.0%}; the smallest that train supports: "
        f"{found['smallest_risk']:.1%}.\n",
        "| risk | realised on test | answered by the student | splits refused | splits within the target | coverage |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["risks"]:
        test = row["test"]
        judged = "refused | -" if "error" in test else f"{test['realised']:.1%} | {test['coverage']:.1%}"
        splits = "- | -" if row["kept"] is None else f"{row['kept']:.1%} | {row['mean_coverage']:.1%}"
        lines.append(f"| {row['risk']:.0%} | {judged} | {row['refused']:.1%} | {splits} |")
    curve = found["deferral"]
    lines += [
        "\nDeferral on test, accuracy by the share of questions that the teacher gets.\n",
        "| deferred | accuracy | 95% interval | random | oracle | cost against the teacher alone |",
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
        f"Smallest margin over the 99 whole percents: {100 * least['margin']:+.3f} points at {least['fraction']:.0%}; "
        f"its 95% interval is above 0 at {curve['intervals_above']} of them, below at {curve['intervals_below']}.",
        f"Over every number of questions deferred: {100 * least_of_all['margin']:+.3f} points at "
        f"{least_of_all['deferred']}; below random at {len(below)} of {found['n'][1] - 1}"
        + (f", the last of them {below[-1]}." if below else "."),
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Thresholds and the deferral curve on real logs, as Markdown tables.")
    parser.add_argument(
        "folder", nargs="?", type=Path, default=FOLDER, help="where the logs lie (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, default=Path("runs/deferral.json"), help="where all figures are written")
    arguments = parser.parse_args()
    try:
        found = measure(arguments.folder)
    except FileNotFoundError as error:
        print(f"{error.filename} is missing; name the folder with the logs", file=sys.stderr)
        return 2
    print(table(found))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
