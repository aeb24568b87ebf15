"""The posts that `distill predict` labels: a file or folder of this machine, or a URL or pattern of shards."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from distill import storage
from distill.data import streams
from distill.data.jsonl import Row
from distill.data.stream import Source, StreamSettings
from distill.errors import SettingsError


class Posts(Protocol):
    """Posts that are read row by row."""

    def rows(self) -> Iterator[Row]: ...
    def count(self) -> int | None:
        """The number of rows; None if it is not known before they are read."""

    def digest(self) -> str:
        """Digest of the content."""

    def root(self) -> Path:
        """Folder of the media that are given by name."""


def posts(source: str, images: str | None, work: Path) -> Posts:
    """The posts of a source, which must exist.

    Args:
        images: folder or URL of the media that are given by name; None: where the source is.
        work: a folder for media that are fetched.

    Raises:
        SettingsError: there is no such source.
    """
    if storage.is_url(source) or "*" in source or source.casefold().endswith(".tar"):
        return _Shards(source, images, work)
    if not Path(source).exists():
        raise SettingsError(f"--input: {source} does not exist")
    return _Local(Path(source), images)


class _Local:
    def __init__(self, source: Path, images: str | None) -> None:
        self.source, self.images = source, images
        self.total = streams.count(source)

    def rows(self) -> Iterator[Row]:
        return streams.rows(self.source)

    def count(self) -> int | None:
        return self.total

    def digest(self) -> str:
        if not self.source.is_dir():
            with self.source.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        found = hashlib.sha256()
        for path in sorted(self.source.iterdir()):
            found.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
        return found.hexdigest()

    def root(self) -> Path:
        return Path(self.images) if self.images else self.source if self.source.is_dir() else self.source.parent


class _Shards:
    def __init__(self, url: str, images: str | None, work: Path) -> None:
        full = storage.join(".", url)
        self.source = Source(
            StreamSettings(cache=str(work / "media")), images or full.rpartition("/")[0], {"input": [full]}, "--"
        )

    def rows(self) -> Iterator[Row]:
        """The rows of all shards, numbered through."""
        shard, before, last = "", 0, 0
        for name, row in self.source.rows("input"):
            if name != shard:
                shard, before = name, last
            last = before + row.number
            yield replace(row, number=last)

    def count(self) -> int | None:
        return None

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.source.content).encode()).hexdigest()

    @cached_property
    def _root(self) -> Path:
        return self.source.media()

    def root(self) -> Path:
        return self._root
