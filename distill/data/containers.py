"""Formats of videos and sounds by their first bytes, and what is wrong with their headers before FFmpeg reads them."""

import mmap
import struct
from collections.abc import Callable
from typing import BinaryIO

MISSING_SHARE = 0.05
"""A file may be so much shorter than its header says."""

_PACKETS, _SAMPLES = 1_000, 50_000  # most packets of a second, and most samples of a sound that is not compressed
_UNKNOWN_LENGTH = 0x7FFF_0000  # from here on, a program that could not go back wrote a RIFF header


def format_of(file: BinaryIO) -> str | None:
    """FFmpeg's name of the format of a file; None for all formats that are not read."""
    file.seek(0)
    head = file.read(16)
    file.seek(0)
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
        return "mov"
    if head[:4] in (b"RIFF", b"RF64"):
        return {b"AVI ": "avi", b"WAVE": "wav"}.get(head[8:12])
    for start, name in ((b"\x1a\x45\xdf\xa3", "matroska"), (b"OggS", "ogg"), (b"fLaC", "flac"), (b"ID3", "mp3")):
        if head.startswith(start):
            return name
    return "mp3" if len(head) > 1 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2 else None  # a frame of layer III


def problem(file: BinaryIO, name: str, max_seconds: float, check_time: Callable[[], None]) -> str | None:
    """Why a file of this format must not be read; None if it may.

    Args:
        max_seconds: the duration that a file may have.
        check_time: is called now and then, and may raise.
    """
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if name == "mov":
            return _declared_packets(content, max_seconds, check_time)
        declared = int.from_bytes(content[4:8], "little")
        if content[:4] == b"RIFF" and len(content) < declared * (1 - MISSING_SHARE) and declared < _UNKNOWN_LENGTH:
            return f"has {len(content):,} of {declared:,} bytes: it was cut"  # FFmpeg reads what is there
    return None


def _declared_packets(content: mmap.mmap, max_seconds: float, check_time: Callable[[], None]) -> str | None:
    """What is wrong with the tables of an MP4 file: they declare more packets than its duration may have.

    FFmpeg allocates memory for each packet that a table declares, and a table of a few bytes may declare 2³².
    """
    size, declared = len(content), {"packets": 0, "samples": 0}
    for kind in (b"stsz", b"stz2", b"trun", b"cmov"):
        at = content.find(kind, 4)
        while at >= 0:
            check_time()
            length = int.from_bytes(content[at - 4 : at])
            if length < 2 or 16 <= length <= size - at + 4:  # otherwise these bytes are no box
                fields = content[at + 4 : at + 24]
                each, count, *_ = struct.unpack(">xxxxII", fields[:12].ljust(12, b"\0"))
                if length == 1:  # the length has 8 bytes more
                    each, count = struct.unpack(">xxxxII", fields[8:].ljust(12, b"\0"))
                if kind == b"cmov":
                    return "has a compressed header, which is not read"
                one_size = kind == b"stsz" and each > 0
                declared["samples" if one_size else "packets"] += each if kind == b"trun" else count
            at = content.find(kind, at + 4)
    most = {"packets": _PACKETS * max_seconds, "samples": _SAMPLES * max_seconds}
    if declared["packets"] > most["packets"] or declared["samples"] > min(size, most["samples"]):
        return f"declares {sum(declared.values()):,} packets, more than its duration may have"
    return None
