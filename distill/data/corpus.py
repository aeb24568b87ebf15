"""The corpus of a recipe's `data` section: reading, validation, splitting, and the list of dropped rows."""

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from distill.data import jsonl
from distill.data.built_in import BuiltIn
from distill.data.clips import ClipError, ClipReader
from distill.data.images import ImageError, decode
from distill.data.source import CONTINUOUS, PARTS, SPLITS, DataSettings, built_in, read_rows, split_files
from distill.data.split import stratified_split
from distill.data.text import clean
from distill.errors import RunError, SettingsError
from distill.task.labels import LabelSpace
from distill.task.sample import Sample

log = logging.getLogger(__name__)

_File = tuple[str, Path]


@dataclass(frozen=True)
class Dropped:
    """A dropped row: its file, 1-based row number and id, and the reason."""

    file: str
    row: int
    id: str
    reason: str


@dataclass
class Corpus:
    """The three splits, the dropped rows, and the data root.

    Attributes:
        train: of source stream `StoredPosts`, which are not in memory.
        teacher: further labelled posts, on which only the teacher is trained.
        places: file and row of each post, by the split of the file and the id.
        unlisted: number of dropped rows of a stream besides `dropped`.
        longest: bytes of the longest text of a stream's training posts.
    """

    train: Sequence[Sample]
    validation: list[Sample]
    test: list[Sample]
    dropped: list[Dropped]
    root: Path
    places: Mapping[tuple[str, str], tuple[str, int]] = field(default_factory=dict)
    teacher: list[Sample] = field(default_factory=list)
    unlisted: int = 0
    longest: int = 0

    def dropped_summary(self, report: Path) -> tuple[str, str, int, str]:
        """How many rows are dropped and where they are listed; file, row and reason of the first of them."""
        first, total = self.dropped[0], len(self.dropped) + self.unlisted
        some = f"; {len(self.dropped)} of them are" if self.unlisted else " and"
        return f"{total} rows are dropped{some} listed in {report}; the first:", first.file, first.row, first.reason


@dataclass
class Entry:
    """A row with its sample, or with the reason to drop it.

    Attributes:
        replaced: number of characters of the row's texts that `clean` replaced.
    """

    split: str
    file: str
    row: int
    sample: Sample | None
    id: str
    reason: str | None = None
    encoding: str = "utf-8"
    replaced: int = 0


def read_corpus(settings: DataSettings, labels: LabelSpace) -> Corpus:
    """Read, validate and split a corpus. An invalid row is dropped; the others are kept.

    Every image is decoded once; of every clip the packets are read, and its first frame and sound are decoded.

    Raises:
        SettingsError: the source and `task.scale` do not fit, a file is missing or has no usable row, or a split cannot
            be drawn.
        RunError: the built-in corpus cannot be written.
    """
    check_labels(settings, labels)
    _check_settings(settings)
    if settings.source == "stream":
        from distill.data.stream_corpus import read_streamed  # which is built on this module

        return read_streamed(settings, labels)
    if built_in_corpus := built_in(settings):
        _generate(built_in_corpus, settings.root)
    root = Path(settings.root).resolve()
    entries = [read_entry(split, file, row, root, labels) for split, file, row in read_rows(settings)]
    check_entries(entries, settings, root, {})
    log_repairs(entries)
    check_files(split_files(settings), entries)
    parts: dict[str, list[Sample]] = {split: [] for split in PARTS}
    for entry in entries:
        if entry.sample and not entry.reason:
            parts[entry.split].append(entry.sample)
    if missing := _splits_to_draw(settings):
        parts |= stratified_split(parts["train"], missing, settings.seed)
    for split in SPLITS:
        if not parts[split]:
            raise SettingsError(
                f"data.{split}: data.train has too few labelled posts to draw this split from; name a file instead"
            )
    places = {(e.split, e.id): (e.file, e.row) for e in entries if not e.reason}
    dropped = dropped_rows(entries)
    return Corpus(parts["train"], parts["validation"], parts["test"], dropped, root, places, parts["teacher"])


