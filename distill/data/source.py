"""The files of a recipe's `data` section: their rows, and digests of their content."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from distill.data import clips_corpus, jsonl, meld, mmsa, mosi, mvsa, postcards, twitter
from distill.data.built_in import BuiltIn
from distill.data.clips import VideoSettings
from distill.data.clips_corpus import ClipsSettings
from distill.data.postcards import PostcardSettings
from distill.data.stream import Source, StreamSettings
from distill.digests import Digests, combine
from distill.errors import RunError, SettingsError
from distill.settings import Count, Range, Seed, Settings
from distill.task.sample import MODALITIES

SPLITS = ("train", "validation", "test")
PARTS = (*SPLITS, "teacher")
"""The splits, and the posts of the teacher alone."""

CONTINUOUS = ("mosi", "mmsa", "clips")
"""The sources whose labels are values on a scale: they take task.scale, and no other source does."""

Part = Annotated[float, Range(0, 1, below=True)]


@dataclass
class DataSettings(Settings):
    """The data: source, files and splits."""

    source: Literal["jsonl", "twitter", "mvsa", "mosi", "mmsa", "meld", "postcards", "clips", "stream"] = "jsonl"
    """Layout of the files: jsonl, twitter (TomBERT), mvsa, mosi (continuous labels; requires task.scale), mmsa (MOSI,
    MOSEI and CH-SIMS as MMSA stores them; continuous labels, too), meld, or a built-in corpus, generated into
    data.root: postcards, or clips (videos with sound; continuous labels); or stream: shards of data that does not fit
    in memory, as JSONL, Parquet or WebDataset."""
    root: str = "data"
    """Folder of the data; for stream also a URL, such as s3://bucket/posts. Images, videos and sounds outside it are
    rejected."""
    train: list[str] = field(default_factory=lambda: ["train.jsonl"])
    """Files of the training split, relative to data.root; for mvsa: labelResultAll.txt; for mmsa: label.csv, for all
    three splits; for stream: paths, URLs, patterns such as train-*.parquet, or hub:owner/name. Built-in corpora ignore
    it."""
    validation: list[str] = field(default_factory=list)
    """Files of the validation split; empty: a stratified part of the training rows is used."""
    test: list[str] = field(default_factory=lambda: ["test.jsonl"])
    """Files of the test split; empty: a stratified part of the training rows is used."""
    teacher: list[str] = field(default_factory=list)
    """Files with further labelled posts, on which only the teacher section trains: what the teacher knows besides the
    training split."""
    validation_fraction: Part = 0.1
    """Fraction of the training rows used for validation if data.validation is empty."""
    test_fraction: Part = 0.1
    """Fraction of the training rows used for testing if data.test is empty."""
    seed: Seed = 42
    """Seed of the stratified split."""
    images: str = "images"
    """Folder of the images of source twitter, relative to data.root. Image names in jsonl and mosi rows are relative to
    data.root itself."""
    max_pixels: Count = 50_000_000
    """Maximum number of pixels of an image. Rows with a larger image are dropped; the image is not decoded."""
    label_column: str | None = None
    """Column with the labels of mmsa (label, label_T, label_A or label_V) and meld (Sentiment or Emotion); null: the
    first of these."""
    max_tokens: Count | None = None
    """Maximum number of tokens of a post's text, counted by the tokenizer of the model that the recipe trains; null:
    half of the model's context, at most 4,096."""
    too_long: Literal["truncate", "quarantine"] = "truncate"
    """Posts above data.max_tokens: `truncate` cuts the end of the text, `quarantine` drops the post. Both list the
    ids."""
    drop_modality: dict[str, float] = field(default_factory=dict)
    """Augmentation for posts that lack something: the probability with which a training leaves out the text, images,
    video or audio of a post, drawn anew in each epoch, such as `{audio: 0.2, video: 0.2}`. One of them is always left.
    Without it, the post is trained on its label only: its rationale may be about what was left out."""
    video: VideoSettings = field(default_factory=VideoSettings)
    """Sampling of videos, and limits of videos and sounds."""
    postcards: PostcardSettings = field(default_factory=PostcardSettings)
    """The built-in corpus of pictures, used if data.source is postcards."""
    clips: ClipsSettings = field(default_factory=ClipsSettings)
    """The built-in corpus of videos, used if data.source is clips."""
    stream: StreamSettings = field(default_factory=StreamSettings)
    """Reading of shards, used if data.source is stream."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [name for name in self.drop_modality if name not in MODALITIES]:
            raise SettingsError(f"drop_modality.{unknown[0]} is no modality; they are {', '.join(MODALITIES)}")
        for name, probability in self.drop_modality.items():
            if problem := Range(0, 1, below=True).problem(probability):
                raise SettingsError(f"drop_modality.{name} {problem}")


def built_in(settings: DataSettings) -> BuiltIn | None:
    """The built-in corpus that the source names; None if the files are given."""
    match settings.source:
        case "postcards":
            return postcards.corpus(settings.postcards)
        case "clips":
            return clips_corpus.corpus(settings.clips)
        case _:
            return None


def split_files(settings: DataSettings) -> dict[str, list[str]]:
    """The files of each split and of the teacher's posts, relative to the root."""
    if corpus := built_in(settings):
        return {part: [f"{part}.jsonl"] if part in corpus.counts else [] for part in PARTS}
    files = {"train": settings.train, "validation": settings.validation, "test": settings.test}
    return files | {"teacher": settings.teacher}


