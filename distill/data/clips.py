"""Untrusted videos and sounds, decoded by PyAV: sampled frames as RGB, sound as 16 kHz mono."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np

from distill.settings import Count, Range, Settings

RATE = 16_000
"""Samples a second of all sounds."""


class ClipError(ValueError):
    """A video or sound that is unsafe or cannot be decoded. The message names the file."""


class Frames(NamedTuple):
    """Sampled frames of a video.

    Attributes:
        images: F arrays [H, W, 3] of uint8, upright.
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
    """Number of frames of a video, evenly spaced; shorter videos have fewer."""
    fps: Annotated[float, Range(0, above=True)] | None = None
    """Frames a second, instead of `frames`; of a long video, `max_frames` evenly spaced ones."""
    max_frames: Count = 64
    """Maximum number of frames with `fps`."""


class ClipReader:
    """Decodes files with the sampling and the limits of the settings, and keeps what was decoded in a bounded cache."""

    def __init__(self, settings: VideoSettings | None = None) -> None:
        self.settings = settings or VideoSettings()

    def frames(self, path: Path, limit: int | None = None) -> Frames:
        """The sampled frames of a video; with `limit` at most so many of them, evenly spaced.

        Raises:
            ClipError: there is no video, it is broken or exceeds a limit.
        """
        import av

        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            shown = [(float(frame.time or 0), frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
        count = min(len(shown), limit or self.settings.frames)
        kept = [shown[int(Fraction(2 * n + 1, 2 * count) * len(shown))] for n in range(count)]
        return Frames(tuple(image for _, image in kept), tuple(time for time, _ in kept), shown[-1][0])

    def sound(self, path: Path) -> np.ndarray | None:
        """The sound [S] of a file as float32 in [-1, 1] at RATE, mixed to mono; None if it has no sound.

        Raises:
            ClipError: the file is broken or exceeds a limit.
        """
        import av

        with av.open(str(path)) as container:
            if not container.streams.audio:
                return None
            resampler = av.AudioResampler(format="fltp", layout="mono", rate=RATE)
            parts = [
                part.to_ndarray()[0]
                for frame in [*container.decode(container.streams.audio[0]), None]
                for part in resampler.resample(frame)
            ]
        return np.concatenate(parts) if parts else None
