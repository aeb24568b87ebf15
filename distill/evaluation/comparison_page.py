"""The table of a comparison, as text and as a self-contained HTML page."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from distill.evaluation.report_tables import TITLES, aligned

ROLES = TITLES | {"cascade": "cascade"}
"""Titles of what is compared, in display order."""
METRICS = {
    "macro_f1": "macro F1",
    "reasoned_accuracy": "reasoned",
    "parse_rate": "parse rate",
    "consistency": "consistency",
    "grounded": "grounded",
    "correlation": "correlation",
    "acc2_without_zero": "Acc-2 (no 0)",
    "teacher_calls_per_sample": "teacher calls",
}
"""Further metrics, as means over the runs of a variant."""
_DASH = "–"
_WIDTH = 160
"""Of the drawing of a difference, in SVG units."""


@dataclass
class Section:
    """The rows of one role: titles of the columns, and for each variant its cells and the drawing of its difference."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    drawings: list[dict[str, float] | None]


def sections(frame: pd.DataFrame) -> Iterator[Section]:
    """The rows of `comparison.compare` by role, without the metrics that none of them has."""
    for role, rows in frame.groupby("role", sort=False):
        metrics = [name for name in METRICS if rows[name].notna().any()]
        metric = {"accuracy": "accuracy", "mae": "MAE"}[rows["metric"].iloc[0]]
        tested = rows["p"].notna().any()
        columns = ["runs", metric, "difference", "95% interval", *(["p"] if tested else [])]
        cells = []
        for row in rows.to_dict("records"):
            interval = _DASH if _missing(row["low"]) else f"{row['low']:+.3f} to {row['high']:+.3f}"
            shown = [
                row["variant"],
                str(row["runs"]),
                _number(row["value"]),
                _number(row["difference"], "{:+.3f}".format),
            ]
            shown += [interval, *([_number(row["p"], _p_value)] if tested else [])]
            cells.append(shown + [_number(row[name]) for name in metrics])
        titles = columns + [METRICS[name] for name in metrics]
        yield Section(ROLES[str(role)], titles, cells, _drawings(rows))


def text_table(frame: pd.DataFrame) -> str:
    """The comparison for a terminal, a table for each role."""
    return "\n\n".join(aligned([[part.title, *part.columns], *part.rows]) for part in sections(frame))


def page(frame: pd.DataFrame) -> str:
    """The comparison as HTML without scripts and external files."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.get_template("comparison.html.jinja")
    first = frame["variant"].iloc[0]
    posts, metric = int(frame["posts"].iloc[0]), frame["metric"].iloc[0]
    return template.render(sections=list(sections(frame)), first=first, posts=posts, metric=metric, width=_WIDTH)


def _drawings(rows: pd.DataFrame) -> list[dict[str, float] | None]:
    """The horizontal positions of each difference, its interval and zero, on one axis for all rows."""
    ends = [0.0, *rows["low"].dropna(), *rows["high"].dropna()]
    low, high = min(ends), max(ends)
    span = (high - low) or 1.0

    def position(value: float) -> float:
        return round(6 + (value - low) / span * (_WIDTH - 12), 1)

    return [
        None if _missing(row["low"]) else {name: position(row[name]) for name in ("low", "high", "difference")}
        | {"zero": position(0.0)}
        for row in rows.to_dict("records")
    ]  # fmt: skip


def _missing(value: Any) -> bool:
    return value is None or math.isnan(value)


def _number(value: Any, form: Callable[[float], str] = "{:.3f}".format) -> str:
    return _DASH if _missing(value) else form(value)


def _p_value(value: float) -> str:
    return "< .001" if value < 0.001 else f"{value:.3f}"
