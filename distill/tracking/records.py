"""The records of offline runs: logs in LevelDB's format, of which a killed process leaves an incomplete end."""

import os
import struct
from pathlib import Path

_HEADER, _BLOCK, _CHUNK = 7, 32768, 7
"""Sizes of the head of the file, of a block, and of the head of a chunk: checksum, length and kind."""
_WHOLE, _LAST = 1, 4
"""Kinds of the chunks that end an entry."""


def is_empty(record: Path) -> bool:
    """Whether a record has no entry."""
    return record.stat().st_size <= _HEADER


def remove_incomplete_end(record: Path) -> bool:
    """Remove what follows the last complete entry of a record.

    Returns:
        Whether there was such an end, or the record has no entry.
    """
    size, complete = record.stat().st_size, _complete(record.read_bytes())
    if complete < size:
        os.truncate(record, complete)
    return complete < size or is_empty(record)


def _complete(content: bytes) -> int:
    """The end of the last complete entry.

    Format: https://github.com/google/leveldb/blob/main/doc/log_format.md, after a header that is part of the first
    block.
    """
    start, end = _HEADER, min(_HEADER, len(content))
    while start + _CHUNK <= len(content):
        if _BLOCK - start % _BLOCK < _CHUNK:  # the rest of a block is padding
            start += _BLOCK - start % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, start)
        start += _CHUNK + length
        if start <= len(content) and kind in (_WHOLE, _LAST):
            end = start
    return end
