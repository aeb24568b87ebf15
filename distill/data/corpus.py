"""From a recipe's `data` section to checked samples: one reader per layout, one report of what was dropped."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from distill.task.sample import Sample

SPLITS = ("train", "validation", "test")


@dataclass
class DataSettings:
    source: Literal["jsonl", "twitter", "mvsa", "mosi", "postcards"] = "jsonl"
    """Layout of the files: jsonl, twitter (TomBERT), mvsa, mosi (continuous labels), or the built-in postcards."""
    root: str = "data"
    """Folder of the data; image paths are resolved inside it and may not leave it."""
    train: list[str] = field(default_factory=lambda: ["train.jsonl"])
    """Files of the training split, below the root."""
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
    max_pixels: int = 50_000_000
    """Images with more pixels than this are dropped unread."""


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
