"""Small videos and sounds for tests: plain colours and plain tones."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

Colour = tuple[int, int, int]

RATE = 16_000


def tone(pitch: float, seconds: float = 1.0) -> np.ndarray:
    """A tone [S] of so many hertz."""
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(int(RATE * seconds)) / RATE)).astype(np.float32)


def write_clip(
    path: Path,
    colours: Sequence[Colour] = (),
    pitch: float | None = None,
    *,
    seconds: float = 1.0,
    size: tuple[int, int] = (64, 48),
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write a clip whose frames have these colours, one after the other, and whose sound is a tone.

    Args:
        colours: none: there is no video.
        pitch: in hertz; None: there is no sound.
    """
    with av.open(str(path), "w") as container:
        container.metadata.update(metadata or {})
        if colours:
            video = container.add_stream("libx264", rate=Fraction(len(colours) / seconds).limit_denominator(1000))
            video.width, video.height = size
            video.pix_fmt = "yuv420p"
        if pitch is not None:
            audio = container.add_stream("pcm_s16le" if path.suffix == ".wav" else "aac", rate=RATE, layout="mono")
        for colour in colours:
            image = np.full((size[1], size[0], 3), colour, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        if colours:
            container.mux(video.encode())
        if pitch is not None:
            samples = (tone(pitch, seconds) * 32767).astype(np.int16)
            for begin in range(0, len(samples), 1024):
                frame = av.AudioFrame.from_ndarray(samples[None, begin : begin + 1024], format="s16", layout="mono")
                frame.sample_rate, frame.pts = RATE, begin
                container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return path
