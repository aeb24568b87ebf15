"""Digests of files and models: what a file contains, not what it is called."""

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from distill.files import write_json

ADAPTER = "adapter_config.json"
"""The file that makes a folder an adapter of peft."""


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
        """The digest of a file; None if it does not exist or is no regular file.

        Raises:
            OSError: the file exists and cannot be read.
        """
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        if not stat.S_ISREG(status.st_mode):  # reading a named pipe or a device may never end
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

        With an adapter, its base model is part of it. None if it is neither: the hub is not asked.
        """
        folder = Path(path)
        if folder.is_dir():
            found = [item for item in sorted(folder.rglob("[!.]*")) if item.is_file()]
            digests = self.files(found)
            content = [[item.relative_to(folder).as_posix(), digests[item]] for item in found]
            return combine(content + self._base(folder))
        from huggingface_hub import try_to_load_from_cache

        try:
            files = [try_to_load_from_cache(path, name, revision=revision) for name in ("config.json", ADAPTER)]
        except ValueError:  # not the name of a hub model
            return None
        folders = [Path(file).parent for file in files if isinstance(file, str)]
        if not folders:
            return None
        base = self._base(folders[0])
        return combine([folders[0].name, *base]) if base else folders[0].name

    def _base(self, folder: Path) -> list[list[str | None]]:
        """The digest of the base model of the adapter in a folder; empty if there is no adapter, or no base."""
        base = adapter_base(folder)
        if base is None or not base[0] or adapter_base(Path(base[0])) is not None:  # it cannot be loaded
            return []
        return [["base", self.model(*base)]]

    def save(self) -> None:
        """Write the cache if it has changed. Raises OSError."""
        if self._changed:
            write_json(self.cache, dict(sorted(self._known.items())))
            self._changed = False


def adapter_base(folder: Path) -> tuple[str, str] | None:
    """Path and revision of the base model that the adapter in a folder names; ("", …) if it names none.

    A relative path starts at the adapter's folder, or at the working directory. None if the folder holds no adapter.
    """
    try:
        config = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    base = str(config.get("base_model_name_or_path") or "")
    beside = folder / base
    return str(beside) if base and beside.is_dir() else base, str(config.get("revision") or "main")


def combine(content: object) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