def stream_source(settings: DataSettings) -> Source:
    """The shards of source stream. Raises SettingsError, RunError: see `Source`."""
    return Source(settings.stream, settings.root, split_files(settings))


def media_root(settings: DataSettings) -> Path:
    """The folder to which the names of media in the files of a run are relative.

    That of a stream whose store does not answer is its root, below which there is nothing.
    """
    if settings.source == "stream":
        with suppress(SettingsError, RunError):
            return stream_source(settings).media()
    return Path(settings.root)


def read_rows(settings: DataSettings) -> Iterator[tuple[str, str, jsonl.Row]]:
    """Every row with its split and file."""
    for split, files in split_files(settings).items():
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
        case "mmsa":
            return mmsa.read(root / file, root, split, settings.label_column or mmsa.LABEL)
        case "meld":
            return meld.read(root / file, root, settings.label_column or meld.LABEL)
        case _:
            return jsonl.read(root / file)


def data_fingerprint(settings: DataSettings) -> str:
    """Hash of the data: every row of every split file, and the names and sizes of its files.

    Of source stream, the names, sizes and versions (ETag, or modification time) of the shards; nothing is read.

    The same data in another folder has the same fingerprint. That of a built-in corpus is of its settings.

    Raises:
        SettingsError: a split file is missing.
    """
    if corpus := built_in(settings):
        return corpus.fingerprint
    if settings.source == "stream":
        return combine(stream_source(settings).content)
    digest = hashlib.sha256()
    sizes: dict[str, int] = {}
    for split, file, row in read_rows(settings):
        try:
            names = jsonl.file_names(row.fields)
        except ValueError:
            names = []
        for name in names:
            if name not in sizes:
                sizes[name] = _size(Path(settings.root, name))
        content = [split, file, row.number, row.fields, row.problem, [sizes[name] for name in names]]
        digest.update(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()


def data_digest(settings: DataSettings, digests: Digests) -> str | None:
    """Digest of what `data_fingerprint` leaves out: the content of files, and the rows of a built-in corpus.

    None if the built-in corpus is not generated yet.

    Raises:
        SettingsError: a split file is missing.
    """
    root, corpus = Path(settings.root), built_in(settings)
    if settings.source == "stream":  # the fingerprint has the versions of the shards
        return "stream"
    if corpus and not corpus.is_generated(root):
        return None
    rows, names = [], set()
    for split, file, row in read_rows(settings):
        if corpus:
            rows.append([split, file, row.number, row.fields, row.problem])
        with suppress(ValueError):
            names |= set(jsonl.file_names(row.fields))
    found = digests.files(root / name for name in names)
    files = {name: found[root / name] for name in sorted(names)}
    return combine([rows, files])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return -1