def dropped_rows(entries: Iterable[Entry]) -> list[Dropped]:
    """The rows with a reason to drop them; one whose split is unknown is read for each split that names the file."""
    return list(
        dict.fromkeys(Dropped(e.file, e.row, printable(e.id), printable(e.reason)) for e in entries if e.reason)
    )


def check_entries(entries: Sequence[Entry], settings: DataSettings, root: Path, kept: dict[str, list[Entry]]) -> None:
    """Decode the files of rows, and set the `reason` of those that are dropped.

    Args:
        kept: the rows that are kept, by id; those of `entries` are added.
    """
    files = {file for entry in entries if entry.sample for file in _files(entry.sample)}
    broken, silent = _check_media(files, settings, root)
    for entry in entries:
        if entry.sample is not None:
            if entry.sample.audio == entry.sample.video and entry.sample.audio in silent:
                entry.sample = entry.sample.without("audio")
            entry.reason = _drop_reason(entry, entry.sample, broken, kept.get(entry.id, []))
            if entry.reason is None:
                kept.setdefault(entry.id, []).append(entry)


def check_labels(settings: DataSettings, labels: LabelSpace) -> None:
    """Raise SettingsError if labels are continuous and the label space has no scale, or the reverse."""
    source = settings.source
    if source == "stream":  # has both
        return
    if source in CONTINUOUS and labels.scale is None:
        raise SettingsError(f"data.source {source} has continuous labels: add task.scale, which divides them into bins")
    if source not in CONTINUOUS and labels.scale is not None:
        raise SettingsError(f"task.scale needs continuous labels: data.source {' or '.join(CONTINUOUS)}, not {source}")


def write_quarantine(path: Path, dropped: Iterable[Dropped]) -> None:
    """Write the dropped rows as JSONL with file, row, id and reason. Raises RunError if the file cannot be written."""
    jsonl.write_rows(path, (asdict(row) for row in dropped))


def _check_settings(settings: DataSettings) -> None:
    if not split_files(settings)["train"]:
        raise SettingsError("data.train is empty; name at least one file")
    missing = _splits_to_draw(settings)
    for split, fraction in missing.items():
        if fraction == 0:
            raise SettingsError(f"data.{split}_fraction is 0; it takes more than 0 if data.{split} is empty")
    if sum(missing.values()) >= 1:
        raise SettingsError("data.validation_fraction and data.test_fraction must sum to less than 1")


def _generate(corpus: BuiltIn, root: str) -> None:
    try:
        corpus.generate(root)
    except FileExistsError as error:
        raise SettingsError(str(error)) from error
    except OSError as error:
        raise RunError(f"cannot write the {corpus.name} to {root}: {error.strerror or error}") from error


def _splits_to_draw(settings: DataSettings) -> dict[str, float]:
    """The splits without a file, with the fraction of the training rows that each takes."""
    fractions = {"validation": settings.validation_fraction, "test": settings.test_fraction}
    return {split: fraction for split, fraction in fractions.items() if not split_files(settings)[split]}


def read_entry(split: str, file: str, row: jsonl.Row, root: Path, labels: LabelSpace) -> Entry:
    """Convert a row to an entry with a sample, or with the reason why it has none."""
    sample = None
    reason = row.problem
    if reason is None:
        try:
            sample = jsonl.to_sample(row.fields, root)
            if sample.label is not None:
                sample = replace(sample, label=labels.from_data(sample.label))  # type: ignore[arg-type]
                labels.index(sample.label)
        except ValueError as error:
            sample, reason = None, str(error)
    identity = row.fields.get("id", "") if sample is None else sample.id
    identity = "" if identity is None else str(identity)
    replaced = 0 if sample is None else sum(map(_replaced_characters, row.fields.values()))
    return Entry(split, file, row.number, sample, identity, reason, row.encoding, replaced)


def _replaced_characters(value: Any) -> int:
    """The number of characters of a field that `clean` replaces."""
    return sum(a != b for a, b in zip(value, clean(value), strict=True)) if isinstance(value, str) else 0


