"""`distill copy`: a run or an export from this machine to an object store, and back, whole or not at all.

A store has no folders that could be renamed. The files of a copy are therefore uploaded first, and the object MANIFEST
last, with the size and the SHA-256 of each: without it a copy is not whole and is not read.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from distill import logs
from distill.chain import locked
from distill.errors import RunError, SettingsError
from distill.files import atomic_folder
from distill.storage import expected_errors, filesystem, is_url, put

MANIFEST = "distill-copy.json"
_LEFT_OUT = {".lock", ".digests.json", MANIFEST}
"""What belongs to this machine."""


def copy(source: str, target: str) -> int:
    """Copy a folder to a URL, or what such a copy has left at a URL to a new folder.

    Returns:
        The number of files; 0 if the target is this copy already.

    Raises:
        SettingsError: not one of the two is a URL, the source is no folder or not whole, or the target is in use.
        RunError: the store does not answer, or a file has another content than the copy had.
    """
    if is_url(source) == is_url(target):
        raise SettingsError("copy takes a folder of this machine and a URL such as s3://bucket/runs/x, in either order")
    try:
        if is_url(target):
            return _upload(Path(source), target.rstrip("/"))
        return _download(source.rstrip("/"), Path(target))
    except OSError as error:
        raise RunError(f"{error.filename or source}: {error.strerror or error}") from error


def _upload(folder: Path, url: str) -> int:
    if not folder.is_dir():
        raise SettingsError(f"{folder} is no folder")
    system, root = filesystem(url)
    with _in_use(folder):
        entries = {name: _entry(folder / name) for name in _files(folder)}
        if not entries:
            raise SettingsError(f"{folder} has no files")
        with expected_errors(url):
            there = _there(system, root)
        if MANIFEST in there:
            if _manifest(url) == entries:
                return 0
            raise SettingsError(f"{url} holds another copy; delete it or name another URL")
        if foreign := sorted(there.keys() - entries.keys()):
            raise SettingsError(f"{url} holds {foreign[0]}, which is not of {folder}; name another URL")
        for name in tqdm(entries, desc="upload", unit="file", leave=False, disable=logs.quiet()):
            put(folder / name, f"{url}/{name}")
        with expected_errors(url):
            there = _there(system, root)
        if wrong := next((name for name, entry in entries.items() if there.get(name) != entry["size"]), None):
            sizes = f"{there.get(wrong, 0)} bytes instead of {entries[wrong]['size']}"
            raise RunError(f"{url}/{wrong} has {sizes}; copy it again")
        with expected_errors(f"{url}/{MANIFEST}"):
            system.pipe_file(f"{root}/{MANIFEST}", json.dumps({"files": entries}, indent=2).encode())
    return len(entries)


def _download(url: str, folder: Path) -> int:
    if folder.exists():
        raise SettingsError(f"{folder} exists; name a new folder")
    system, root = filesystem(url)
    entries = _manifest(url)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as new:
        for name, entry in tqdm(entries.items(), desc="download", unit="file", leave=False, disable=logs.quiet()):
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with expected_errors(f"{url}/{name}"):
                system.get_file(f"{root}/{name}", str(path))
            if _entry(path) != entry:
                raise RunError(f"{url}/{name} is not what was copied: its SHA-256 is another one")
    return len(entries)


def _there(system: Any, root: str) -> dict[str, int]:
    """The files below a folder of a store, by their names relative to it, with their sizes."""
    system.invalidate_cache()
    found = system.find(root, detail=True) if system.exists(root) else {}
    return {name.removeprefix(f"{root.rstrip('/')}/"): int(info["size"]) for name, info in found.items()}


def _manifest(url: str) -> dict[str, Any]:
    """The files of a copy with their sizes and digests. Raises SettingsError if it is not whole."""
    system, root = filesystem(url)
    with expected_errors(url):
        system.invalidate_cache()
        try:
            content = json.loads(system.cat_file(f"{root}/{MANIFEST}"))
            entries: dict[str, Any] = content["files"]
            names = [PurePosixPath(name) for name in entries]
        except FileNotFoundError:
            raise SettingsError(
                f"{url} is no whole copy: it has no {MANIFEST}, which a copy ends with; repeat the copy to it"
            ) from None
        except (ValueError, LookupError, TypeError):
            raise SettingsError(f"{url}/{MANIFEST} is damaged; delete it and copy again") from None
    if unsafe := next((name for name in names if name.is_absolute() or ".." in name.parts), None):
        raise SettingsError(f"{url}/{MANIFEST} names {unsafe}, which lies outside the copy")
    return entries


def _files(folder: Path) -> Iterator[str]:
    """The files below a folder, relative to it, without what belongs to this machine."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(parent) / name
            if name not in _LEFT_OUT and not name.endswith(".part") and path.is_file():
                yield path.relative_to(folder).as_posix()


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _in_use(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Locks the run that a folder is, or is a part of. Raises RunError if another process uses it."""
    run = next((path for path in (folder.absolute(), folder.absolute().parent) if (path / "chain.json").exists()), None)
    return contextlib.nullcontext() if run is None else locked(run)
