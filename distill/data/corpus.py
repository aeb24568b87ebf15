"""The corpus of a recipe's `data` section: reading, validation, splitting, and the list of dropped rows."""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from distill.data import jsonl, mosi, mvsa, twitter
from distill.data.images import ImageError, decode
from distill.data.postcards import PostcardSettings, generate, is_generated
from distill.data.split import stratified_split
from distill.digests import Digests, combine
from distill.errors import RunError, SettingsError
from distill.task.labels import LabelSpace
from distill.task.sample import Sample

SPLITS = ("train", "validation", "test")


@dataclass
class DataSettings:
    """The data: source, files and splits."""

    source: Literal["jsonl", "twitter", "mvsa", "mosi", "postcards"] = "jsonl"
    """Layout of the files: jsonl, twitter (TomBERT), mvsa, mosi (continuous labels; requires task.scale), or postcards
    (the built-in corpus, generated into data.root)."""
    root: str = "data"
    """Folder of the data. Images outside it are rejected."""
    train: list[str] = field(default_factory=lambda: ["train.jsonl"])
    """Files of the training split, relative to data.root; for mvsa: labelResultAll.txt. Ignored for postcards."""
    validation: list[str] = field(default_factory=list)
    """Files of the validation split; empty: a stratified part of the training rows is used."""
    test: list[str] = field(default_factory=lambda: ["test.jsonl"])
    """Files of the test split; empty: a stratified part of the training rows is used."""
    validation_fraction: float = 0.1
    """Fraction of the training rows used for validation if data.validation is empty."""
    test_fraction: float = 0.1
    """Fraction of the training rows used for testing if data.test is empty."""
    seed: int = 42
    """Seed of the stratified split."""
    images: str = "images"
    """Folder of the images of source twitter, relative to data.root. Image names in jsonl and mosi rows are relative to
    data.root itself."""
    max_pixels: int = 50_000_000
    """Maximum number of pixels of an image. Rows with a larger image are dropped; the image is not decoded."""
    postcards: PostcardSettings = field(default_factory=PostcardSettings)
    """The built-in corpus, used if data.source is postcards."""


@dataclass(frozen=True)
class Dropped:
    """A dropped row: its file, 1-based row number and id, and the reason."""

    file: str
    row: int
    id: str
    reason: str


@dataclass
class Corpus:
    """The three splits, the dropped rows, and the data root."""

    train: list[Sample]
    validation: list[Sample]
    test: list[Sample]
    dropped: list[Dropped]
    root: Path


@dataclass
class _Entry:
    """A row with its sample, or with the reason to drop it."""

    split: str
    file: str
    row: int
    sample: Sample | None
    id: str
    reason: str | None = None


def read_corpus(settings: DataSettings, labels: LabelSpace) -> Corpus:
    """Read, validate and split a corpus. Every image is decoded once. An invalid row is dropped; the others are kept.

    Raises:
        SettingsError: the source and `task.scale` do not fit, a file is missing or has no usable row, or a split cannot
            be drawn.
        RunError: the postcards cannot be written.
    """
    check_labels(settings, labels)
    _check_settings(settings)
    if settings.source == "postcards":
        _make_postcards(settings)
    root = Path(settings.root).resolve()
    entries = [_entry(split, file, row, settings, labels) for split, file, row in _rows(settings)]
    broken = _broken_images({image for entry in entries if entry.sample for image in entry.sample.images}, settings)
    first_with_id: dict[str, _Entry] = {}
    for entry in entries:
        if entry.sample is not None:
            entry.reason = _drop_reason(entry.split, entry.sample, broken, first_with_id)
            if entry.reason is None:
                first_with_id[entry.id] = entry
    _check_files(settings, entries)
    parts = {split: [e.sample for e in entries if e.split == split and e.sample and not e.reason] for split in SPLITS}
    if missing := _splits_to_draw(settings):
        parts |= stratified_split(parts["train"], missing, settings.seed)
    for split in SPLITS:
        if not parts[split]:
            raise SettingsError(
                f"data.{split}: data.train has too few labelled posts to draw this split from; name a file instead"
            )
    dropped = [Dropped(e.file, e.row, _printable(e.id), _printable(e.reason)) for e in entries if e.reason]
    return Corpus(parts["train"], parts["validation"], parts["test"], dropped, root)


def check_labels(settings: DataSettings, labels: LabelSpace) -> None:
    """Raise SettingsError if labels are continuous and the label space has no scale, or the reverse."""
    if settings.source == "mosi" and labels.scale is None:
        raise SettingsError("data.source mosi has continuous labels: add task.scale, which divides them into bins")
    if settings.source != "mosi" and labels.scale is not None:
        raise SettingsError(f"task.scale needs continuous labels: data.source mosi, not {settings.source}")


