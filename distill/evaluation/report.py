"""Results of a chain: the table printed at its end, and a self-contained HTML page.

The page loads nothing and runs no scripts: styles, charts (SVG) and thumbnails are inline, which a content security
policy enforces. Jinja escapes all texts of posts and models.
"""

import base64
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from distill.data.images import ImageError, decode
from distill.errors import RunError
from distill.evaluation.charts import cascade_charts, training_charts
from distill.files import atomic_write
from distill.task.labels import LabelSpace
from distill.task.rationale import InvalidRationale, parse

Metrics = Mapping[str, Any]
Roles = Mapping[str, Metrics | Sequence[Metrics]]
"""The object of each role in `metrics.json`, or a list of such objects, one per seed."""

TITLES = {
    "teacher": "teacher",
    "assistant": "assistant",
    "student": "student",
    "student_refined": "student, refined",
    "student_hard_labels": "student, hard labels",
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
    "acc2_with_zero": "Acc-2 (≥ 0)",
    "acc2_without_zero": "Acc-2 (no 0)",
    "f1_with_zero": "F1 (≥ 0)",
    "f1_without_zero": "F1 (no 0)",
}
"""Metrics of values on a scale; Acc-2 and F1 in both published conventions."""
REASONING = {
    "reasoned_accuracy": "reasoned accuracy",
    "parse_rate": "parse rate",
    "consistency": "consistency",
    "rouge_l": "ROUGE-L",
    "bleu4": "BLEU-4",
    "meteor": "METEOR",
    "similarity": "similarity",
    "distinct1": "distinct-1",
    "distinct2": "distinct-2",
    "published_rouge_l": "ROUGE-L (published)",
    "published_bleu4": "BLEU-4 (published)",
    "published_meteor": "METEOR (published)",
    "published_similarity": "similarity (published)",
    "published_distinct1": "distinct-1 (published)",
    "published_distinct2": "distinct-2 (published)",
}
"""Metrics of rationales, in this project's definitions and in those of the published code."""
_TABLE_REASONING = {
    "reasoned_accuracy": "reasoned",
    "parse_rate": "parse rate",
    "rouge_l": "ROUGE-L",
    "consistency": "consistency",
}
_THUMBNAIL_SIZE = 320


@dataclass
class Report:
    """Content of the page; only `name`, `labels` and `roles` are required."""

    name: str
    labels: LabelSpace
    roles: Roles
    baselines: Mapping[str, Metrics] = field(default_factory=dict)
    """Metrics by title of the baselines: `majority_baseline`, and on a scale `trivial_baseline`."""
    curves: Mapping[str, Path] = field(default_factory=dict)
    """By role, the `metrics.csv` of Lightning's CSVLogger; missing files are skipped."""
    annotation: Mapping[str, Any] | None = None
    """`annotate/summary.json`."""
    cascade: Mapping[str, Any] | None = None
    """`cascade/metrics.json` with its curves, as `stages.cascade.read_metrics` returns it."""
    gallery: Sequence[Mapping[str, Any]] = ()
    """Test posts: id, text, aspect, image (path or None), gold, answers {role: {label, probability}}, rationale and
    reference (generated text or None)."""
    without_images: Sequence[str] = ()
    """Titles of the roles that are given the texts of the posts only."""
    settings: str = ""
    """The resolved recipe as YAML."""
    dates: Mapping[str, str] = field(default_factory=dict)
    """Dates by event, such as the start of the chain."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions by library."""


