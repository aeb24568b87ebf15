"""Accuracies of the quickstart over seeds, as a Markdown table in percent.

    python benchmarks/quickstart_seeds.py [SEED ...]        # default: 1 2 3

Runs the chains one after another under the name `quickstart-SEED`. Stages that are already done are skipped.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROLES = {
    "majority_class": "majority class",
    "teacher": "teacher",
    "assistant": "assistant",
    "student": "student",
    "student_hard_labels": "student, hard labels",
}


def table(
    metrics: Mapping[int, Mapping[str, Any]], cascades: Mapping[int, Mapping[str, Any]], seconds: Mapping[int, float]
) -> str:
    """Markdown table: test accuracy of each role, gain of the student over hard labels, cascade results, run time.

    Args:
        metrics: content of `evaluate/metrics.json` by seed.
        cascades: content of `cascade/metrics.json` by seed.
        seconds: total time of the stages in `chain.json` by seed.
    """
    seeds = list(metrics)
    lines = [
        "| test accuracy, % | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |",
        "| --- |" + " --- |" * (len(seeds) + 1),
    ]

    def add_row(title: str, values: Sequence[float], spec: str) -> None:
        lines.append(f"| {title} | " + " | ".join(format(value, spec) for value in [*values, mean(values)]) + " |")

    percent = {role: [100 * metrics[seed][role]["accuracy"] for seed in seeds] for role in ROLES}
    for role, title in ROLES.items():
        add_row(title, percent[role], ".1f")
    both = zip(percent["student"], percent["student_hard_labels"], strict=True)
    add_row("student minus hard labels, points", [student - hard for student, hard in both], "+.1f")
    add_row("cascade", [100 * cascades[seed]["accuracy"] for seed in seeds], ".1f")
    add_row("teacher calls per post, %", [100 * cascades[seed]["teacher_calls_per_sample"] for seed in seeds], ".1f")
    add_row("seconds for the whole chain", [seconds[seed] for seed in seeds], ".0f")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="The quickstart's accuracies over seeds, as a Markdown table.")
    parser.add_argument("seeds", nargs="*", type=int, default=[1, 2, 3], metavar="SEED", help="seeds (default: 1 2 3)")
    seeds: list[int] = list(dict.fromkeys(parser.parse_args().seeds))
    metrics: dict[int, Any] = {}
    cascades: dict[int, Any] = {}
    seconds: dict[int, float] = {}
    for seed in seeds:
        name = f"quickstart-{seed}"
        command = [str(Path(sys.executable).with_name("distill")), "run", "--config", "recipes/quickstart.yaml"]
        command += ["--seed", str(seed), "--name", name]
        # the chain's output goes to stderr, so that stdout holds only the table
        process = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
        if process.returncode:
            return process.returncode
        folder = ROOT / "runs" / name
        metrics[seed] = json.loads((folder / "evaluate" / "metrics.json").read_text())
        cascades[seed] = json.loads((folder / "cascade" / "metrics.json").read_text())
        stages = json.loads((folder / "chain.json").read_text())["stages"]
        seconds[seed] = sum(stage["seconds"] for stage in stages.values())
    print(table(metrics, cascades, seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