def log_repairs(entries: list[Entry]) -> None:
    """Log the rows that are not UTF-8, the rows with replaced characters, and the rows that repeat another split."""
    recoded = [entry for entry in entries if entry.encoding != "utf-8"]
    repaired = [entry for entry in entries if entry.replaced]
    leaked = [entry for entry in entries if (entry.reason or "").endswith(_LEAKED)]
    counts = Counter(entry.encoding for entry in recoded).most_common()
    encodings = ", ".join(f"{count} as {encoding}" for encoding, count in counts)
    replaced = sum(entry.replaced for entry in repaired)
    for rows, message in (
        (recoded, f"{len(recoded)} texts are not UTF-8 and are read by their content: {encodings}"),
        (repaired, f"{replaced} control, private-use or invalid characters in {len(repaired)} rows are replaced"),
        (leaked, f"{len(leaked)} posts repeat a post of another split and are dropped from the later one"),
    ):
        if rows:
            log.warning("data: %s; the first: %s row %d", message, rows[0].file, rows[0].row)


def _files(sample: Sample) -> list[_File]:
    """The files of a sample, each with its kind. The sound of a video is checked with it."""
    files = [("image", path) for path in sample.images]
    files += [("video", sample.video)] if sample.video is not None else []
    return files + ([("audio", sample.audio)] if sample.audio is not None and sample.audio != sample.video else [])


def _check_media(files: set[_File], settings: DataSettings, root: Path) -> tuple[dict[_File, str], set[Path]]:
    """The files that cannot be decoded, with the reasons, which name them relative to `data.root`; silent videos."""
    clips, silent = ClipReader(settings.video), set()

    def error_of(file: _File) -> str | None:
        kind, path = file
        name = os.path.relpath(path, root)
        try:
            if kind == "image":
                decode(path, settings.max_pixels, name)
            elif not clips.check(path, name, video=kind == "video"):
                silent.add(path)
        except (ImageError, ClipError) as error:
            return str(error)
        return None

    found = sorted(files)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoders release the GIL
        errors = zip(found, pool.map(error_of, found), strict=True)
        return {file: error for file, error in errors if error is not None}, silent


_LEAKED = "with the same content"


def _drop_reason(entry: Entry, sample: Sample, broken: Mapping[_File, str], same_id: list[Entry]) -> str | None:
    """Why a well-formed row is dropped; None if it is kept.

    Every split may number its posts from 1, so rows of two splits may have the same id unless they are the same post.

    Args:
        same_id: the rows with the same id that are kept.
    """
    for file in _files(sample):
        if file in broken:
            return broken[file]
    for first in same_id:
        if first.split == entry.split:
            return f"id {sample.id!r} is already used by {first.file} row {first.row}"
        if _content(first.sample) == _content(sample):
            return f"id {sample.id!r} is already used by {first.file} row {first.row} {_LEAKED}"
    if entry.split != "train" and sample.label is None:
        return f"has no label, which every row of data.{entry.split} needs"
    return None


def _content(sample: Sample | None) -> tuple[Any, ...]:
    return () if sample is None else (sample.text.split(), sample.media, sample.aspect)


def check_files(files_of: Mapping[str, Sequence[str]], entries: list[Entry]) -> None:
    """Raise SettingsError for a file without a usable row."""
    by_file: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        by_file[entry.split, entry.file].append(entry)
    for split, files in files_of.items():
        for file in files:
            rows = by_file[split, file]
            if not rows:
                raise SettingsError(f"data.{split}: {file} has no rows")
            if all(row.reason for row in rows):
                reason = printable(rows[0].reason)
                raise SettingsError(
                    f"data.{split}: none of the {len(rows)} rows of {file} can be used; row {rows[0].row}: {reason}"
                )


def printable(text: str | None) -> str:
    """A reason or an id from an untrusted row, as one line of valid UTF-8 with at most 300 characters."""
    return " ".join((text or "").encode("utf-8", "backslashreplace").decode()[:300].split())
