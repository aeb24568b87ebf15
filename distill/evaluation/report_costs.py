"""What a run has cost: seconds and currency per post of the roles and the cascade, and the duration of the stages."""

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal, get_args

from distill.evaluation.report_tables import role_titles

Unit = Literal["seconds", "currency"]
DASH = "–"


def cascade_cost(metrics: Mapping[str, Any], unit: Unit) -> float | None:
    """Mean cost of the cascade per post; None if a stage that was asked has an unknown cost.

    The student has no price: its tokens are not paid for.

    Args:
        metrics: `cascade/metrics.json`.
    """
    asked = {name: stage for name, stage in metrics["stages"].items() if stage["asked"]}
    if unit == "currency":
        asked.pop("student", None)
    costs = [stage["cost"].get(unit) for stage in asked.values()]
    if not metrics["n"] or None in costs or (unit == "currency" and metrics["cost_ratio"][unit] is None):
        return None
    return sum(map(float, costs)) / metrics["n"]


def costs_per_post(roles: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, dict[Unit, float | None]]:
    """Mean cost of a label by title of the role, as the cascade measured it; None if it is unknown.

    The student of the cascade is the refined one, if there is one. The teacher's cost is that of all posts, the
    difference between the ends of the deferral curve; without a curve it is the mean over the posts that the cascade
    deferred.

    Args:
        metrics: `cascade/metrics.json` with the rows of `deferral_curve.csv` under `deferral`.
    """
    ends = {number(row["deferred"]): row for row in metrics["deferral"]}
    student, teacher = (metrics["stages"][name] for name in ("student", "teacher_first"))

    def cost(role: str, unit: Unit) -> float | None:
        if role == ("student_refined" if "student_refined" in roles else "student"):
            return _mean(student, unit)
        if role != "teacher":
            return None
        alone, both = (number(ends[share].get(unit)) if share in ends else None for share in (0.0, 1.0))
        return _mean(teacher, unit) if alone is None or both is None else both - alone

    units = get_args(Unit)
    costs = {title: {unit: cost(role, unit) for unit in units} for role, title in role_titles(roles).items()}
    return costs | {"cascade": {unit: cascade_cost(metrics, unit) for unit in units}}


def number(value: Any) -> float | None:
    """A finite number, or None."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def _mean(stage: Mapping[str, Any], unit: Unit) -> float | None:
    """Mean cost of the predictions of one stage."""
    cost = stage["cost"].get(unit)
    return None if cost is None or not stage["asked"] else float(cost) / stage["asked"]


def stage_rows(stages: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Duration and peak memory of each stage as text, and a last row with their sum and maximum.

    Args:
        stages: the entries of `chain.json`. Fields that an entry lacks are dashes, and so is the sum then.
    """
    seconds = [entry.get("seconds") for entry in stages.values()]
    peaks = [entry.get("peak_memory_mb") or {} for entry in stages.values()]
    rows = [_row(*row) for row in zip(stages, seconds, peaks, strict=True)]
    total = None if None in seconds else sum(filter(None, seconds))
    highest = {kind: max((peak[kind] for peak in peaks if kind in peak), default=None) for kind in ("host", "gpu")}
    return [*rows, _row("total", total, highest)] if rows else []


def _row(name: str, seconds: float | None, peak: Mapping[str, Any]) -> dict[str, str]:
    return {"name": name, "duration": duration(seconds)} | {kind: memory(peak.get(kind)) for kind in ("host", "gpu")}


def duration(seconds: float | None) -> str:
    """A duration such as `17.0 s`, `2 min 26 s` or `1 h 05 min`."""
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def memory(mib: float | None) -> str:
    """An amount of memory such as `762 MiB` or `12.3 GiB`."""
    if mib is None:
        return DASH
    return f"{mib:.0f} MiB" if mib < 10_000 else f"{mib / 1024:.1f} GiB"


def amount(value: float | None) -> str:
    """A cost with three significant digits, without an exponent."""
    return DASH if value is None else f"{Decimal(f'{value:.3g}'):f}"
