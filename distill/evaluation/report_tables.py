"""The tables of the report: titles of roles and metrics, their cells, and the table printed at the end of a chain."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from distill.task.sample import MODALITIES

Metrics = Mapping[str, Any]
Roles = Mapping[str, Metrics | Sequence[Metrics]]
"""The object of each role in `metrics.json`, or a list of such objects, one per seed."""

TITLES = {
    "teacher": "teacher",
    "assistant": "assistant",
    "student": "student",
    "student_refined": "student, refined",
    "student_hard_labels": "student, hard labels",
    **{f"student_without_{name}": f"student, without {name}" for name in MODALITIES},
}
"""Titles of the roles, in display order."""

CLASSIFICATION = {
    "accuracy": "accuracy",
    "weighted_f1": "weighted F1",
    "macro_f1": "macro F1",
    "ece": "ECE",
    "aurc": "AURC",
}
REGRESSION = {
    "mae": "MAE",
    "correlation": "correlation",
    "acc7": "Acc-7",
    "acc5": "Acc-5",
    "acc3": "Acc-3",
    "acc2_with_zero": "Acc-2 (≥ 0)",
    "acc2_without_zero": "Acc-2 (no 0)",
    "acc2_positive": "Acc-2 (> 0)",
    "f1_with_zero": "F1 (≥ 0)",
    "f1_without_zero": "F1 (no 0)",
    "f1_positive": "F1 (> 0)",
}
"""Metrics of values on a scale; Acc-2 and F1 in the published conventions."""
REASONING = {
    "reasoned_accuracy": "reasoned accuracy",
    "parse_rate": "parse rate",
    "consistency": "consistency",
    "grounded": "grounded",
    "rouge_l": "ROUGE-L",
    "bleu4": "BLEU-4",
    "meteor": "METEOR",
    "similarity": "similarity",
    "distinct1": "distinct-1",
    "distinct2": "distinct-2",
}
"""Metrics of rationales, in this project's definitions."""
PUBLISHED = {
    f"published_{name}": REASONING[name]
    for name in ("rouge_l", "bleu4", "meteor", "similarity", "distinct1", "distinct2")
}
"""Metrics of rationales, in the definitions of the published code."""
_TABLE_REASONING = {
    "reasoned_accuracy": "reasoned",
    "parse_rate": "parse rate",
    "rouge_l": "ROUGE-L",
    "consistency": "consistency",
}


def format_table(roles: Roles, baselines: Mapping[str, Metrics] | None = None) -> str:
    """The table printed at the end of a chain: the baselines by title, then the roles that were evaluated."""
    shown = columns(roles, CLASSIFICATION | REGRESSION | _TABLE_REASONING)
    rows = [["", *shown.values()]]
    by_title = dict(baselines or {}) | {title: roles[role] for role, title in role_titles(roles).items()}
    for title, metrics in by_title.items():
        rows.append([title, *(" ".join(cell(metrics, key)).strip() for key in shown)])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal: a header, a line and the other rows, with the first column to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def role_titles(roles: Roles) -> dict[str, str]:
    """Titles by role, in display order; roles without a title come last under their names."""
    return {role: TITLES.get(role, role) for role in [*TITLES, *roles] if role in roles}


def runs(metrics: Metrics | Sequence[Metrics]) -> Sequence[Metrics]:
    """The metrics of a role, one object per seed."""
    return [metrics] if isinstance(metrics, Mapping) else metrics


def columns(roles: Roles, columns: Mapping[str, str]) -> dict[str, str]:
    """The columns for which at least one role has a value."""
    present = {key for metrics in roles.values() for run in runs(metrics) for key in run}
    return {key: title for key, title in columns.items() if key in present}


def cell(metrics: Metrics | Sequence[Metrics], key: str) -> tuple[str, str]:
    """Mean over the seeds, and for several seeds ± their standard deviation (n - 1)."""
    values = [float(run[key]) for run in runs(metrics) if run.get(key) is not None]
    if not values:
        return "–", ""
    return f"{statistics.fmean(values):.3f}", f"± {statistics.stdev(values):.3f}" if len(values) > 1 else ""


def confusion(metrics: Metrics | Sequence[Metrics]) -> list[list[tuple[int, float]]]:
    """Counts summed over all seeds, each with its share of the gold label's row."""
    matrices = [run["confusion"] for run in runs(metrics) if "confusion" in run]
    total = [[sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]
    return [[(count, count / max(sum(row), 1)) for count in row] for row in total]


def flatten(summary: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested counts into readable names and values."""
    flat: dict[str, str] = {}
    for key, value in summary.items():
        name = prefix + {"n": "samples"}.get(key, str(key).replace("_", " "))
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}: ")
        elif value is not None:
            flat[name] = f"{value:.3f}" if isinstance(value, float) else str(value)
    return flat
