"""Test metrics of a recipe over seeds, as a Markdown table.

    python benchmarks/seeds.py                                                # the quickstart, seeds 1 to 3
    python benchmarks/seeds.py --config recipes/mosi-gemma.yaml --seeds 1 2 3 -- --data.root path/to/mosi

Runs the chains one after another under the name RECIPE-SEED, with the arguments after `--`. Stages that are already
done are skipped.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROLES = {
    "trivial": "training mean, most frequent polarity",
    "majority_class": "majority class",
    "teacher": "teacher",
    "assistant": "assistant",
    "student": "student",
    "student_hard_labels": "student, hard labels",
}
SCALE_METRICS = {
    "mae": ("MAE", 1, ".3f"),
    "correlation": ("correlation", 1, ".3f"),
    "acc2_with_zero": ("Acc-2 with 0, %", 100, ".1f"),
    "acc2_without_zero": ("Acc-2 without 0, %", 100, ".1f"),
    "acc7": ("Acc-7, %", 100, ".1f"),
}
METRICS = {
    "accuracy": ("accuracy, %", 100, ".1f"),
    "macro_f1": ("macro F1, %", 100, ".1f"),
}
"""Title, factor and format of each metric."""


@dataclass(frozen=True)
class Run:
    """Content of `evaluate/metrics.json`, `cascade/metrics.json` (empty without a cascade) and `chain.json`."""

    metrics: dict[str, Any]
    cascade: dict[str, Any]
    chain: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        def load(name: str) -> dict[str, Any]:
            path = folder / name
            return json.loads(path.read_text()) if path.exists() else {}

        return cls(load("evaluate/metrics.json"), load("cascade/metrics.json"), load("chain.json"))


def table(runs: dict[int, Run]) -> str:
    """Markdown table with a column for each seed and one for the mean; a value that is not known is a dash."""
    lines = ["| | " + " | ".join(f"seed {seed}" for seed in runs) + " | mean |"]
    lines.append("| --- |" + " --- |" * (len(runs) + 1))

    def add(title: str, values: Sequence[float | None], form: str = ".2f", factor: float = 1) -> None:
        known = [value for value in values if value is not None]
        if known:
            average = mean(known) if len(known) == len(values) else None
            cells = ["–" if value is None else format(factor * value, form) for value in [*values, average]]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")

    everyone = list(runs.values())
    scale = any("mae" in role for run in everyone for role in run.metrics.values())
    for metric, (title, factor, form) in (SCALE_METRICS if scale else METRICS).items():
        for role, name in ROLES.items():
            add(f"{name}: {title}", [run.metrics.get(role, {}).get(metric) for run in everyone], form, factor)
        add(f"cascade: {title}", [run.cascade.get(metric) for run in everyone], form, factor)
    add("teacher calls per post", [run.cascade.get("teacher_calls_per_sample") for run in everyone], ".3f")
    for stage, name in {"student": "student", "teacher_first": "teacher"}.items():
        add(f"seconds per post, {name}", [_seconds(run, stage) for run in everyone], ".4f")
    add("seconds, cascade / teacher", [run.cascade.get("cost_ratio", {}).get("seconds") for run in everyone])
    stages = [list(run.chain.get("stages", {}).values()) for run in everyone]
    add("minutes, whole chain", [sum(stage["seconds"] for stage in part) / 60 for part in stages], ".1f")
    peaks = [max(((stage.get("peak_memory_mb") or {}).get("host", 0) for stage in part), default=0) for part in stages]
    add("peak memory, GB", [peak / 1000 or None for peak in peaks], ".1f")
    return "\n".join(lines)


def _seconds(run: Run, stage: str) -> float | None:
    """Measured seconds of one question to the model of a stage of the cascade."""
    part = run.cascade.get("stages", {}).get(stage)
    return part["cost"]["seconds"] / part["asked"] if part and part["asked"] else None


def run_chains(config: Path, seeds: Iterable[int], runs: Path, overrides: Sequence[str] = ()) -> dict[int, Run]:
    """Run the chain of each seed under the name RECIPE-SEED. Raises CalledProcessError if one fails."""
    found = {}
    for seed in dict.fromkeys(seeds):
        name = f"{config.stem}-{seed}"
        command = [str(Path(sys.executable).with_name("distill")), "run", "--config", str(config)]
        command += ["--runs", str(runs), "--name", name, "--seed", str(seed), *overrides]
        # the chain's output goes to stderr, so that stdout holds only the table
        subprocess.run(command, stdout=sys.stderr, check=True)
        found[seed] = Run.read(runs / name)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Test metrics of a recipe over seeds, as a Markdown table.")
    parser.add_argument("--config", type=Path, default=ROOT / "recipes" / "quickstart.yaml", help="the recipe")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="SEED", help="default: 1 2 3")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the runs")
    parser.add_argument("overrides", nargs="*", help="further arguments of `distill run`, after --")
    options = parser.parse_args()
    try:
        print(table(run_chains(options.config, options.seeds, options.runs, options.overrides)))
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
