"""`report.html`: the results of a chain as a self-contained page.

The page loads nothing: styles, charts (SVG) and thumbnails are inline. A content security policy enforces it and allows
one script, by its hash, which makes the deferral curves interactive. Jinja escapes all texts of posts and models.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from distill.data.clips import ClipError, ClipReader
from distill.data.images import ImageError, decode
from distill.errors import RunError, SettingsError
from distill.evaluation.charts import CASCADE, cascade_charts, deferral, training_charts
from distill.evaluation.evaluate import parse_or_none
from distill.evaluation.reasoning import grounding
from distill.evaluation.report_costs import DASH, amount, costs_per_post, stage_rows
from distill.evaluation.report_tables import (
    CLASSIFICATION,
    PUBLISHED,
    REASONING,
    REGRESSION,
    TITLES,
    Metrics,
    Roles,
    cell,
    columns,
    confusion,
    flatten,
    role_titles,
    runs,
)
from distill.files import atomic_write
from distill.task.labels import LabelSpace
from distill.task.rationale import InvalidRationale, parse

_PAGE = Path(__file__).parent / "report_page"
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
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The entries of `chain.json` by stage."""
    gallery: Sequence[Mapping[str, Any]] = ()
    """Test posts: `index`, their position in the test split, id, text, aspect, image and video (path or None; without
    an image the middle frame of the video is shown), gold, answers
    {role: {label, probability}}, rationales {role: generated text}, reference (text or None), attributes (the gold
    attributes by name, empty if there are none), and decision (of the cascade, as below, or None)."""
    decisions: Sequence[Mapping[str, Any]] = ()
    """Groups of decisions of the cascade that are worth reading: title, total (before the limit), and rows: `index` and
    id of the post, stage, reason, gold, label, right, and under student, teacher and review label, right and
    uncertainty (None if the model was not asked)."""
    clips: ClipReader = field(default_factory=ClipReader)
    """Decodes the videos of the gallery."""
    without_images: Sequence[str] = ()
    """Titles of the roles that are given the texts of the posts only."""
    settings: str = ""
    """The resolved recipe as YAML."""
    dates: Mapping[str, str] = field(default_factory=dict)
    """Dates by event, such as the start of the chain."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions by library."""


def write_report(path: Path, report: Report) -> None:
    """Write the page atomically: an earlier page is replaced only by a complete one.

    Raises:
        RunError: the page cannot be written.
    """
    environment = Environment(
        loader=FileSystemLoader(_PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"cell": cell, "amount": amount, "names": TITLES, "this_cascade": CASCADE}
    script = (_PAGE / "deferral.js").read_text(encoding="utf-8")
    titles, annotation = role_titles(report.roles), report.annotation or {}
    page = environment.get_template("page.html.jinja").render(
        report=report,
        titles=titles,
        classification=columns(report.roles, CLASSIFICATION),
        regression=columns(report.roles, REGRESSION),
        reasoning=columns(report.roles, REASONING),
        published=columns(report.roles, PUBLISHED),
        seeds=max((len(runs(metrics)) for metrics in report.roles.values()), default=0),
        confusions={title: confusion(report.roles[role]) for role, title in titles.items()},
        curves={TITLES.get(role, role): c for role, file in report.curves.items() if (c := training_charts(file))},
        deferral=_with_readout(deferral(report.cascade)) if report.cascade else None,
        charts=cascade_charts(report.cascade) if report.cascade else {},
        priced=any(
            stage["cost"]["currency"] is not None for stage in (report.cascade or {"stages": {}})["stages"].values()
        ),
        costs=costs_per_post(report.roles, report.cascade) if report.cascade else {},
        stages=stage_rows(report.stages),
        on_gpu=any((entry.get("peak_memory_mb") or {}).get("gpu") for entry in report.stages.values()),
        paid=annotation.get("paid"),
        annotation=flatten({name: value for name, value in annotation.items() if name != "curated"}),
        curated=annotation.get("curated"),
        gallery=[_post(entry, report) for entry in report.gallery],
        listed={row["index"] for group in report.decisions for row in group["rows"]},
        shown={entry["index"] for entry in report.gallery},
        style=Markup((_PAGE / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        digest=base64.b64encode(sha256(script.encode()).digest()).decode(),
    )
    try:
        with atomic_write(path, "wb") as file:
            file.write(page.encode("utf-8", "replace"))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def _with_readout(curves: dict[str, Any] | None) -> dict[str, Any] | None:
    """The deferral curves with the texts of their points: `readout`, and `points` for the script."""
    if curves is None:
        return None
    points = [[[row[0], row[2], row[3], *_readout(row)] for row in rows] for rows in curves["policies"].values()]
    return curves | {"readout": _readout(curves["cascade"]), "points": points}


def _readout(point: Sequence[Any]) -> list[str]:
    """The cells of a point of the deferral curves: deferred, quality, interval, seconds and currency."""
    share, quality, low, high, seconds, currency = point
    interval = DASH if low is None or high is None else f"{low:.3f} to {high:.3f}"
    return [f"{share:.3f}", f"{quality:.3f}", interval, amount(seconds), amount(currency)]


def _post(entry: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """A gallery entry with its thumbnail and parsed rationales, each with its mark."""
    labels = report.labels

    def rationale(text: str) -> dict[str, Any]:
        attributes = entry["attributes"]
        named = grounding(parse_or_none(text, labels, post=entry["text"]), attributes)
        missing = [value for value, is_named in zip(attributes.values(), named, strict=True) if not is_named]
        return {"fields": _fields(text, labels), "grounded": not missing if named else None, "missing": missing}

    texts = {TITLES.get(role, role): text for role, text in entry["rationales"].items()}
    return {
        **entry,
        "thumbnail": _thumbnail(entry["image"], entry.get("video"), report.clips),
        "rationales": {
            title: rationale(text) for title, text in (texts | {"reference": entry["reference"]}).items() if text
        },
    }


def _fields(text: str, labels: LabelSpace) -> dict[str, str]:
    """The fields of a rationale by name; an invalid one as a whole, under the reason."""
    try:
        return {name.replace("_", " "): value for name, value in parse(text, labels).as_dict().items()}
    except InvalidRationale as error:
        return {f"not a rationale ({error.reason})": text}


def _thumbnail(path: Path | str | None, video: Path | None, clips: ClipReader) -> dict[str, Any] | None:
    """A thumbnail of an image or of a video as a data URI; `tiny` for images that the page enlarges."""
    try:
        if path is not None:
            image = decode(Path(path))
        elif video is not None:
            image = Image.fromarray(clips.frames(video, 1).images[0])
        else:
            return None
    except (ImageError, ClipError, SettingsError) as error:  # SettingsError: PyAV is not installed here
        return {"error": str(error)}
    tiny = max(image.size) <= 96
    image.thumbnail((_THUMBNAIL_SIZE, _THUMBNAIL_SIZE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG") if tiny else image.save(buffer, "JPEG", quality=82)
    kind = "png" if tiny else "jpeg"
    return {"uri": f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", "tiny": tiny}