def format_table(roles: Roles, baselines: Mapping[str, Metrics] | None = None) -> str:
    """The table printed at the end of a chain: the baselines by title, then the roles that were evaluated."""
    shown = _columns(roles, CLASSIFICATION | REGRESSION | _TABLE_REASONING)
    rows = [["", *shown.values()]]
    by_title = dict(baselines or {}) | {title: roles[role] for role, title in _titles(roles).items()}
    for title, metrics in by_title.items():
        rows.append([title, *(" ".join(_cell(metrics, key)).strip() for key in shown)])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal: a header, a line and the other rows, with the first column to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def write_report(path: Path, report: Report) -> None:
    """Write the page atomically: an earlier page is replaced only by a complete one.

    Raises:
        RunError: the page cannot be written.
    """
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    titles = _titles(report.roles)
    page = environment.get_template("report.html.jinja").render(
        report=report,
        titles=titles,
        classification=_columns(report.roles, CLASSIFICATION),
        regression=_columns(report.roles, REGRESSION),
        reasoning=_columns(report.roles, REASONING),
        cell=_cell,
        seeds=max((len(_runs(metrics)) for metrics in report.roles.values()), default=0),
        confusions={title: _confusion(report.roles[role]) for role, title in titles.items()},
        curves={TITLES.get(role, role): c for role, file in report.curves.items() if (c := training_charts(file))},
        cascade=cascade_charts(report.cascade) if report.cascade else {},
        priced=any(
            stage["cost"]["currency"] is not None for stage in (report.cascade or {"stages": {}})["stages"].values()
        ),
        annotation=_flatten(report.annotation or {}),
        gallery=[_post(entry, report.labels) for entry in report.gallery],
        names=TITLES,
    )
    try:
        with atomic_write(path, "wb") as file:
            file.write(page.encode("utf-8", "replace"))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def _titles(roles: Roles) -> dict[str, str]:
    """Titles by role, in display order; roles without a title come last under their names."""
    return {role: TITLES.get(role, role) for role in [*TITLES, *roles] if role in roles}


def _runs(metrics: Metrics | Sequence[Metrics]) -> Sequence[Metrics]:
    """The metrics of a role, one object per seed."""
    return [metrics] if isinstance(metrics, Mapping) else metrics


def _columns(roles: Roles, columns: Mapping[str, str]) -> dict[str, str]:
    """The columns for which at least one role has a value."""
    present = {key for metrics in roles.values() for run in _runs(metrics) for key in run}
    return {key: title for key, title in columns.items() if key in present}


def _cell(metrics: Metrics | Sequence[Metrics], key: str) -> tuple[str, str]:
    """Mean over the seeds, and for several seeds ± their standard deviation (n - 1)."""
    values = [float(run[key]) for run in _runs(metrics) if run.get(key) is not None]
    if not values:
        return "–", ""
    return f"{statistics.fmean(values):.3f}", f"± {statistics.stdev(values):.3f}" if len(values) > 1 else ""


def _confusion(metrics: Metrics | Sequence[Metrics]) -> list[list[tuple[int, float]]]:
    """Counts summed over all seeds, each with its share of the gold label's row."""
    matrices = [run["confusion"] for run in _runs(metrics) if "confusion" in run]
    total = [[sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]
    return [[(count, count / max(sum(row), 1)) for count in row] for row in total]


def _flatten(summary: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested counts into readable names and values."""
    flat: dict[str, str] = {}
    for key, value in summary.items():
        name = prefix + {"n": "samples"}.get(key, str(key).replace("_", " "))
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{name}: ")
        elif value is not None:
            flat[name] = f"{value:.3f}" if isinstance(value, float) else str(value)
    return flat


def _post(entry: Mapping[str, Any], labels: LabelSpace) -> dict[str, Any]:
    """A gallery entry with its thumbnail and parsed rationales."""
    return {
        **entry,
        "thumbnail": _thumbnail(entry.get("image")),
        "aspect": entry.get("aspect"),
        "rationale": _fields(entry.get("rationale"), labels),
        "reference": _fields(entry.get("reference"), labels),
    }


def _fields(text: str | None, labels: LabelSpace) -> dict[str, str] | None:
    """The fields of a rationale by name; an invalid one as a whole, under the reason."""
    if not text:
        return None
    try:
        return {name.replace("_", " "): value for name, value in parse(text, labels).as_dict().items()}
    except InvalidRationale as error:
        return {f"not a rationale ({error.reason})": text}


def _thumbnail(path: Path | str | None) -> dict[str, Any] | None:
    """A thumbnail as a data URI; `tiny` for images that the page enlarges."""
    if path is None:
        return None
    try:
        image = decode(Path(path))
    except ImageError as error:
        return {"error": str(error)}
    tiny = max(image.size) <= 96
    image.thumbnail((_THUMBNAIL_SIZE, _THUMBNAIL_SIZE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG") if tiny else image.save(buffer, "JPEG", quality=82)
    kind = "png" if tiny else "jpeg"
    return {"uri": f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", "tiny": tiny}
