"""What a run's folder and a page of the gateway's metrics have measured: tokens, seconds and shares. No models."""

import csv
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import SettingsError
from distill.files import read_json

ROWS = 10_000
"""Most rows of a ledger or of decisions that are read: enough for a mean and a 99th percentile."""


@dataclass(frozen=True)
class Answers:
    """Mean tokens and seconds of one answer; `seconds` is None if none of them has a time."""

    prompt_tokens: float
    completion_tokens: float
    seconds: float | None


def ledger_answers(path: Path, templates: tuple[str, ...] | None = None) -> Answers | None:
    """The means of the first ROWS answers of a ledger; None without answers.

    Args:
        templates: prompts that count; None: all.
    """
    rows = [row["answer"] for row in _rows(path) if templates is None or row.get("template") in templates]
    if not rows:
        return None
    seconds = [row["seconds"] for row in rows if row.get("seconds") is not None]
    prompt, completion = (
        statistics.fmean(row[name] for row in rows) for name in ("prompt_tokens", "completion_tokens")
    )
    return Answers(prompt, completion, statistics.fmean(seconds) if seconds else None)


def summary(folder: Path, stage: str) -> dict[str, Any] | None:
    """`summary.json` of a stage, of a run that has posts; None if there is none."""
    path = folder / stage / "summary.json"
    content = read_json(path) if path.exists() else {}
    return content if content.get("n") else None


def cascade(folder: Path) -> dict[str, Any] | None:
    """`cascade/metrics.json`; None if the stage has not run."""
    path = folder / "cascade" / "metrics.json"
    content = read_json(path) if path.exists() else {}
    return content if content.get("n") and "stages" in content else None


def training_speed(folder: Path) -> float | None:
    """Median of the tokens per second in `metrics.csv` of a training, of all its processes; None without any."""
    path = folder / "metrics.csv"
    if not path.exists():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        found = [float(row["train/tokens_per_second"]) for row in csv.DictReader(file)
                 if row.get("train/tokens_per_second")]  # fmt: skip
    return statistics.median(found) if found else None


def teacher_seconds(folder: Path) -> np.ndarray:
    """[N] seconds of single answers of the cascade's teacher, first ones and reviews."""
    costs = [
        row[name]["cost"]
        for row in _rows(folder / "cascade" / "decisions.jsonl")
        for name in ("teacher", "review")
        if row.get(name) and row[name]["answered"]
    ]
    return np.array([cost["seconds"] / max(cost["calls"], 1) for cost in costs if cost["seconds"] is not None])


def batch_seconds(page: Path) -> dict[str, dict[int, float]]:
    """Mean seconds of the student's batches by kind and size, from a saved page of the gateway's `/metrics`.

    Raises:
        SettingsError: the file cannot be read or has no such times.
    """
    sums, counts = _batches(page)
    return {kind: {size: sums[kind][size] / counts[kind][size] for size in sizes} for kind, sizes in counts.items()}


def explained_share(page: Path) -> float | None:
    """Share of the student's rationales that were followed by an explanation; None if it wrote none."""
    _, counts = _batches(page)
    written, explained = (
        sum(size * count for size, count in counts.get(kind, {}).items()) for kind in ("reason", "explain")
    )
    return min(explained / written, 1.0) if written else None


_Sizes = dict[str, dict[int, float]]


def _batches(page: Path) -> tuple[_Sizes, _Sizes]:
    """Sums of the seconds, and numbers of the batches, by kind and size."""
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SettingsError(f"--metrics: cannot read {page}: {getattr(error, 'strerror', None) or error}") from None
    found: dict[str, _Sizes] = {"sum": defaultdict(dict), "count": defaultdict(dict)}
    pattern = r'^distill_student_batch_seconds_(sum|count)\{question="(\w+)",size="(\d+)"\} (\S+)$'
    for name, kind, size, value in re.findall(pattern, text, re.MULTILINE):
        found[name][kind][int(size)] = float(value)
    if not found["count"]:
        raise SettingsError(f"--metrics: {page} has no distill_student_batch_seconds; save /metrics of distill serve")
    return found["sum"], found["count"]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The first rows of a JSONL file of the run; none if it does not exist. An incomplete last row is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in islice(file, ROWS):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row
