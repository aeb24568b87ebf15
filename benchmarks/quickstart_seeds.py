"""What the README says of seeds: the quickstart run once per seed, accuracies per role as Markdown, in percent.

    python benchmarks/quickstart_seeds.py [SEED ...]        # 1 2 3 unless told otherwise

Runs the chains one after another as `quickstart-SEED`; what is done already is skipped, as the chain itself does.
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
    """Markdown: a row per role with its test accuracies in percent, the student's gain in points, the cascade, seconds.

    Args:
        metrics: per seed the content of `evaluate/metrics.json`.
        cascades: per seed the content of `cascade/metrics.json`.
        seconds: per seed what the stages took, of `chain.json`.
    """
    seeds = list(metrics)
    lines = [
        "| test accuracy, % | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |",
        "| --- |" + " --- |" * (len(seeds) + 1),
    ]

    def row(title: str, values: Sequence[float], form: str) -> None:
        lines.append(f"| {title} | " + " | ".join(format(value, form) for value in [*values, mean(values)]) + " |")

    percent = {role: [100 * metrics[seed][role]["accuracy"] for seed in seeds] for role in ROLES}
    for role, title in ROLES.items():
        row(title, percent[role], ".1f")
    pairs = zip(percent["student"], percent["student_hard_labels"], strict=True)
    row("student minus hard labels, points", [student - hard for student, hard in pairs], "+.1f")
    row("cascade", [100 * cascades[seed]["accuracy"] for seed in seeds], ".1f")
    row("teacher calls a post, %", [100 * cascades[seed]["teacher_calls_per_sample"] for seed in seeds], ".1f")
    row("seconds for the whole chain", [seconds[seed] for seed in seeds], ".0f")
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
        # what the chain prints goes to stderr, so that the table alone can be sent to a file
        outcome = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
        if outcome.returncode:
            return outcome.returncode
        folder = ROOT / "runs" / name
        metrics[seed] = json.loads((folder / "evaluate" / "metrics.json").read_text())
        cascades[seed] = json.loads((folder / "cascade" / "metrics.json").read_text())
        stages = json.loads((folder / "chain.json").read_text())["stages"]
        seconds[seed] = sum(stage["seconds"] for stage in stages.values())
    print(table(metrics, cascades, seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
