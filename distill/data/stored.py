"""Posts in files of this machine, of which only the places are in memory: a sequence of any length."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from distill.data import jsonl
from distill.task.sample import Sample

Change = Callable[[Sample], Sample]

PART = 10_000
"""Posts of a part of a file without shards."""


class StoredPosts(Sequence[Sample]):
    """The posts of JSONL files, read when they are asked for.

    It takes 16 bytes of memory a post, or none if `places` is mapped from a file.

    Args:
        files: paths, each with the number of its first post.
        places: [N, 2], the start and the number of bytes of each line.
        root: folder of the media.
        shards: numbers of the first posts of the shards, from 0: the parts that a training shuffles.
        changes: applied to each post that is read, in order. They must be picklable.
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, int]],
        places: np.ndarray,
        root: Path,
        shards: Sequence[int],
        changes: Sequence[Change] = (),
    ) -> None:
        self.files, self.places, self.root = list(files), places, root
        self.shards, self.changes = list(shards), tuple(changes)
        self._open: dict[Path, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # another process opens the files itself

    def __del__(self) -> None:
        for file in self._open.values():
            os.close(file)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        sample = jsonl.to_sample(self.fields(index), self.root)
        for change in self.changes:
            sample = change(sample)
        return sample

    def fields(self, index: int) -> dict[str, Any]:
        """The fields of the line of a post, without the changes."""
        path = next(path for path, first in reversed(self.files) if first <= index)
        if path not in self._open:
            self._open[path] = os.open(path, os.O_RDONLY)
        start, size = self.places[index].tolist()
        found: dict[str, Any] = json.loads(os.pread(self._open[path], size, start))
        return found

    @property
    def sizes(self) -> np.ndarray:
        """[N], the bytes of each post's line: a measure of the lengths of its texts."""
        return self.places[:, 1]

    def changed(self, change: Change) -> "StoredPosts":
        """The same posts, each changed when it is read."""
        return StoredPosts(self.files, self.places, self.root, self.shards, (*self.changes, change))

    def selected(self, keep: Callable[[Sample], bool]) -> "StoredPosts":
        """The posts that are kept; all are read once."""
        kept = np.fromiter((n for n, sample in enumerate(self) if keep(sample)), dtype=np.int64)
        return self if len(kept) == len(self) else self.taken(kept)

    def taken(self, kept: np.ndarray) -> "StoredPosts":
        """The posts of these numbers, which must rise."""
        first = np.searchsorted(kept, [n for _, n in self.files]).tolist()
        shards = sorted(set(np.searchsorted(kept, self.shards).tolist()) - {len(kept)})
        files = [(path, n) for (path, _), n in zip(self.files, first, strict=True)]
        return StoredPosts(files, self.places[kept], self.root, shards, self.changes)


def scan(paths: Iterable[Path], root: Path, check: Callable[[Path, int, bytes], None]) -> StoredPosts:
    """The posts in the lines of JSONL files. Each file is cut into shards of PART posts.

    Args:
        check: is called with the path, the 1-based number and the content of every line.
    """
    files: list[tuple[Path, int]] = []
    places: list[np.ndarray] = [np.empty((0, 2), np.int64)]
    shards, total = list[int](), 0
    for path in paths:
        files.append((path, total))
        found = np.fromiter(_lines(path, partial(check, path)), dtype=np.dtype((np.int64, 2)))
        shards += range(total, total + len(found), PART)
        total += len(found)
        places.append(found.reshape(-1, 2))
    return StoredPosts(files, np.concatenate(places), root, shards)


def _lines(path: Path, check: Callable[[int, bytes], None]) -> Iterator[tuple[int, int]]:
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                check(number, line)
                yield start, len(line)
            start += len(line)


def selected(posts: Sequence[Sample], keep: Callable[[Sample], bool]) -> Sequence[Sample]:
    """The posts that are kept: of a list a list."""
    return posts.selected(keep) if isinstance(posts, StoredPosts) else [post for post in posts if keep(post)]


def labelled(posts: Sequence[Sample]) -> Sequence[Sample]:
    """The posts with a label: of a list a list."""
    return selected(posts, lambda post: post.label is not None)


def changed(posts: Sequence[Sample], change: Change) -> Sequence[Sample]:
    """The posts with a change: of a list a list."""
    return posts.changed(change) if isinstance(posts, StoredPosts) else [change(post) for post in posts]
