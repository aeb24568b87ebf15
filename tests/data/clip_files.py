"""Small videos and sounds, written by PyAV."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

RATE = 44_100


def grey(number: int) -> int:
    """The grey of a frame, by its number."""
    return 20 + number * 4


def save_clip(
    path: Path,
    frames: int = 25,
    *,
    size: tuple[int, int] = (64, 48),
    fps: int = 25,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    times: Sequence[int] | None = None,
    tracks: int = 1,
    gop: int = 10,
    options: dict[str, str] | None = None,
) -> Path:
    """Write a video of grey frames, each brighter than the one before, with a tone of 440 Hz of the same length.

    Args:
        times: the frames' times in parts of 1 / fps; None: 0, 1, 2, …
        tracks: number of sound tracks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    times = range(frames) if times is None else times
    with av.open(str(path), "w", options=options or {}) as container:
        video = add_video(container, size, fps, codec, pixels, gop) if times else None
        sounds = [add_sound(container) for _ in range(tracks)]
        for number, time in enumerate(times):
            image = np.full((size[1], size[0], 3), grey(number) % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(image)
            frame.pts, frame.time_base = time, Fraction(1, fps)
            container.mux(video.encode(frame))
        if video is not None:
            container.mux(video.encode())
        for sound in sounds:
            write_tone(container, sound, frames / fps)
    return path


def add_video(container: Any, size: tuple[int, int], fps: int, codec: str, pixels: str, gop: int = 10) -> Any:
    video = container.add_stream(codec, rate=fps)
    video.width, video.height = size
    video.pix_fmt, video.gop_size = pixels, gop
    return video


def add_sound(container: Any, codec: str = "aac") -> Any:
    return container.add_stream(codec, rate=RATE, layout="stereo")


def write_tone(container: Any, sound: Any, seconds: float) -> None:
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(RATE * seconds)) / RATE)
    both = np.stack([wave, wave]).astype(np.float32)
    for start in range(0, both.shape[1], 1024):
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(both[:, start : start + 1024]), "fltp", "stereo")
        frame.sample_rate, frame.pts, frame.time_base = RATE, start, Fraction(1, RATE)
        container.mux(sound.encode(frame))
    container.mux(sound.encode())


def damaged(path: Path, begin: float, end: float = 1.0) -> Path:
    """Replace the media of an MP4 file between two shares of their bytes by zeros, as an unfinished download has."""
    content = path.read_bytes()
    start = content.index(b"mdat") + 4
    first, last = (start + int((len(content) - start) * share) for share in (begin, end))
    path.write_bytes(content[:first] + bytes(last - first) + content[last:])
    return path


def save_wav(path: Path, samples: np.ndarray, rate: int = 16_000) -> Path:
    """Write samples [S] or [S, channels] as a WAV file of 32-bit floats."""
    data, channels = samples.astype("<f4").tobytes(), samples.shape[1] if samples.ndim > 1 else 1
    header = struct.pack("<HHIIHH", 3, channels, rate, 4 * channels * rate, 4 * channels, 32)
    body = b"WAVEfmt " + struct.pack("<I", len(header)) + header + b"data" + struct.pack("<I", len(data)) + data
    path.write_bytes(b"RIFF" + len(body).to_bytes(4, "little") + body)
    return path
