"""The quickstart over seeds, each figure beside its target, as a Markdown table.

    python benchmarks/quickstart_seeds.py 1 2 3

Runs the chains one after another under the names quickstart-SEED. Stages that are already done are skipped. Minutes and
memory are those of the stages when they ran, so that they are comparable only on an idle machine.
"""

import argparse
import operator
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script

from benchmarks.seeds import ROOT, Run, run_chains

Figure = Callable[[Run], float | None]
SIGNS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}


class Row(NamedTuple):
    """A figure of a run, its format, and its target; a row without a sign has no target."""

    title: str
    figure: Figure
    form: str = ".3f"
    sign: str = ""
    target: float = 0.0


def of(role: str, metric: str = "accuracy") -> Figure:
    """A metric of a role on the test split."""
    return lambda run: run.metrics.get(role, {}).get(metric)


def cascade(*names: str) -> Figure:
    """A value of the cascade's metrics."""

    def find(run: Run) -> float | None:
        value: Any = run.cascade
        for name in names:
            value = (value or {}).get(name)
        return value

    return find


def gap(first: Figure, second: Figure) -> Figure:
    """The difference of two figures; None if one is not known."""

    def subtract(run: Run) -> float | None:
        one, other = first(run), second(run)
        return None if one is None or other is None else one - other

    return subtract


def minutes(run: Run) -> float:
    return sum(stage["seconds"] for stage in run.chain["stages"].values()) / 60


def peak_gib(run: Run) -> float:
    return max(stage["peak_memory_mb"]["host"] for stage in run.chain["stages"].values()) / 1024


ROWS = [
    Row("teacher: accuracy", of("teacher"), sign=">=", target=0.97),
    Row("assistant: accuracy", of("assistant")),
    Row("student: accuracy, at least", of("student"), sign=">=", target=0.85),
    Row("student: accuracy, at most", of("student"), sign="<=", target=0.94),
    Row("student, hard labels: accuracy", of("student_hard_labels")),
    Row("student - hard labels", gap(of("student"), of("student_hard_labels")), sign=">=", target=0.04),
    Row("teacher - assistant", gap(of("teacher"), of("assistant")), sign=">=", target=0.0),
    Row("assistant - student", gap(of("assistant"), of("student")), sign=">=", target=0.0),
    Row("cascade: accuracy", cascade("accuracy")),
    Row("teacher - cascade", gap(of("teacher"), cascade("accuracy")), sign="<=", target=0.01),
    Row("cascade - student", gap(cascade("accuracy"), of("student")), sign=">=", target=0.03),
    Row("cascade: teacher calls per post", cascade("teacher_calls_per_sample"), sign="<=", target=0.35),
    Row("cascade: seconds / teacher's", cascade("cost_ratio", "seconds"), ".2f", "<=", 0.6),
    Row("cascade: posts reviewed", cascade("review_flips", "reviewed"), ".0f", ">=", 10),
    Row("cascade: wrong before a review, right after", cascade("review_flips", "wrong_to_right"), ".0f"),
    Row("cascade: right before a review, wrong after", cascade("review_flips", "right_to_wrong"), ".0f"),
    Row("teacher: grounded", of("teacher", "grounded"), sign=">=", target=0.90),
    Row("student: grounded", of("student", "grounded"), sign=">=", target=0.85),
    Row("student: accuracy - reasoned accuracy", gap(of("student"), of("student", "reasoned_accuracy")), sign="<=",
        target=0.03),
    Row("minutes, whole chain", minutes, ".1f", "<=", 4),
    Row("peak memory, GiB", peak_gib, ".2f", "<=", 1.5),
]  # fmt: skip


def table(runs: dict[int, Run]) -> str:
    """A row for each figure: its values, their mean, the target, and whether every seed holds it."""
    lines = ["| | " + " | ".join(f"seed {seed}" for seed in runs) + " | mean | target | held |"]
    lines.append("| --- |" + " --- |" * (len(runs) + 3))
    for title, figure, form, sign, target in ROWS:
        values = [figure(run) for run in runs.values()]
        known = [value for value in values if value is not None]
        average = mean(known) if len(known) == len(values) else None
        cells = ["–" if value is None else format(value, form) for value in [*values, average]]
        held = "–"
        if compare := SIGNS.get(sign):
            held = f"{sum(compare(round(value, 9), target) for value in known)} of {len(values)}"
        lines.append(f"| {title} | {' | '.join(cells)} | {f'{sign} {target:g}' if sign else '–'} | {held} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="The quickstart over seeds, each figure beside its target.")
    parser.add_argument("seeds", nargs="*", type=int, default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--config", type=Path, default=ROOT / "recipes" / "quickstart.yaml", help="the recipe")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the runs")
    options = parser.parse_args()
    try:
        print(table(run_chains(options.config, options.seeds, options.runs)))
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
