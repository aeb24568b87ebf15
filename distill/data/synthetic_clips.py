"""Short videos of a drawn face with a voice-like tone, encoded as H.264 and AAC in MP4 by PyAV.

PyAV is the extra `media`; `data/clips_corpus.py` imports this module when a corpus is generated.
"""

import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from distill.data.clips import RATE
from distill.data.postcards import SKIES, draw_card

VIDEO_CODEC, AUDIO_CODEC = "libx264", "aac"
SECONDS, FPS = 2, 4
PITCH = 220.0
"""Middle of the octave of the voice, in Hz."""


def missing_encoders() -> list[str]:
    """The encoders that the installed PyAV does not have; its wheels have both."""
    return [name for name in (VIDEO_CODEC, AUDIO_CODEC) if name not in av.codecs_available]


def write_clip(path: Path, bend: tuple[int, int], pitch: tuple[int, int], size: int, rng: random.Random) -> None:
    """Write a video of a face and a voice.

    Args:
        path: of the MP4 file.
        bend: of the mouth at the start and at the end: 1 for a smile, -1 for a frown.
        pitch: at the start and at the end, in half octaves above PITCH.
        size: width and height in pixels, even.
        rng: draws the look of the face, the sound of the voice and when they move.
    """
    frames, sound = draw_frames(bend, size, rng), make_sound(pitch, rng)
    # without version and date in the file, and on one thread, equal input gives equal bytes
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        video: Any = container.add_stream(VIDEO_CODEC, rate=FPS, options={"crf": "24", "preset": "veryfast"})
        video.width, video.height, video.pix_fmt, video.thread_count = size, size, "yuv420p", 1
        audio: Any = container.add_stream(AUDIO_CODEC, rate=RATE, layout="mono")
        audio.bit_rate = 16_000
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        samples = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        samples.sample_rate, samples.pts = RATE, 0
        container.mux(audio.encode(samples))
        container.mux(audio.encode(None))


def draw_frames(bend: tuple[int, int], size: int, rng: random.Random) -> list[np.ndarray]:
    """The frames [H, W, 3] of one face, whose mouth is straight in one of the middle frames of a movement."""
    start, end = bend
    sky, look, turn = rng.choice(tuple(SKIES)), rng.getrandbits(64), rng.randint(2, 6)
    drawn = {
        shown: np.asarray(draw_card(shown, sky, random.Random(look), size)) for shown in {start, (start + end) / 2, end}
    }
    return [
        drawn[start if number < turn else end if number > turn else (start + end) / 2]
        for number in range(SECONDS * FPS)
    ]


def make_sound(pitch: tuple[int, int], rng: random.Random) -> np.ndarray:
    """The sound [S] of one voice as float32 at RATE: eight harmonics, whose pitch glides for 0.4 seconds."""
    start, end = pitch
    time = np.arange(SECONDS * RATE) / RATE
    progress = ((time - rng.uniform(0.6, 1.0)) / 0.4).clip(0, 1)
    halves = start + (end - start) * (3 * progress**2 - 2 * progress**3) + rng.uniform(-0.2, 0.2)
    phase = (2 * np.pi / RATE * np.cumsum(PITCH * 2 ** (halves / 2))).astype(np.float32)
    tone = sum(np.sin(harmonic * phase) / harmonic for harmonic in range(1, 9))
    syllables = 0.8 + 0.2 * np.sin(2 * np.pi * rng.uniform(2, 4) * time)
    envelope = np.minimum(time / 0.1, (SECONDS - time) / 0.2).clip(0, 1)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 0.01, len(time))
    return np.asarray(rng.uniform(0.15, 0.25) * syllables * envelope * tone + noise, dtype=np.float32)
