"""Files of a run: reading and writing JSON, and atomic replacement of files and folders."""

import csv
import errno
import fcntl
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from jinja2 import Environment, TemplateSyntaxError
from safetensors import SafetensorError, safe_open

from distill.errors import SettingsError


@contextmanager
def atomic_write(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """Open a file that replaces `path` when the block ends. Text is UTF-8; line ends are kept as given.

    If the block raises or the process is killed, `path` keeps its previous content. The next write to `path` replaces
    a temporary file left by a kill. Missing parent folders are created.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    encoding, newline = (None, None) if mode == "wb" else ("utf-8", "")
    try:
        with part.open(mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, keep: Iterable[str] = ()) -> Iterator[Path]:
    """Yield a new sibling folder that replaces `folder` when the block ends, except for the files in `keep`.

    `keep` has paths relative to `folder`; these files are copied, and none of them replaces a new one.

    If the block raises, `folder` is unchanged. If the process is killed, the next call for the same folder removes the
    leftovers, or restores `folder` from them. Several processes may call this at the same time.

    Raises:
        OSError: a folder cannot be created or renamed.
    """
    new = _sibling(folder, "new")
    _remove_leftovers(folder)
    new.mkdir(parents=True)
    try:
        yield new
        for name in keep:
            if not (new / name).exists():
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(folder / name, new / name, follow_symlinks=False)
        old = _sibling(folder, "old")
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Raises OSError."""
    with atomic_write(path) as file:
        file.write(text)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically; a number that is not finite is unknown and written as null. Raises OSError."""
    write_text(path, json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV file atomically, with a header. Raises OSError."""
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def append_line(path: Path, line: bytes) -> None:
    """Append a line of JSON and wait until it is on disk. Several processes may append.

    An incomplete last line, which a kill has left, is removed; a complete one without a line end is ended.

    Args:
        line: without its line end.

    Raises:
        OSError: the file cannot be written; it then ends with its last complete line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = _end_last_line(file)
        if os.write(file, line + b"\n") <= len(line):
            os.ftruncate(file, end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(file)
    finally:
        os.close(file)


def _end_last_line(file: int) -> int:
    """Remove an incomplete last line, or end a complete one that has no line end. Returns the size of the file."""
    size = os.fstat(file).st_size
    content = os.pread(file, size, 0)
    start = content.rfind(b"\n") + 1
    if start == size:
        return size
    if is_torn(content[start:]):
        os.ftruncate(file, start)
        return start
    os.write(file, b"\n")
    return size + 1


def is_torn(line: bytes) -> bool:
    """Whether a line without an end is the beginning of one: a beginning of an object is no JSON."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def finite(content: Any) -> Any:
    """JSON content with None instead of NaN and infinity, which JSON does not have."""
    if isinstance(content, Mapping):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: the file does not exist.
        SettingsError: the file is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingsError(
            f"{path} is not valid JSON ({error}); if a stage wrote it, delete it and run it again"
        ) from None


def damage(path: Path) -> str | None:
    """Why a JSON, JSONL, CSV, Jinja or safetensors file cannot be read; None if it can or is of another kind.

    Raises:
        OSError: the file cannot be opened.
    """
    try:
        match path.suffix:
            case ".json":
                json.loads(path.read_bytes())
            case ".jsonl":
                for number, line in enumerate(path.read_bytes().splitlines(), start=1):
                    if line.strip() and not _is_object(line):
                        return f"row {number} is not a JSON object"
            case ".csv":
                with path.open(newline="", encoding="utf-8") as file:
                    rows = [row for row in csv.reader(file, strict=True) if row]
                if short := next((n for n, row in enumerate(rows, start=1) if len(row) != len(rows[0])), None):
                    return f"row {short} has {len(rows[short - 1])} columns instead of {len(rows[0])}"
                if rows and not path.read_bytes().endswith(b"\n"):
                    return "the last row has no end"
            case ".jinja":
                _check_template(path.read_text(encoding="utf-8"))
            case ".safetensors":
                with safe_open(path, "numpy"):
                    pass
    except (ValueError, RecursionError, csv.Error, SafetensorError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


def _check_template(text: str) -> None:
    """Raise ValueError for a chat template that cannot be parsed."""
    known = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)  # a tag of transformers
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(known)
    except TemplateSyntaxError as error:
        raise ValueError(error.message) from None


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _sibling(folder: Path, state: Literal["new", "old"]) -> Path:
    return folder.with_name(f".{folder.name}.{os.getpid()}.{state}")


def _remove_leftovers(folder: Path) -> None:
    """Remove the siblings that killed processes left; restore `folder` if the kill was between its two renames."""
    name = re.compile(rf"\.{re.escape(folder.name)}\.(\d{{1,7}})\.(new|old)")
    found = [match for path in folder.parent.glob(".*") if (match := name.fullmatch(path.name))]
    for match in found:
        leftover = folder.with_name(match[0])
        if _is_running(int(match[1])):
            continue
        if match[2] == "old" and not folder.exists():
            os.replace(leftover, folder)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _is_running(process: int) -> bool:
    """Whether another process with this id is running on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return process != os.getpid()
