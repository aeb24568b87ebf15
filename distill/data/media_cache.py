"""Pictures, videos and sounds of streamed posts: files of a bounded folder, fetched when they are used.

The folder mirrors the names of the files below the source's URL. It is recognised by its name, so that every process
that opens a file of it can fetch it.
"""

import json
import os
import threading
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from distill.errors import SettingsError
from distill.storage import expected_errors, join, opened

FOLDER = "fetched-media"
"""Name of the folder; the file SOURCE beside it says where the files are."""
SOURCE = "source.json"
IN_SHARDS = ".shards"
"""First part of the names of media that are in shards."""
_MAX_BYTES = 1_000_000_000

_lock = threading.Lock()
_written: dict[Path, int] = {}  # bytes that this process has written to a folder since it was last pruned


def fetch(path: Path) -> None:
    """Fetch a file of such a folder if it is not there; do nothing for any other path, or if the source lacks it.

    Raises:
        RunError: the store does not answer.
        SettingsError: access is refused, or a package is missing.
    """
    if FOLDER not in path.parts:
        return
    with suppress(FileNotFoundError, NotADirectoryError):
        os.utime(path)  # the files that were used last are kept
        return
    at = path.parts.index(FOLDER) + 1
    folder, name = Path(*path.parts[:at]), "/".join(path.parts[at:])
    source = _source(folder.parent / SOURCE)
    if name.startswith(f"{IN_SHARDS}/"):
        from distill.data.shards import read_media  # which imports this module

        found: dict[str, bytes] = {}

        def keep(other: str, content: bytes) -> None:
            if other == name:
                found[name] = content
            else:
                put(folder, other, content)

        if (shard := source["shards"].get(name.split("/")[1])) is not None:
            read_media(shard, name, keep)
        for content in found.values():  # last, so that the others do not displace it
            put(folder, name, content)
        return
    url = join(source["root"], name)
    try:
        with expected_errors(url):
            try:
                with opened(url) as file:
                    content = file.read(_MAX_BYTES)
            except (FileNotFoundError, IsADirectoryError):
                return
    except SettingsError as error:
        raise SettingsError(f"data.root: {error}") from None
    put(folder, name, content)


def put(folder: Path, name: str, content: bytes) -> None:
    """Write a file of the folder; the files that were used least recently are deleted above the limit of its source."""
    path = folder / name
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # several threads and processes may fetch one file
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    part.write_bytes(content)
    os.replace(part, path)
    limit = int(_source(folder.parent / SOURCE)["cache_gb"] * 1e9)
    with _lock:
        _written[folder] = _written.get(folder, limit) + len(content)  # the first call looks at what is there
        if _written[folder] > limit / 10:
            _prune(folder, limit)
            _written[folder] = 0


def _prune(folder: Path, limit: int) -> None:
    """Delete the files that were used least recently, until the folder has at most 80% of `limit` bytes."""
    found, total = [], 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # another process may delete it
                status = os.stat(path := os.path.join(parent, name))
                found.append((status.st_mtime_ns, status.st_size, path))
                total += status.st_size
    if total <= limit:
        return
    for _, size, path in sorted(found):
        if total <= 0.8 * limit:
            return
        with suppress(OSError):
            os.unlink(path)
        total -= size


@lru_cache(maxsize=64)
def _source(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
