"""JSONL files with one post per line: reading of samples, writing of reasoning data.

The fields are `id`, `text`, `aspect`, `label`, `images` (a list, or one name as `image`), `video`, `audio`, `rationale`
and `attributes`. The readers of the other layouts yield rows with the same fields. File names are relative to the data
root. `to_row` is the inverse of `to_sample`.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.data.images import resolve
from distill.data.text import clean, decode_lines
from distill.errors import RunError
from distill.files import atomic_write, finite
from distill.task.sample import Sample

_CLIPS = ("video", "audio")


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        number: line number, 1-based.
        problem: why the row cannot be used, if so.
        encoding: encoding of its text.
    """

    number: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None
    encoding: str = "utf-8"


def lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the non-blank lines with their 1-based numbers and their encodings (`data/text.py`)."""
    for number, (line, encoding) in enumerate(decode_lines(path.read_bytes()), start=1):
        if line.strip():
            yield number, line, encoding


def read(path: Path) -> Iterator[Row]:
    """Yield every row of a file. A line that is not a JSON object yields a row with a `problem`."""
    for number, line, encoding in lines(path):
        yield parse_line(number, line, encoding)


def parse_line(number: int, line: str, encoding: str = "utf-8") -> Row:
    """The row of one line of a file."""
    try:
        fields = json.loads(line, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        return Row(number, problem=f"is not valid JSON: {error}")
    problem = None if isinstance(fields, dict) else "is not a JSON object"
    return Row(number, {} if problem else fields, problem, encoding)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a name that is given twice: one of the values would be lost."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{name} is given twice")
    return fields


def image_names(fields: Mapping[str, Any]) -> list[str]:
    """The image names of a row, from `images` or `image`; an empty name is no image.

    Raises:
        ValueError: both are given, or they have other types.
    """
    one, many = (fields.get(name) or None for name in ("image", "images"))
    if one is not None and many is not None:
        raise ValueError("image and images are both given")
    names = many if many is not None else [] if one is None else [one]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("images must be file names")
    return [name for name in names if name.strip()]


def file_names(fields: Mapping[str, Any]) -> list[str]:
    """The names of all files of a row: its images, its video and its audio.

    Raises:
        ValueError: as `image_names`, or a name of a video or audio is no text.
    """
    fields = _known(fields)
    return image_names(fields) + [name for field in _CLIPS if (name := _name(fields, field)) is not None]


def to_sample(fields: Mapping[str, Any], root: Path) -> Sample:
    """Convert a row's fields to a sample. The label and the content of the files are not checked here.

    The sound of a video is its own, unless `audio` names another file or is false, for none. Characters that no model
    accepts are replaced in its texts (`data/text.py`, `clean`).

    Raises:
        ValueError: a field is missing or has the wrong type, the id or a file name is not valid Unicode, there is no
            text, image, video or audio, or a file is outside `root`.
    """
    fields = _known(fields)
    identity = fields.get("id")
    if isinstance(identity, int | float) and not isinstance(identity, bool) and identity % 1 == 0:
        identity = str(int(identity))
    if identity is None or (isinstance(identity, str) and not identity.strip()):
        raise ValueError("id is missing")
    if not isinstance(identity, str):
        raise ValueError(f"id must be text, not {identity!r}")
    names = file_names(fields)
    text = _text(fields, "text") or ""
    if not text.strip() and not names:
        raise ValueError("there is no text, image, video or audio")
    attributes = fields.get("attributes") or {}
    if not isinstance(attributes, dict):
        raise ValueError("attributes must be an object")
    attributes = {name: value for name, value in attributes.items() if value is not None}
    if not all(isinstance(value, str) for value in attributes.values()):
        raise ValueError("attributes must be text")
    attributes = {clean(name): clean(value) for name, value in attributes.items()}
    aspect, rationale, label = _text(fields, "aspect"), _text(fields, "rationale"), fields.get("label")
    if clean(identity) != identity or any(clean(name) != name for name in names):
        raise ValueError("the id or a file name has control characters or is not valid Unicode")
    video, audio = (None if (name := _name(fields, field)) is None else resolve(root, name) for field in _CLIPS)
    return Sample(
        id=identity,
        text=text,
        images=tuple(resolve(root, name) for name in image_names(fields)),
        aspect=(aspect or "").strip() or None,
        label=None if isinstance(label, str) and not label.strip() else label,
        rationale=rationale,
        attributes=attributes,
        video=video,
        audio=None if fields.get("audio") is False else audio or video,
    )


def to_row(sample: Sample, root: Path) -> dict[str, Any]:
    """Convert a sample to the fields of a row, in a fixed order; file names are relative to `root`.

    Raises:
        ValueError: a file is outside `root`.
    """

    def name(path: Path) -> str:
        return path.resolve().relative_to(root.resolve()).as_posix()

    fields: dict[str, Any] = {
        "id": sample.id,
        "text": sample.text,
        "aspect": sample.aspect,
        "label": sample.label,
        "images": [name(path) for path in sample.images],
        "rationale": sample.rationale,
    }
    if sample.video is not None:
        fields["video"] = name(sample.video)
    if sample.audio != sample.video:
        fields["audio"] = False if sample.audio is None else name(sample.audio)
    return {**fields, "attributes": dict(sample.attributes)} if sample.attributes else fields


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSONL file atomically; a number that is not finite is unknown and written as null.

    Raises:
        RunError: the file cannot be written, for example because the disk is full.
    """
    try:
        with atomic_write(path) as file:
            for fields in rows:
                file.write(json.dumps(finite(fields), ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with None for NaN, which is how Python libraries write a missing value."""
    return {name: None if value != value else value for name, value in fields.items()}


def _name(fields: Mapping[str, Any], field: str) -> str | None:
    """The file name in a field; an empty name is none. Raises ValueError if it is no text."""
    name = fields.get(field)
    if field == "audio" and name is False:
        return None
    if name is not None and not isinstance(name, str):
        raise ValueError(f"{field} must be a file name")
    return name if name and name.strip() else None


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {str(value)[:40]!r}")
    return None if value is None else clean(value)
