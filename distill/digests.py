"""Digests of files and models: what a file contains, not what it is called."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from distill.files import write_json


class Digests:
    """SHA-256 of files, cached in a JSON file by path, size and times: an unchanged file is not read a second time.

    The cache is only written by `save`; a cache that cannot be read is computed again.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self._changed = False
        try:
            content = json.loads(cache.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = None
        self._known: dict[str, list[str]] = content if isinstance(content, dict) else {}

    def file(self, path: Path) -> str | None:
        """The digest of a file; None if it does not exist.

        Raises:
            OSError: the file exists and cannot be read.
        """
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        # the change time reveals an edit that restores size and modification time
        state = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
        name = os.path.abspath(path)
        known = self._known.get(name)
        if isinstance(known, list) and len(known) == 2 and known[0] == state:
            return known[1]
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._known[name] = [state, digest]
        self._changed = True
        return digest

    def files(self, paths: Iterable[Path]) -> dict[Path, str | None]:
        """The digests of many files; None for one that does not exist or cannot be read."""

        def digest(path: Path) -> str | None:
            try:
                return self.file(path)
            except OSError:
                return None

        found = list(paths)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
            return dict(zip(found, pool.map(digest, found), strict=True))

    def model(self, path: str, revision: str = "main") -> str | None:
        """What a model's path stands for: a digest of the files of a folder, or the commit of a hub model in the cache.

        None if it is neither: the hub is not asked.
        """
        folder = Path(path)
        if folder.is_dir():
            found = [item for item in sorted(folder.rglob("[!.]*")) if item.is_file()]
            digests = self.files(found)
            return combine([[item.relative_to(folder).as_posix(), digests[item]] for item in found])
        from huggingface_hub import try_to_load_from_cache

        try:
            config = try_to_load_from_cache(path, "config.json", revision=revision)
        except ValueError:  # not the name of a hub model
            return None
        return Path(config).parent.name if isinstance(config, str) else None

    def save(self) -> None:
        """Write the cache if it has changed. Raises OSError."""
        if self._changed:
            write_json(self.cache, dict(sorted(self._known.items())))
            self._changed = False


def combine(content: object) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