def data_fingerprint(settings: DataSettings) -> str:
    """Hash of the data: every row of every split file, and the names and sizes of the images.

    The same data in another folder has the same fingerprint. The fingerprint of postcards is that of their settings.

    Raises:
        SettingsError: a split file is missing.
    """
    if settings.source == "postcards":
        return hashlib.sha256(repr(settings.postcards).encode()).hexdigest()
    digest = hashlib.sha256()
    sizes: dict[str, int] = {}
    for split, file, row in _rows(settings):
        try:
            names = jsonl.image_names(row.fields)
        except ValueError:
            names = []
        for name in names:
            if name not in sizes:
                sizes[name] = _size(Path(settings.root, name))
        content = [split, file, row.number, row.fields, row.problem, [sizes[name] for name in names]]
        digest.update(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()


def data_digest(settings: DataSettings, digests: Digests) -> str | None:
    """Digest of the data that `data_fingerprint` leaves out: the content of the images, and the rows of postcards.

    None if the postcards are not generated yet.

    Raises:
        SettingsError: a split file is missing.
    """
    root = Path(settings.root)
    if settings.source == "postcards" and not is_generated(root, settings.postcards):
        return None
    rows, names = [], set()
    for split, file, row in _rows(settings):
        if settings.source == "postcards":
            rows.append([split, file, row.number, row.fields, row.problem])
        with suppress(ValueError):
            names |= set(jsonl.image_names(row.fields))
    found = digests.files(root / name for name in names)
    images = {name: found[root / name] for name in sorted(names)}
    return combine([rows, images])


def write_quarantine(path: Path, dropped: Iterable[Dropped]) -> None:
    """Write the dropped rows as JSONL with file, row, id and reason. Raises RunError if the file cannot be written."""
    jsonl.write_rows(path, (asdict(row) for row in dropped))


def _check_settings(settings: DataSettings) -> None:
    if not _files(settings)["train"]:
        raise SettingsError("data.train is empty; name at least one file")
    missing = _splits_to_draw(settings)
    for split, fraction in missing.items():
        if not 0 < fraction < 1:
            raise SettingsError(f"data.{split}_fraction is {fraction}; it takes a number above 0 and below 1")
    if sum(missing.values()) >= 1:
        raise SettingsError("data.validation_fraction and data.test_fraction must sum to less than 1")


def _make_postcards(settings: DataSettings) -> None:
    try:
        generate(settings.root, settings.postcards)
    except FileExistsError as error:
        raise SettingsError(str(error)) from error
    except OSError as error:
        raise RunError(f"cannot write the postcards to {settings.root}: {error.strerror or error}") from error


def _files(settings: DataSettings) -> dict[str, list[str]]:
    if settings.source == "postcards":
        return {split: [f"{split}.jsonl"] for split in SPLITS}
    return {"train": settings.train, "validation": settings.validation, "test": settings.test}


def _splits_to_draw(settings: DataSettings) -> dict[str, float]:
    """The splits without a file, with the fraction of the training rows that each takes."""
    fractions = {"validation": settings.validation_fraction, "test": settings.test_fraction}
    return {split: fraction for split, fraction in fractions.items() if not _files(settings)[split]}


def _rows(settings: DataSettings) -> Iterator[tuple[str, str, jsonl.Row]]:
    """Every row with its split and file."""
    for split, files in _files(settings).items():
        for file in files:
            try:
                for row in _read(settings, split, file):
                    yield split, file, row
            except OSError as error:
                path = Path(settings.root, file)
                raise SettingsError(f"data.{split}: cannot read {path}: {error.strerror or error}") from error


def _read(settings: DataSettings, split: str, file: str) -> Iterator[jsonl.Row]:
    root = Path(settings.root).resolve()
    match settings.source:
        case "twitter":
            return twitter.read(root / file, settings.images)
        case "mvsa":
            return mvsa.read(root / file, root)
        case "mosi":
            return mosi.read(root / file, split)
        case "jsonl" | "postcards":
            return jsonl.read(root / file)


def _entry(split: str, file: str, row: jsonl.Row, settings: DataSettings, labels: LabelSpace) -> _Entry:
    """Convert a row to an entry with a sample, or with the reason why it has none."""
    sample = None
    reason = row.problem
    if reason is None:
        try:
            sample = jsonl.to_sample(row.fields, Path(settings.root))
            if sample.label is not None:
                labels.index(sample.label)
        except ValueError as error:
            sample, reason = None, str(error)
    identity = row.fields.get("id")
    return _Entry(split, file, row.number, sample, "" if identity is None else str(identity), reason)


def _broken_images(images: set[Path], settings: DataSettings) -> dict[Path, str]:
    """The images that cannot be decoded, with the reasons."""

    def error_of(path: Path) -> str | None:
        try:
            decode(path, settings.max_pixels)
        except ImageError as error:
            return str(error)
        return None

    paths = sorted(images)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoders release the GIL
        return {path: error for path, error in zip(paths, pool.map(error_of, paths), strict=True) if error is not None}


def _drop_reason(
    split: str, sample: Sample, broken: Mapping[Path, str], first_with_id: Mapping[str, _Entry]
) -> str | None:
    """Why a well-formed row is dropped; None if it is kept."""
    for image in sample.images:
        if image in broken:
            return broken[image]
    if (first := first_with_id.get(sample.id)) is not None:
        return f"id {sample.id!r} is already used by {first.file} row {first.row}"
    if split != "train" and sample.label is None:
        return f"has no label, which every row of the {split} split needs"
    return None


def _check_files(settings: DataSettings, entries: list[_Entry]) -> None:
    """Raise SettingsError for a file without a usable row."""
    by_file: dict[tuple[str, str], list[_Entry]] = defaultdict(list)
    for entry in entries:
        by_file[entry.split, entry.file].append(entry)
    for split, files in _files(settings).items():
        for file in files:
            rows = by_file[split, file]
            if not rows:
                raise SettingsError(f"data.{split}: {file} has no rows")
            if all(row.reason for row in rows):
                reason = _printable(rows[0].reason)
                raise SettingsError(
                    f"data.{split}: none of the {len(rows)} rows of {file} can be used; row {rows[0].row}: {reason}"
                )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return -1


def _printable(text: str | None) -> str:
    """A reason or an id from an untrusted row, as one line of valid UTF-8 with at most 300 characters."""
    return " ".join((text or "").encode("utf-8", "backslashreplace").decode()[:300].split())
