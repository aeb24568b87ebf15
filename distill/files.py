"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal


@contextmanager
def whole(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """A file to write (text is UTF-8, its line ends as they are given) that stands at `path` once the block ends.

    Until then, and for good where the block raises or the process is killed, `path` holds what it held before. What a
    kill leaves beside it the next write to `path` replaces. Missing folders are made.

    Raises:
        OSError: the file cannot be written, for a full disk say.
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
