"""From a recipe's `data` section to checked samples: one reader per layout, one report of what was dropped."""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from distill.data import jsonl, mosi, mvsa, twitter
from distill.data.images import ImageError, decode
from distill.data.postcards import PostcardSettings, generate
from distill.data.split import set_apart
from distill.errors import RunError, SettingsError
from distill.task.labels import LabelSpace
from distill.task.sample import Sample

SPLITS = ("train", "validation", "test")


@dataclass
class DataSettings:
    """Where the posts are, and how they are split."""

    source: Literal["jsonl", "twitter", "mvsa", "mosi", "postcards"] = "jsonl"
    """Layout of the files: jsonl, twitter (TomBERT), mvsa, mosi (continuous labels, which need task.scale), or the
    built-in postcards."""
    root: str = "data"
    """Folder of the data; image paths are resolved inside it and may not leave it."""
    train: list[str] = field(default_factory=lambda: ["train.jsonl"])
    """Files of the training split, below the root; for mvsa labelResultAll.txt. Postcards name their own."""
    validation: list[str] = field(default_factory=list)
    """Files of the validation split; empty: a stratified part of the training rows."""
    test: list[str] = field(default_factory=lambda: ["test.jsonl"])
    """Files of the test split; empty: a stratified part of the training rows."""
    validation_fraction: float = 0.1
    """Share of the training rows that validates, where no validation file is given."""
    test_fraction: float = 0.1
    """Share of the training rows that tests, where no test file is given."""
    seed: int = 42
    """Seed of the stratified split."""
    images: str = "images"
    """Folder of the images, below the root (twitter); jsonl and mosi rows name their images from the root."""
    max_pixels: int = 50_000_000
    """Images with more pixels than this are dropped unread."""
    postcards: PostcardSettings = field(default_factory=PostcardSettings)
    """The built-in corpus, where the source is postcards."""


@dataclass(frozen=True)
class Dropped:
    """A row that was left out: where it stands and why, in one sentence."""

    file: str
    row: int
    id: str
    reason: str


@dataclass
class Corpus:
    """The three splits, and every row that did not make it into one."""

    train: list[Sample]
    validation: list[Sample]
    test: list[Sample]
    dropped: list[Dropped]
    root: Path


@dataclass
class _Entry:
    """A row on its way into a split, until a reason to drop it is found."""

    split: str
    file: str
    row: int
    sample: Sample | None
    id: str
    reason: str | None = None


def read_corpus(settings: DataSettings, labels: LabelSpace) -> Corpus:
    """Read, check and split a corpus. Every image is decoded once; what is wrong with a row drops that row only.

    Raises:
        SettingsError: continuous labels without a scale or a scale without them, a missing file, a file without a
            usable row, or a split that cannot be made.
    """
    check_labels(settings, labels)
    _check_settings(settings)
    if settings.source == "postcards":
        _make_postcards(settings)
    root = Path(settings.root).resolve()
    entries = [_entry(split, file, row, settings, labels) for split, file, row in _rows(settings)]
    broken = _broken_images({image for entry in entries if entry.sample for image in entry.sample.images}, settings)
    first: dict[str, _Entry] = {}
    for entry in entries:
        if entry.sample is not None:
            entry.reason = _refuse(entry.split, entry.sample, broken, first)
            if entry.reason is None:
                first[entry.id] = entry
    _check_files(settings, entries)
    parts = {split: [e.sample for e in entries if e.split == split and e.sample and not e.reason] for split in SPLITS}
    if missing := _missing(settings):
        parts |= set_apart(parts["train"], missing, settings.seed)
    for split in SPLITS:
        if not parts[split]:
            raise SettingsError(
                f"data.{split}: the labelled posts of data.train are too few to set a part aside for it"
            )
    dropped = [Dropped(e.file, e.row, _printable(e.id), _printable(e.reason)) for e in entries if e.reason]
    return Corpus(parts["train"], parts["validation"], parts["test"], dropped, root)


def check_labels(settings: DataSettings, labels: LabelSpace) -> None:
    """Raises SettingsError where labels are numbers and the label space has no scale for them, or the reverse."""
    if settings.source == "mosi" and labels.scale is None:
        raise SettingsError("data.source mosi has continuous labels; task.scale must say how they are cut into bins")
    if settings.source != "mosi" and labels.scale is not None:
        raise SettingsError(f"task.scale needs continuous labels: data.source mosi, not {settings.source}")


def data_fingerprint(settings: DataSettings) -> str:
    """A hash of what the data says: every row of every split file with its texts; of images the names and sizes.

    The same data in another folder has the same fingerprint. Postcards follow from their settings alone.

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


def write_quarantine(path: Path, dropped: Iterable[Dropped]) -> None:
    """Write the dropped rows as JSONL: file, row, id, reason. Raises RunError where that is impossible."""
    jsonl.write_rows(path, (asdict(row) for row in dropped))


def _check_settings(settings: DataSettings) -> None:
    if not _files(settings)["train"]:
        raise SettingsError("data.train names no file")
    missing = _missing(settings)
    for split, fraction in missing.items():
        if not 0 < fraction < 1:
            raise SettingsError(f"data.{split}_fraction must lie between 0 and 1, not be {fraction}")
    if sum(missing.values()) >= 1:
        raise SettingsError("data.validation_fraction and data.test_fraction leave no training rows")


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


def _missing(settings: DataSettings) -> dict[str, float]:
    """The splits without a file, with the share of the training rows that each takes."""
    fractions = {"validation": settings.validation_fraction, "test": settings.test_fraction}
    return {split: fraction for split, fraction in fractions.items() if not _files(settings)[split]}


def _rows(settings: DataSettings) -> Iterator[tuple[str, str, jsonl.Row]]:
    """Every row with the split and the file in which it stands."""
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
    """A row with its sample, or with the reason why it makes none."""
    sample = None
    reason = row.problem
    if reason is None:
        try:
            sample = jsonl.sample(row.fields, Path(settings.root))
            if sample.label is not None:
                labels.index(sample.label)
        except ValueError as error:
            sample, reason = None, str(error)
    identity = row.fields.get("id")
    return _Entry(split, file, row.number, sample, "" if identity is None else str(identity), reason)


def _broken_images(images: set[Path], settings: DataSettings) -> dict[Path, str]:
    """The images that cannot be decoded, and why."""

    def reason(path: Path) -> str | None:
        try:
            decode(path, settings.max_pixels)
        except ImageError as error:
            return str(error)
        return None

    paths = sorted(images)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoders release the interpreter's lock
        return {path: why for path, why in zip(paths, pool.map(reason, paths), strict=True) if why is not None}


def _refuse(split: str, sample: Sample, broken: Mapping[Path, str], first: Mapping[str, _Entry]) -> str | None:
    """Why a well-formed row is dropped all the same."""
    for image in sample.images:
        if image in broken:
            return broken[image]
    if sample.id in first:
        return f"id {sample.id!r} is already that of {first[sample.id].file} row {first[sample.id].row}"
    if split != "train" and sample.label is None:
        return f"has no label, so it cannot be judged in {split}"
    return None


def _check_files(settings: DataSettings, entries: list[_Entry]) -> None:
    """Raise SettingsError for a file of which nothing is left."""
    of_file: dict[tuple[str, str], list[_Entry]] = defaultdict(list)
    for entry in entries:
        of_file[entry.split, entry.file].append(entry)
    for split, files in _files(settings).items():
        for file in files:
            rows = of_file[split, file]
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
    """A reason or an id from hostile rows, fit for one line of UTF-8."""
    return " ".join((text or "").encode("utf-8", "backslashreplace").decode()[:300].split())
