"""Source `stream`: data that does not fit in memory, nor with its pictures on this machine.

Every row of the training split is read and checked once, in the order of the shards, and written to an index on this
machine: the fields of valid rows, and where each begins. Pictures, videos and sounds are decoded once, and kept in a
bounded folder, from which they are fetched again when they are needed. The other splits are held in memory.
"""

import hashlib
import json
import sqlite3
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import numpy as np
from tqdm import tqdm

from distill import logs, storage
from distill.data import hub, jsonl, media_cache, shards
from distill.data.stored import StoredPosts
from distill.errors import SettingsError
from distill.files import atomic_folder, read_json, write_json
from distill.settings import Range, Settings
from distill.storage import File

VERSION = 1
"""Of the index."""
QUARANTINED = 1000
"""The most dropped rows of the training split that are listed; all are counted."""


@dataclass
class StreamSettings(Settings):
    """Reading of source stream."""

    columns: dict[str, str] = field(default_factory=dict)
    """Names of the fields in the shards where they are others, such as `{text: sentence, label: sentiment}`."""
    cache: str = "~/.cache/distill"
    """Folder of this machine for the index of the training posts and for fetched pictures, videos and sounds."""
    cache_gb: Annotated[float, Range(0.1)] = 50.0
    """Size of the fetched pictures, videos and sounds in GB; above it, those that were used least recently are
    deleted and fetched again when they are needed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [name for name in self.columns if name not in shards.FIELDS]:
            raise SettingsError(f"stream.columns.{unknown[0]} is no field; they are {', '.join(shards.FIELDS)}")


@dataclass(frozen=True)
class Shard:
    """A shard of the source, and its URL relative to the root, or its URL."""

    file: File
    name: str

    def rows(self, keep: shards.Keep, columns: Mapping[str, str]) -> Iterator[jsonl.Row]:
        """Its rows; one without an id is named by the shard and its number."""
        stem = PurePosixPath(self.name).name.partition(".")[0]
        for row in shards.read(self.file.url, shards.key(self.name), keep, columns):
            fields = {"id": f"{stem}:{row.number}"} | dict(row.fields)
            yield jsonl.Row(row.number, fields, row.problem, row.encoding)


class Source:
    """The shards of a recipe's splits and the folder with what is known of them.

    Args:
        root: `data.root`.
        files: the entries of each split.
        section: what messages write before the name of a split.

    Raises:
        SettingsError: an entry names no file, or one that may not be read.
        RunError: a store does not answer.
    """

    def __init__(
        self, settings: StreamSettings, root: str, files: Mapping[str, Sequence[str]], section: str = "data."
    ) -> None:
        self.settings, self.section = settings, section
        self.root = root if storage.is_url(root) else str(Path(root).expanduser().absolute())
        self.shards: dict[str, list[Shard]] = {}
        for split, entries in files.items():
            try:
                self.shards[split] = [shard for entry in entries for shard in self._find(entry)]
            except SettingsError as error:
                raise SettingsError(f"{self.section}{split}: {error}") from None

    def _find(self, entry: str) -> Iterator[Shard]:
        if entry.startswith(hub.PREFIX):
            for url in hub.files(entry):
                yield from (Shard(file, file.url) for file in storage.files(url))
            return
        for file in storage.files(storage.join(self.root, entry)):
            shards.kind(file.url)
            yield Shard(file, file.url.removeprefix(f"{self.root.rstrip('/')}/"))

    @property
    def content(self) -> dict[str, list[list[Any]]]:
        """What the fingerprint of the data is made of: names, sizes and versions, without reading."""
        return {
            split: [[shard.name, shard.file.size, shard.file.version] for shard in found]
            for split, found in self.shards.items()
        }

    def folder(self) -> Path:
        """The folder of this source in the cache, with the file that says where its media are."""
        names = {shards.key(shard.name): shard.file.url for found in self.shards.values() for shard in found}
        source = {"root": self.root, "shards": names, "cache_gb": self.settings.cache_gb}
        identity = hashlib.sha256(json.dumps([self.root, self.content, self.settings.columns]).encode()).hexdigest()
        folder = Path(self.settings.cache).expanduser().absolute() / identity[:16]
        path = folder / media_cache.SOURCE
        if not path.exists() or read_json(path) != source:
            write_json(path, source)
        return folder

    def media(self) -> Path:
        """The root of the posts' media: the data's own folder, or one that they are fetched to."""
        local = not storage.is_url(self.root)
        if local and all(shards.kind(s.file.url) == "jsonl" for found in self.shards.values() for s in found):
            return Path(self.root).resolve()
        return self.folder() / media_cache.FOLDER

    def rows(self, split: str) -> Iterator[tuple[str, jsonl.Row]]:
        """The rows of a split with the names of their shards. Media in the shards are put into the folder.

        Raises:
            SettingsError: a shard cannot be read, or has other columns than the first.
        """
        self.check_columns(split)
        folder = self.folder() / media_cache.FOLDER

        def keep(name: str, content: bytes) -> None:
            media_cache.put(folder, name, content)

        for shard in self.shards[split]:
            try:
                for row in shard.rows(keep, self.settings.columns):
                    yield shard.name, row
            except SettingsError as error:
                raise SettingsError(f"{self.section}{split}: {error}") from None

    def check_columns(self, split: str) -> None:
        """Raise SettingsError if a Parquet shard has other columns than the first one of its split."""
        first: tuple[str, list[str]] | None = None
        for shard in self.shards[split]:
            if shards.kind(shard.file.url) != "parquet":
                continue
            names = sorted(shards.parquet_columns(shard.file.url, self.settings.columns))
            if first is None:
                first = shard.file.url, names
            elif names != first[1]:
                raise SettingsError(
                    f"{self.section}{split}: {shard.file.url} has the columns {', '.join(names) or 'none'}; "
                    f"{first[0]} has {', '.join(first[1]) or 'none'}; shards must have the same"
                )


class Index:
    """Writes the rows of the training split to a folder, and opens what was written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def exists(self) -> bool:
        return (self.folder / "index.json").exists()

    @property
    def summary(self) -> dict[str, Any]:
        """`rows`, `dropped`, `listed` (the first dropped rows), `shards`, `longest` (bytes of the longest text)."""
        found: dict[str, Any] = read_json(self.folder / "index.json")
        return found

    def posts(self, root: Path) -> StoredPosts:
        """The posts in the order of the shards."""
        places = np.memmap(self.folder / "places.bin", dtype=np.int64, mode="r").reshape(-1, 2)
        return StoredPosts([(self.folder / "posts.jsonl", 0)], places, root, self.summary["shards"])

    def write(self, entries: Iterable[Sequence[Any]], root: Path) -> None:
        """Write the folder atomically.

        Args:
            entries: of `corpus.py`, in chunks, in the order of the shards.

        Raises:
            SettingsError: a shard has no usable row.
        """
        counts: dict[str, Any] = {"version": VERSION, "rows": 0, "dropped": 0, "longest": 0}
        listed: list[dict[str, Any]] = []
        starts: dict[str, int] = {}
        seen: dict[str, list[Any]] = {}
        with atomic_folder(self.folder) as new, closing(_Identities(new / ".ids")) as ids:
            with (
                (new / "posts.jsonl").open("wb") as posts,
                (new / "places.bin").open("wb") as places,
                tqdm(desc="read the data", unit="row", leave=False, disable=logs.quiet()) as bar,
            ):
                for chunk in entries:
                    ids.begin()
                    for entry in chunk:
                        state = seen.setdefault(entry.file, [0, None])
                        if entry.reason is None and (first := ids.add(entry.id, entry.file, entry.row)) is not None:
                            entry.reason = f"id {entry.id!r} is already used by {first[0]} row {first[1]}"
                        if entry.reason is not None:
                            counts["dropped"] += 1
                            state[1] = state[1] or (entry.row, entry.reason)
                            if len(listed) < QUARANTINED:
                                row = {"file": entry.file, "row": entry.row, "id": entry.id, "reason": entry.reason}
                                listed.append(row)
                            continue
                        state[0] += 1
                        starts.setdefault(entry.file, counts["rows"])
                        counts["rows"] += 1
                        counts["longest"] = max(counts["longest"], len(entry.sample.text.encode()))
                        place = {"file": entry.file, "row": entry.row}
                        fields = jsonl.to_row(entry.sample, root) | place
                        line = json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
                        places.write(struct.pack("=qq", posts.tell(), len(line)))
                        posts.write(line)
                    ids.end()
                    bar.update(len(chunk))
            for file, (usable, problem) in seen.items():
                if not usable and problem:
                    row, reason = problem
                    raise SettingsError(f"data.train: none of the rows of {file} can be used; row {row}: {reason}")
            if not counts["rows"]:
                raise SettingsError("data.train: the shards have no rows")
            ids.close()
            (new / ".ids").unlink(missing_ok=True)
            write_json(new / "index.json", counts | {"listed": listed, "shards": list(starts.values())})


class _Identities:
    """The ids of the posts with their places, on disk."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        for setting in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -4096"):
            self._connection.execute(f"PRAGMA {setting}")
        self._connection.execute("CREATE TABLE post (id BLOB PRIMARY KEY, file TEXT, row INTEGER) WITHOUT ROWID")

    def begin(self) -> None:
        self._connection.execute("BEGIN")

    def end(self) -> None:
        self._connection.execute("COMMIT")

    def add(self, identity: str, file: str, row: int) -> tuple[str, int] | None:
        """Add an id; returns where it was used before."""
        name = hashlib.blake2b(identity.encode("utf-8", "replace"), digest_size=16).digest()
        if self._connection.execute("INSERT OR IGNORE INTO post VALUES (?, ?, ?)", (name, file, row)).rowcount:
            return None
        found: tuple[str, int] = self._connection.execute("SELECT file, row FROM post WHERE id = ?", (name,)).fetchone()
        return found

    def close(self) -> None:
        self._connection.close()
