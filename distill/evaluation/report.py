"""What a chain came to: the table printed at its end, and one self-contained HTML page.

The page needs no network and runs no script: styles, plots (SVG) and small pictures are inside it, and a content
security policy keeps it so. Whatever comes from posts and models is escaped by Jinja.
"""

import base64
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from distill.data.images import ImageError, decode
from distill.errors import RunError
from distill.evaluation.charts import cascade_charts, training
from distill.files import atomic_write
from distill.task.labels import LabelSpace
from distill.task.rationale import FIELDS, InvalidRationale, parse

Metrics = Mapping[str, Any]
Roles = Mapping[str, Metrics | Sequence[Metrics]]
"""Per role its object in `metrics.json`, or a list of such objects: one for each seed."""

TITLES = {
    "teacher": "teacher",
    "assistant": "assistant",
    "student": "student",
    "student_hard_labels": "student, hard labels",
}
"""The roles in the order in which they are shown."""

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
"""Values on a scale; Acc-2 and F1 in both published conventions."""
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
}
_PRINTED = {
    "reasoned_accuracy": "reasoned",
    "parse_rate": "parse rate",
    "rouge_l": "ROUGE-L",
    "consistency": "consistency",
}
_PICTURE_SIDE = 320


@dataclass
class Report:
    """Everything the page shows; only `name`, `labels` and `roles` must be there."""

    name: str
    labels: LabelSpace
    roles: Roles
    baselines: Mapping[str, Metrics] = field(default_factory=dict)
    """By title, what answering without a look at the post gets: `majority_baseline`, on a scale `trivial_baseline`."""
    curves: Mapping[str, Path] = field(default_factory=dict)
    """Per role the `metrics.csv` of Lightning's CSVLogger; a missing file shows no curve."""
    annotation: Mapping[str, Any] | None = None
    """The annotation's `summary.json`."""
    cascade: Mapping[str, Any] | None = None
    """The cascade's `metrics.json`, with the rows of `deferral_curve.csv` under `deferral`."""
    gallery: Sequence[Mapping[str, Any]] = ()
    """Test posts: id, text, aspect, image (a path or None), gold, answers {role: {label, probability}}, rationale and
    reference (text as generated, or None)."""
    settings: str = ""
    """The resolved recipe as YAML."""
    dates: Mapping[str, str] = field(default_factory=dict)
    """When the chain started and finished, say."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the libraries that matter."""


def format_table(roles: Roles, baselines: Mapping[str, Metrics] | None = None) -> str:
    """The table that ends a chain, as plain text: the baselines by their titles, then the roles that exist."""
    shown = _columns(roles, CLASSIFICATION | REGRESSION | _PRINTED)
    rows = [["", *shown.values()]]
    lines_of = dict(baselines or {}) | {title: roles[role] for role, title in _titles(roles).items()}
    for title, metrics in lines_of.items():
        rows.append([title, *(" ".join(_cell(metrics, key)).strip() for key in shown)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def write_report(path: Path, report: Report) -> None:
    """Write the page, in place of an earlier one only when it is complete.

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
        curves={TITLES.get(role, role): found for role, file in report.curves.items() if (found := training(file))},
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
    return {role: TITLES.get(role, role) for role in [*TITLES, *roles] if role in roles}


def _runs(metrics: Metrics | Sequence[Metrics]) -> Sequence[Metrics]:
    return [metrics] if isinstance(metrics, Mapping) else metrics


def _columns(roles: Roles, columns: Mapping[str, str]) -> dict[str, str]:
    """Those columns that at least one role has a figure for."""
    present = {key for metrics in roles.values() for run in _runs(metrics) for key in run}
    return {key: title for key, title in columns.items() if key in present}


def _cell(metrics: Metrics | Sequence[Metrics], key: str) -> tuple[str, str]:
    """A figure and, over several seeds, what follows their mean: ± their standard deviation (n - 1)."""
    values = [float(run[key]) for run in _runs(metrics) if run.get(key) is not None]
    if not values:
        return "–", ""
    return f"{statistics.fmean(values):.3f}", f"± {statistics.stdev(values):.3f}" if len(values) > 1 else ""


def _confusion(metrics: Metrics | Sequence[Metrics]) -> list[list[tuple[int, float]]]:
    """Counts over all seeds, each with its share of its gold label."""
    matrices = [run["confusion"] for run in _runs(metrics) if "confusion" in run]
    total = [[sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]
    return [[(count, count / max(sum(row), 1)) for count in row] for row in total]


def _flatten(summary: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested counts as one list of readable names and figures."""
    flat: dict[str, str] = {}
    for key, value in summary.items():
        name = prefix + {"n": "samples"}.get(key, str(key).replace("_", " "))
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{name}: ")
        elif value is not None:
            flat[name] = f"{value:.3f}" if isinstance(value, float) else str(value)
    return flat


def _post(entry: Mapping[str, Any], labels: LabelSpace) -> dict[str, Any]:
    return {
        **entry,
        "picture": _picture(entry.get("image")),
        "aspect": entry.get("aspect"),
        "rationale": _fields(entry.get("rationale"), labels),
        "reference": _fields(entry.get("reference"), labels),
    }


def _fields(text: str | None, labels: LabelSpace) -> dict[str, str] | None:
    """The fields of a rationale by name; all of an answer that is none under the reason why."""
    if not text:
        return None
    try:
        values = asdict(parse(text, labels)).values()
    except InvalidRationale as error:
        return {f"not a rationale ({error.reason})": text}
    return {name.replace("_", " "): value for name, value in zip(FIELDS, values, strict=True)}


def _picture(path: Path | str | None) -> dict[str, Any] | None:
    """A small copy as a data URI; `tiny` where it is drawn larger than it is."""
    if path is None:
        return None
    try:
        image = decode(Path(path))
    except ImageError as error:
        return {"error": str(error)}
    tiny = max(image.size) <= 96
    image.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG") if tiny else image.save(buffer, "JPEG", quality=82)
    kind = "png" if tiny else "jpeg"
    return {"uri": f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", "tiny": tiny}
