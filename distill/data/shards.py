"""Streaming readers of shards: JSONL, Parquet and WebDataset, row by row, at paths and at URLs of fsspec.

Pictures, videos and sounds that a shard itself contains get a name that says where they are (`media_name`), so that
they can be read again when they are needed (`read_media`).
"""

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, unquote

import pyarrow.parquet as pq

from distill.data.jsonl import Row, parse_line
from distill.data.media_cache import IN_SHARDS
from distill.data.text import decode
from distill.errors import SettingsError
from distill.storage import expected_errors, opened

FIELDS = ("id", "text", "aspect", "label", "image", "images", "video", "audio", "rationale", "attributes")

Keep = Callable[[str, bytes], None]
"""Takes the name and the content of a picture, video or sound that a reader has come across."""

_KINDS = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "gif", "bmp"), "images"),
    **dict.fromkeys(("mp4", "webm", "mkv", "mov", "avi"), "video"),
    **dict.fromkeys(("wav", "mp3", "flac", "ogg", "m4a"), "audio"),
    **dict.fromkeys(("txt", "text"), "text"),
    **dict.fromkeys(("cls", "label"), "label"),
}
_CONTENT = ("text", "image", "images", "video", "audio")
_MAX_TEXT = 16_000_000  # bytes of a text or JSON member of a WebDataset
_MAX_MEDIA = 1_000_000_000  # bytes of another member
_BATCH = 64  # rows of a Parquet file in memory; they may have pictures


def kind(url: str) -> str:
    """`jsonl`, `parquet` or `tar`, by the suffix. Raises SettingsError for another one."""
    name = PurePosixPath(url.split("?")[0]).name.casefold()
    for suffixes, found in (((".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz"), "jsonl"), ((".parquet",), "parquet"),
                            ((".tar",), "tar")):  # fmt: skip
        if name.endswith(suffixes):
            return found
    raise SettingsError(f"{url} is none of JSONL, Parquet and WebDataset: it must end in .jsonl, .parquet or .tar")


def key(name: str) -> str:
    """The folder of a shard's media, from its name relative to the root."""
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def read(url: str, shard: str, keep: Keep, columns: Mapping[str, str]) -> Iterator[Row]:
    """Yield every row of a shard. A row that cannot be read has a `problem`. A row without an id has none here.

    Args:
        shard: `key` of the shard.
        keep: is given the media in the shard, before their row is yielded.
        columns: for our fields, the names that they have in the shard, where these are others.

    Raises:
        SettingsError, RunError: the shard cannot be read, or has no column with posts.
    """
    readers: dict[str, Any] = {"jsonl": _jsonl, "parquet": _parquet, "tar": _tar}
    reader = readers[kind(url)]
    with expected_errors(url):
        for row in reader(url, shard, keep, columns):
            fields = {name: row.fields.get(columns.get(name, name), row.fields.get(name)) for name in FIELDS}
            yield Row(row.number, {n: v for n, v in fields.items() if v is not None}, row.problem, row.encoding)


def read_media(url: str, name: str, keep: Keep) -> None:
    """Read a picture, video or sound in a shard. Others that have to be read with it are kept as well.

    Args:
        name: as a reader gave it.

    Raises:
        SettingsError, RunError: the shard cannot be read.
    """
    _, shard, place = name.split("/")
    with expected_errors(url), opened(url) as file:
        if kind(url) == "tar":
            start, size = map(int, place.partition(".")[0].split("-"))
            file.seek(start)
            keep(name, file.read(min(size, _MAX_MEDIA)))
            return
        group, _, column, _ = place.split(".")
        number = 0
        for batch in pq.ParquetFile(file).iter_batches(_BATCH, row_groups=[int(group)], columns=[unquote(column)]):
            for fields in batch.to_pylist():
                _name_media(fields, shard, f"{group}.{number}", keep)
                number += 1


def _jsonl(url: str, shard: str, keep: Keep, columns: Mapping[str, str]) -> Iterator[Row]:
    with opened(url, "infer") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield parse_line(number, *decode(line.rstrip(b"\r\n")))


def _parquet(url: str, shard: str, keep: Keep, columns: Mapping[str, str]) -> Iterator[Row]:
    with opened(url) as file:
        try:
            source = pq.ParquetFile(file)
        except ValueError as error:  # pyarrow's ArrowInvalid
            raise SettingsError(f"{url} is not a Parquet file: {error}") from None
        names = read_columns(source.schema_arrow.names, columns)
        if not {name for own in _CONTENT for name in (own, columns.get(own))} & set(names):
            given = ", ".join(source.schema_arrow.names) or "none"
            raise SettingsError(
                f"{url} has no column text, image, images, video or audio; its columns are {given}; "
                "data.stream.columns names others"
            )
        labels = _label_names(source.schema_arrow.metadata, label := columns.get("label", "label"))
        number = 0
        for group in range(source.num_row_groups):
            first = number
            for batch in source.iter_batches(_BATCH, row_groups=[group], columns=names):
                for fields in batch.to_pylist():
                    if labels and isinstance(index := fields.get(label), int):
                        fields[label] = labels[index] if 0 <= index < len(labels) else None  # -1: it has none
                    yield Row(number + 1, _name_media(fields, shard, f"{group}.{number - first}", keep))
                    number += 1


