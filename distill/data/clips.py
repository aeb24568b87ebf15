"""Untrusted videos and sounds: the sampling and its limits, and a reader that keeps what it decoded.

`data/decoding.py` decodes by PyAV, which is the extra `media` and is imported when the first clip is read.
"""

import os
import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, BinaryIO, NamedTuple

import numpy as np

from distill.data.media_cache import fetch
from distill.errors import SettingsError
from distill.settings import Count, Natural, Range, Seconds, Settings

RATE = 16_000
"""Samples a second of all sounds."""


class ClipError(ValueError):
    """A video or sound that is unsafe or cannot be decoded. The message names the file."""


class Frames(NamedTuple):
    """Sampled frames of a video.

    Attributes:
        images: F arrays [H, W, 3] of uint8, upright; read-only, because a cache shares them.
        times: their F times in seconds from the start.
        seconds: length of the video.
    """

    images: tuple[np.ndarray, ...]
    times: tuple[float, ...]
    seconds: float


@dataclass
class VideoSettings(Settings):
    """Sampling of videos, and limits of videos and sounds."""

    frames: Count = 8
    """Number of frames of a video: those shown in the middle of so many equal parts of its time. Shorter videos have
    fewer."""
    fps: Annotated[float, Range(0, above=True)] | None = None
    """Frames a second, instead of `frames`; of a long video, `max_frames` evenly spaced ones."""
    max_frames: Count = 64
    """Maximum number of frames with `fps`."""
    max_side: Count | None = 640
    """Maximum longer side of a frame in pixels; larger frames are scaled down when they are decoded. null: the size of
    the video, which takes memory."""
    max_seconds: Seconds = 300.0
    """Maximum duration of a video or sound in seconds. Posts with a longer one are dropped."""
    max_mb: Count = 200
    """Maximum size of the file of a video or sound in MB."""
    max_pixels: Count = 10_000_000
    """Maximum number of pixels of a frame of a video. A larger frame is not decoded."""
    max_streams: Count = 8
    """Maximum number of streams (pictures, sound tracks, subtitles) of a file."""
    decode_seconds: Seconds = 60.0
    """Maximum time to decode one video or sound, in seconds."""
    cache_mb: Natural = 256
    """Memory for decoded frames and sounds in MB, in each process that decodes. 0: none are kept."""

    @property
    def most_frames(self) -> int:
        """The number of frames of a long video."""
        return self.frames if self.fps is None else self.max_frames

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields that decide what is decoded of a file within the limits."""
        return {name: getattr(self, name) for name in ("frames", "fps", "max_frames", "max_side")}


class ClipReader:
    """Decodes files with the sampling and the limits of the settings, and keeps what was decoded in a bounded cache.

    Threads may share a reader. A copy in another process begins with an empty cache.
    """

    def __init__(self, settings: VideoSettings | None = None) -> None:
        self.settings = settings or VideoSettings()
        self._cache = _Cache(self.settings.cache_mb * 1_000_000)

    def __reduce__(self) -> tuple[Any, ...]:
        return ClipReader, (self.settings,)

    def frames(self, path: Path, limit: int | None = None) -> Frames:
        """The sampled frames of a video; with `limit` at most so many, sampled as if `frames` were lower.

        Raises:
            ClipError: there is no video, it is broken or exceeds a limit.
            SettingsError: PyAV is not installed.
        """
        most = self.settings.most_frames
        return self._cached("frames", path, most if limit is None else min(limit, most))

    def sound(self, path: Path) -> np.ndarray | None:
        """The sound [S] of a file as float32 in [-1, 1] at RATE, mixed to mono; None if it has no sound. Read-only.

        Raises:
            ClipError: the file is broken or exceeds a limit.
            SettingsError: PyAV is not installed.
        """
        return self._cached("sound", path)

    def check(self, path: Path, name: str = "", *, video: bool = True) -> bool:
        """Check a file as a whole without decoding all of it: header, packets, first and last frame and sound.

        Args:
            name: what messages call the file; empty: its file name.
            video: whether the file must have a video; otherwise it must have a sound.

        Returns:
            Whether it has a sound.

        Raises:
            ClipError: the file is missing, broken or truncated, or exceeds a limit.
            SettingsError: PyAV is not installed.
        """
        with _decoding().opened(path, self.settings, name or path.name) as clip:
            if video and not clip.has_frame(clip.video()):
                raise clip.error("has no frame that can be decoded")
            track = clip.track()
            has_sound = track is not None and clip.has_frame(track)
            if not has_sound and not video:
                raise clip.error("has no sound")
            return has_sound

    def decode(self, path: Path, *, video: bool = True) -> bool:
        """Check a file as `check` does and decode all of it that models are given.

        Returns:
            Whether it has a sound.

        Raises:
            ClipError, SettingsError: as `check`.
        """
        has_sound = self.check(path, video=video)
        if video:
            self.frames(path)
        return has_sound and self.sound(path) is not None

    def content(self, path: Path) -> bytes:
        """The bytes of a file of at most `max_mb`.

        Raises:
            ClipError: the file is missing or larger.
        """
        with open_file(path, self.settings.max_mb, path.name) as file:
            return file.read()

    def _cached(self, kind: str, path: Path, *arguments: int) -> Any:
        key = (kind, *arguments, str(path.absolute()), *_state(path))
        if (found := self._cache.get(key, _UNKNOWN)) is _UNKNOWN:
            with _decoding().opened(path, self.settings, path.name) as clip:
                found = getattr(clip, kind)(*arguments)
            self._cache.put(key, found)
        return found


_UNKNOWN = object()


class _Cache:
    """What was used last, up to a number of bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.size = capacity, 0
        self._kept: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[Any, ...], default: Any) -> Any:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key, default)

    def put(self, key: tuple[Any, ...], value: Any) -> None:
        if (size := _size(value)) > self.capacity:
            return
        with self._lock:
            if key not in self._kept:  # two threads may decode the same file
                self._kept[key] = value
                self.size += size
            while self.size > self.capacity:
                self.size -= _size(self._kept.popitem(last=False)[1])


def open_file(path: Path, max_mb: int, name: str) -> BinaryIO:
    """Open a file of at most `max_mb` MB. Raises ClipError if it is missing, larger or no regular file."""
    fetch(path)
    try:
        if not path.is_file():  # opening a named pipe would block
            raise ClipError(f"clip {name} is missing")
        file = path.open("rb")
    except (OSError, ValueError) as error:
        if isinstance(error, ClipError):
            raise
        raise ClipError(f"clip {name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if (size := os.fstat(file.fileno()).st_size) > max_mb * 1_000_000:
        file.close()
        raise ClipError(f"clip {name} has {size / 1e6:,.0f} MB, more than {max_mb:,} (data.video.max_mb)")
    return file


def _size(value: Any) -> int:
    """Bytes of frames or of a sound."""
    arrays = value.images if isinstance(value, Frames) else [] if value is None else [value]
    return sum(array.nbytes for array in arrays) + sys.getsizeof(value) + 1000


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except (OSError, ValueError):  # `open_file` says what is wrong
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _decoding() -> ModuleType:
    try:
        from distill.data import decoding
    except ImportError:
        raise SettingsError("videos and sounds need PyAV: pip install 'distill[media]'") from None
    return decoding
