"""Files anywhere: paths of this machine and URLs of fsspec, such as s3:// and gs://; their errors are one sentence."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from distill.errors import RunError, SettingsError, first_line

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "RefreshError")


@dataclass(frozen=True)
class File:
    """A file or object.

    Attributes:
        url: its URL, or its absolute path on this machine.
        size: in bytes.
        version: another one whenever its content has changed: an ETag, or the modification time.
    """

    url: str
    size: int
    version: str


def is_url(name: str) -> bool:
    """Whether a name is a URL and not a path."""
    return _URL.match(name) is not None


def join(root: str, name: str) -> str:
    """The URL or absolute path of a name below `root`; a URL and an absolute path are names of their own."""
    if is_url(name) or name.startswith("/"):
        return name
    return f"{root.rstrip('/')}/{name}" if is_url(root) else str(Path(root).expanduser().absolute() / name)


def filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL or path, and its path there.

    Raises:
        SettingsError: there is no such protocol, or its extra is not installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url if is_url(url) else f"file://{Path(url).absolute()}")
    except ImportError as error:
        extra = _EXTRAS.get(url.partition(":")[0].lower())
        remedy = f"pip install 'distill[{extra}]'" if extra else first_line(error)
        raise SettingsError(f"{url} needs a package that is not installed: {remedy}") from None
    except ValueError as error:
        raise SettingsError(f"{url} cannot be used: {first_line(error)}") from None


def opened(url: str, compression: str | None = None) -> IO[bytes]:
    """Open a file for reading. To be used, and read, within `expected_errors`.

    Args:
        compression: "infer" to decompress by the suffix.
    """
    import fsspec

    system, path = filesystem(url)
    if compression == "infer":
        compression = fsspec.utils.infer_compression(path)
    file: IO[bytes] = system.open(path, "rb")
    return file if compression is None else fsspec.compression.compr[compression](file, mode="rb")


def files(url: str) -> list[File]:
    """The file of a URL or path, or the files that a pattern with *, ? or [] matches, by name.

    Raises:
        SettingsError: there is none, or it may not be read.
        RunError: the store does not answer.
    """
    system, path = filesystem(url)
    with expected_errors(url):
        system.invalidate_cache()
        is_pattern = any(sign in path for sign in "*?[")
        found = system.glob(path, detail=True) if is_pattern else {path: system.info(path)}
    listed = [_file(system, name, info) for name, info in sorted(found.items()) if info.get("type") != "directory"]
    if not listed:
        raise SettingsError(f"{url} {'matches no file' if not found else 'is a folder; name its files'}")
    return listed


def _file(system: Any, name: str, info: dict[str, Any]) -> File:
    url = name if is_local(system) else system.unstrip_protocol(name)
    version = next((info[key] for key in ("ETag", "etag", "blob_id", "mtime", "created") if info.get(key)), "")
    return File(str(url), int(info.get("size") or 0), str(version))


def is_local(system: Any) -> bool:
    """Whether a file system is that of this machine."""
    return "file" in ((system.protocol,) if isinstance(system.protocol, str) else system.protocol)


@contextmanager
def expected_errors(url: str) -> Iterator[None]:
    """Raise SettingsError or RunError for what can go wrong with a file, with its name."""
    try:
        yield
    except (SettingsError, RunError):
        raise
    except FileNotFoundError as error:
        missing = "has no such bucket" if "bucket" in str(error).lower() else "does not exist"
        raise SettingsError(f"{url} {missing}") from None
    except PermissionError as error:
        raise SettingsError(f"{url}: access is refused ({first_line(error)}); check the credentials") from None
    except Exception as error:
        if type(error).__name__ in _NO_CREDENTIALS:
            raise SettingsError(f"{url}: there are no credentials ({first_line(error)})") from None
        raise RunError(f"{url} cannot be read or written: {type(error).__name__}: {first_line(error)}") from error


def exists(url: str) -> bool:
    """Whether there is a file. Raises SettingsError, RunError: access is refused, or the store does not answer."""
    system, path = filesystem(url)
    with expected_errors(url):
        system.invalidate_cache()
        return bool(system.exists(path))


def put(path: Path, url: str) -> None:
    """Upload a file as one object, which is there as a whole or not at all.

    Raises:
        SettingsError, RunError: see `expected_errors`.
    """
    system, name = filesystem(url)
    with expected_errors(url):
        if not is_local(system):  # an object appears when its upload has ended
            system.put_file(str(path), name)
            return
        part = Path(name).with_name(f".{Path(name).name}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, part)
        os.replace(part, name)
