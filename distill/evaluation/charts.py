"""SVG coordinates of the report's charts: training curves, and the deferral and calibration curves of the cascade."""

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from distill.evaluation.report_costs import Unit, cascade_cost, number

Points = list[tuple[float, float]]

CASCADE = "this cascade, reviews included"
"""Name of the point of the calibrated thresholds in the deferral curves."""

_NO_LOSSES = {"train/learning_rate", "train/gradient_norm", "train/tokens_per_second"}
"""On the axis of the losses they would hide them."""
_COLUMNS = ("deferred", "quality", "low", "high", "seconds", "currency")
_MAX_POINTS = 300
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 440, 220, 44, 10, 10, 28  # in SVG units


def training_charts(path: Path) -> dict[str, dict[str, Any]]:
    """Training losses and validation metrics of one role, from the `metrics.csv` of Lightning's CSVLogger."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.DictReader(file))
    curves: dict[str, Points] = {}
    for row in rows:
        step = number(row.get("step"))
        for name, text in row.items():
            value = number(text)
            if isinstance(name, str) and "/" in name and step is not None and value is not None:
                curves.setdefault(name, []).append((step, value))
    curves = {name: _downsample(sorted(points)) for name, points in curves.items()}
    losses = {
        n: p for n, p in curves.items() if n.startswith("train/") and n not in _NO_LOSSES and any(y for _, y in p)
    }
    validated = {n: p for n, p in curves.items() if n.startswith("val/") and n != "val/selection"}
    charts = {"loss by step": chart(losses), "validation by step": chart(validated, top=1.0)}
    return {title: plot for title, plot in charts.items() if plot}


def deferral(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """The deferral curves of all policies with their values; None if there are none.

    Args:
        metrics: `cascade/metrics.json` with its curves, as `stages.cascade.read_metrics` returns it. Rows whose share
            or quality is no number are left out.

    Returns:
        `quality`, what the curves show; `policies`, the points by name of the policy: the `_COLUMNS`, None if unknown;
        `in_use`, the position of the policy that the cascade defers by, -1 if it has no curve; `cascade`, the point of
        the calibrated thresholds; and `charts` by title, whose lines have the points of the policies in their order.
    """
    policies: dict[str, list[list[Any]]] = {}
    for row in metrics.get("deferral", ()):
        values = [number(row.get(name)) for name in _COLUMNS]
        if None not in values[:2]:
            policies.setdefault(row["policy"].replace("_", " "), []).append(values)
    if not policies:
        return None
    name, quality = ("minus MAE", -metrics["mae"]) if "mae" in metrics else ("accuracy", metrics["accuracy"])
    share = metrics["stages"]["teacher_first"]["asked"] / metrics["n"]
    point: list[Any] = [share, quality, None, None, *(cascade_cost(metrics, unit) for unit in get_args(Unit))]
    in_use = str(metrics["measure"]).replace("_", " ")
    band = [(row[0], row[2], row[3]) for row in policies.get(in_use, ()) if None not in row[:4]]
    charts = {}
    for title, x in {"share of posts deferred": 0, "seconds per post": 4, "currency per post": 5}.items():
        if all(row[x] is not None for rows in [[point], *policies.values()] for row in rows):
            lines = {policy: [(row[x], row[1]) for row in rows] for policy, rows in policies.items()}
            marker = {CASCADE: (point[x], quality)}
            charts[f"{name} by {title}"] = chart(lines, bottom=None, band=[] if x else band, markers=marker)
    position = list(policies).index(in_use) if in_use in policies else -1
    return {"quality": name, "policies": policies, "in_use": position, "cascade": point, "charts": charts}


def cascade_charts(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Risk-coverage curves and reliability diagrams of student and teacher.

    Args:
        metrics: `cascade/metrics.json` with its curves, as `stages.cascade.read_metrics` returns it.
    """
    charts = {}
    models = metrics.get("selective", {})
    risks = {
        role: list(zip(*model["after"]["risk_coverage"].values(), strict=True))
        for role, model in models.items()
        if "risk_coverage" in model["after"]
    }
    charts["risk by coverage"] = chart({role: _downsample(points) for role, points in risks.items()})
    for role, model in models.items():
        lines = {f"{when} calibration": _reliability(model[when]["reliability"]) for when in ("before", "after")}
        charts[f"accuracy of the {role} by its confidence"] = chart(lines | {"ideal": [(0.0, 0.0), (1.0, 1.0)]})
    return {title: plot for title, plot in charts.items() if plot}


def _reliability(bins: Mapping[str, Sequence[float]]) -> Points:
    """Confidence and accuracy of the bins that are not empty."""
    columns = zip(bins["confidence"], bins["accuracy"], bins["count"], strict=True)
    return [(confidence, accuracy) for confidence, accuracy, count in columns if count]


def chart(
    curves: Mapping[str, Points],
    *,
    top: float = 0.0,
    bottom: float | None = 0.0,
    band: Sequence[tuple[float, float, float]] = (),
    markers: Mapping[str, tuple[float, float]] | None = None,
) -> dict[str, Any]:
    """Lines and axes of a chart in SVG coordinates; empty if there are no points.

    Args:
        curves: points (x, y) by name of the line.
        top: the y axis ends at this value or higher.
        bottom: start of the y axis; None: just below the lowest point.
        band: x, low and high of an area behind the lines.
        markers: single points by name.
    """
    points = [point for curve in curves.values() for point in curve] + list((markers or {}).values())
    if not points:
        return {}
    heights = [y for _, y in points] + [y for _, *ends in band for y in ends]
    y_ticks = _ticks(min(heights) if bottom is None else bottom, max(top, *heights))
    x_ticks = _ticks(0.0, max(x for x, _ in points))
    width = _WIDTH - _LEFT - _RIGHT
    height = _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        level = (max(y, y_ticks[0]) - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(_LEFT + width * x / x_ticks[-1], 1), round(_TOP + height * (1 - level), 1)

    return {
        "size": (_WIDTH, _HEIGHT),
        "frame": (_LEFT, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM),
        "x_ticks": [(place(tick, 0.0)[0], f"{tick:g}") for tick in x_ticks],
        "y_ticks": [(place(0.0, tick)[1], f"{tick:g}") for tick in y_ticks],
        "lines": {name: [place(x, y) for x, y in curve] for name, curve in curves.items()},
        "y_axis": (y_ticks[0], _HEIGHT - _BOTTOM, y_ticks[-1], _TOP),
        "band": [place(x, low) for x, low, _ in band] + [place(x, up) for x, _, up in reversed(band)],
        "markers": {name: place(*point) for name, point in (markers or {}).items()},
    }


def _downsample(points: Points) -> Points:
    """At most _MAX_POINTS points: the means of consecutive groups of equal size."""
    width = max(1, math.ceil(len(points) / _MAX_POINTS))
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    return [(statistics.fmean(x for x, _ in g), statistics.fmean(y for _, y in g)) for g in groups]


def _ticks(low: float, high: float) -> list[float]:
    """Evenly spaced round numbers from `low` or just below to `high` or just above."""
    span = max(high - low, 1e-9)
    power = 10 ** math.floor(math.log10(span / 4))
    step = next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]
