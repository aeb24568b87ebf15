"""The corpus of source `stream`: an index of the training posts on this machine, the other splits in memory."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

from distill.data.corpus import (
    Corpus,
    Dropped,
    Entry,
    check_entries,
    check_files,
    dropped_rows,
    log_repairs,
    printable,
    read_entry,
)
from distill.data.jsonl import Row
from distill.data.source import PARTS, DataSettings, stream_source
from distill.data.stream import VERSION, Index, Source
from distill.data.tables import number
from distill.errors import SettingsError
from distill.task.labels import LabelSpace
from distill.task.sample import Sample

_CHUNK = 256  # rows whose media are decoded at the same time


def read_streamed(settings: DataSettings, labels: LabelSpace) -> Corpus:
    """Read and check a streamed corpus; the training split only if its index is missing.

    The rows of a later split that repeat one of another are dropped from it; of the training split, those that repeat a
    row of the others.

    Raises:
        SettingsError: validation or test have no file, a shard is missing or has no usable row.
        RunError: a store does not answer.
    """
    for split in ("validation", "test"):
        if not getattr(settings, split):
            raise SettingsError(f"data.{split} is empty; with data.source stream it takes at least one file")
    source = stream_source(settings)
    root = source.media()
    entries = [
        _entry(split, file, row, root, labels)
        for split in PARTS[1:]
        for file, row in source.rows(split)
    ]  # fmt: skip
    kept: dict[str, list[Entry]] = {}
    check_entries(entries, settings, root, kept)
    log_repairs(entries)
    check_files({split: [shard.name for shard in source.shards[split]] for split in PARTS[1:]}, entries)
    parts: dict[str, list[Sample]] = {split: [] for split in PARTS}
    for entry in entries:
        if entry.sample and not entry.reason:
            parts[entry.split].append(entry.sample)
    checks = [VERSION, settings.max_pixels, asdict(settings.video), labels.names, repr(labels.scale)]
    name = hashlib.sha256(json.dumps(checks).encode()).hexdigest()[:8]
    index = Index(source.folder() / f"index-{name}")
    if not index.exists:
        index.write(_chunks(source, settings, root, labels, kept), root)
    found = index.summary
    dropped = [Dropped(**row | {name: printable(row[name]) for name in ("id", "reason")}) for row in found["listed"]]
    places = {(e.split, e.id): (e.file, e.row) for e in entries if not e.reason}
    return Corpus(
        index.posts(root), parts["validation"], parts["test"], dropped + dropped_rows(entries), root, places,
        parts["teacher"], found["dropped"] - len(dropped), found["longest"],
    )  # fmt: skip


def _entry(split: str, file: str, row: Row, root: Path, labels: LabelSpace) -> Entry:
    """An entry whose label is a number if labels are on a scale."""
    if labels.scale is not None and row.problem is None:
        try:
            row = replace(row, fields={**row.fields, "label": number(row.fields.get("label"))})
        except ValueError as error:
            row = replace(row, problem=str(error))
    return read_entry(split, file, row, root, labels)


def _chunks(
    source: Source, settings: DataSettings, root: Path, labels: LabelSpace, others: Mapping[str, list[Entry]]
) -> Iterator[Sequence[Entry]]:
    """The checked rows of the training split, in their order."""
    rows = source.rows("train")
    while chunk := [_entry("train", file, row, root, labels) for file, row in islice(rows, _CHUNK)]:
        check_entries(chunk, settings, root, {e.id: list(others[e.id]) for e in chunk if e.id in others})
        yield chunk