def _label_names(metadata: Mapping[bytes, bytes] | None, column: str) -> list[str]:
    """The names of labels that a file written by `datasets` has as numbers (ClassLabel); empty for others."""
    try:
        found: list[str] = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
    except (ValueError, LookupError, TypeError):
        return []
    return found


def read_columns(names: Sequence[str], columns: Mapping[str, str]) -> list[str]:
    """Those of a shard's columns that are read, in order."""
    wanted = {*FIELDS, *columns.values()}
    return [name for name in names if name in wanted]


def parquet_columns(url: str, columns: Mapping[str, str]) -> list[str]:
    """The columns of a Parquet shard that are read. Raises SettingsError, RunError: it cannot be read."""
    with expected_errors(url), opened(url) as file:
        try:
            return read_columns(pq.ParquetFile(file).schema_arrow.names, columns)
        except ValueError as error:
            raise SettingsError(f"{url} is not a Parquet file: {error}") from None


def _name_media(fields: dict[str, Any], shard: str, place: str, keep: Keep) -> dict[str, Any]:
    """The fields of a row with names instead of cells with the bytes of files, as `datasets` writes them."""

    def named(cell: Any, column: str, index: int) -> Any:
        content = cell.get("bytes") if isinstance(cell, Mapping) else cell
        if isinstance(content, bytes):
            keep(name := f"{IN_SHARDS}/{shard}/{place}.{_quoted(column)}.{index}", content)
            return name
        return cell.get("path") if isinstance(cell, Mapping) and cell.keys() == {"bytes", "path"} else cell

    for column, value in fields.items():
        if isinstance(value, Mapping | bytes):
            fields[column] = named(value, column, 0)
        elif isinstance(value, list):
            fields[column] = [named(item, column, index) for index, item in enumerate(value)]
    return fields


def _quoted(column: str) -> str:
    """The name of a column as a part of a file's name, without dots."""
    return quote(column, safe="").replace(".", "%2E")


def _tar(url: str, shard: str, keep: Keep, columns: Mapping[str, str]) -> Iterator[Row]:
    """The rows of a WebDataset: files that follow each other and have the same name up to the first dot."""
    try:
        with opened(url) as file, tarfile.open(fileobj=file, mode="r|") as members:
            post: _Post | None = None
            for member in members:
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if not member.isfile() or not stem:
                    continue
                name = f"{folder}/{stem}".lstrip("/")
                if post is None or post.key != name:
                    if post is not None:
                        yield post.row()
                    post = _Post(name, 1 if post is None else post.number + 1)
                try:
                    post.add(members, member, suffix.casefold(), shard, keep)
                except (ValueError, RecursionError) as error:
                    post.problem = f"{member.name}: {error}"
            if post is not None:
                yield post.row()
    except tarfile.TarError as error:
        raise SettingsError(f"{url} is not a complete tar file: {error}") from None


class _Post:
    """A row of a WebDataset, of which the files are added."""

    def __init__(self, key: str, number: int) -> None:
        self.key, self.number = key, number
        self.fields: dict[str, Any] = {"id": key}
        self.media: dict[str, Any] = {}
        self.problem: str | None = None

    def row(self) -> Row:
        if self.problem is not None:
            return Row(self.number, problem=self.problem)
        given = {name: value for name, value in self.fields.items() if name != "image" or "images" not in self.media}
        return Row(self.number, given | self.media)

    def add(self, members: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, shard: str, keep: Keep) -> None:
        """Add a file; one with an unknown suffix is ignored. Raises ValueError if it cannot be used."""
        suffix = suffix.rpartition(".")[2]
        kind = "fields" if suffix == "json" else _KINDS.get(suffix)
        if kind is None:
            return
        is_text = kind in ("fields", "text", "label")
        if member.size > (_MAX_TEXT if is_text else _MAX_MEDIA):
            raise ValueError(f"has {member.size:,} bytes, too many")
        source = members.extractfile(member)
        content = b"" if source is None else source.read()
        if kind == "fields":
            parsed = json.loads(content)
            if not isinstance(parsed, dict):
                raise ValueError("is not a JSON object")
            self.fields |= parsed
        elif is_text:
            self.fields[kind] = decode(content)[0].strip()
        else:
            keep(name := f"{IN_SHARDS}/{shard}/{member.offset_data}-{member.size}.{suffix}", content)
            self.media[kind] = [*self.media.get(kind, []), name] if kind == "images" else name
