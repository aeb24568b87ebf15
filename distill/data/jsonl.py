"""Rows of JSON, one post a line: how samples are read and how reasoning data is written.

The fields are the project's vocabulary, which the readers of other layouts speak too: `id`, `text`, `aspect`, `label`,
`images` (a list, or one name as `image`), `rationale`, `attributes`. Image names are relative to the data root.
`row` and `sample` are each other's inverse.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.data.images import resolve
from distill.errors import RunError
from distill.files import atomic_write
from distill.task.sample import Sample


@dataclass(frozen=True)
class Row:
    """One row as it stands in a file: its line (1-based), its fields, and what makes it unreadable, if anything."""

    number: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank with their 1-based numbers; bytes that are not UTF-8 stay, as lone surrogates."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape").rstrip("\r\n")
            if text.strip():
                yield number, text


def read(path: Path) -> Iterator[Row]:
    """Every row of a file; one that is not a JSON object comes with its problem and never stops the others."""
    for number, line in lines(path):
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Row(number, problem=f"is not valid JSON: {error}" if _is_unicode(line) else "is not UTF-8")
        else:
            yield Row(number, fields) if isinstance(fields, dict) else Row(number, problem="is not a JSON object")


def image_names(fields: Mapping[str, Any]) -> list[str]:
    """The images of a row, given as `images` or as one `image`. Raises ValueError for anything else."""
    one, many = fields.get("image"), fields.get("images")
    if one is not None and many is not None:
        raise ValueError("image and images are both given")
    names = many if many is not None else [] if one is None else [one]
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError("images must be file names")
    return names


def sample(fields: Mapping[str, Any], root: Path) -> Sample:
    """The sample of a row; whether its label and its images are good is for others to check.

    Raises:
        ValueError: a field is missing, of another type or not encodable, there is neither text nor image, or an image
            lies outside `root`.
    """
    identity = fields.get("id")
    if isinstance(identity, int) and not isinstance(identity, bool):
        identity = str(identity)
    if not isinstance(identity, str) or not identity.strip():
        raise ValueError("id is missing" if identity in (None, "") else f"id must be text, not {identity!r}")
    names = image_names(fields)
    text = _text(fields, "text") or ""
    if not text.strip() and not names:
        raise ValueError("there is neither text nor image")
    attributes = fields.get("attributes") or {}
    if not isinstance(attributes, dict):
        raise ValueError("attributes must be an object")
    attributes = {name: value for name, value in attributes.items() if value is not None}
    if not all(isinstance(value, str) for value in attributes.values()):
        raise ValueError("attributes must be text")
    aspect, rationale = _text(fields, "aspect"), _text(fields, "rationale")
    if not _is_unicode("".join([identity, text, aspect or "", rationale or "", *names, *attributes.values()])):
        raise ValueError("is not UTF-8")  # or has half a surrogate pair as \ud83d, which no tokenizer takes
    return Sample(
        id=identity,
        text=text,
        images=tuple(resolve(root, name) for name in names),
        aspect=(aspect or "").strip() or None,
        label=fields.get("label"),
        rationale=rationale,
        attributes=attributes,
    )


def row(sample: Sample, root: Path) -> dict[str, Any]:
    """The fields of a sample in their fixed order, images relative to `root`; `attributes` only where there are any.

    Raises:
        ValueError: an image lies outside `root`.
    """
    base = root.resolve()
    fields: dict[str, Any] = {
        "id": sample.id,
        "text": sample.text,
        "aspect": sample.aspect,
        "label": sample.label,
        "images": [path.resolve().relative_to(base).as_posix() for path in sample.images],
        "rationale": sample.rationale,
    }
    return {**fields, "attributes": dict(sample.attributes)} if sample.attributes else fields


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows so that `path` holds either all of them or what it held before.

    Raises:
        RunError: the file cannot be written, for a full disk say.
    """
    try:
        with atomic_write(path) as file:
            for fields in rows:
                file.write(json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {str(value)[:40]!r}")
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
