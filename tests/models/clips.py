"""Small videos and sounds, written by PyAV, and posts that have them."""

from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from distill.data.clips import RATE
from distill.task.sample import Sample


def write(path: Path, *, frames: int = 0, seconds: float = 0.0, pitch: float = 440.0, seed: int = 0) -> Path:
    """A clip of so many frames of noise at 4 a second, and a tone of so many seconds; without either if it is 0."""
    random = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("mpeg4", rate=4) if frames else None
        audio: Any = (
            container.add_stream("aac" if frames else "pcm_s16le", rate=RATE, layout="mono") if seconds else None
        )
        if video is not None:
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for _ in range(frames):
            pixels = np.kron(random.integers(0, 256, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        if audio is not None:
            wave = np.sin(2 * np.pi * pitch * np.arange(int(seconds * RATE)) / RATE) * 0.5
            samples = (wave * 32767).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate = RATE
            for part in [frame, None]:
                container.mux(audio.encode(part))
        if video is not None:
            container.mux(video.encode(None))
    return path


def posts(folder: Path) -> list[Sample]:
    """Posts with a picture, a video, a sound, a video with sound, all of them, and none."""
    folder.mkdir(parents=True, exist_ok=True)
    picture, silent, spoken, sound = (folder / name for name in ("a.png", "silent.mp4", "spoken.mp4", "a.wav"))
    if not sound.exists():
        Image.effect_noise((56, 40), 90).convert("RGB").save(picture)
        write(silent, frames=3, seed=1)
        write(spoken, frames=5, seconds=1.1, seed=2)
        write(sound, seconds=0.7, pitch=880)
    media: list[dict[str, Any]] = [
        {"images": (picture,)}, {"video": silent}, {"audio": sound}, {"video": spoken, "audio": spoken},
        {"images": (picture, picture), "video": spoken, "audio": sound}, {},
    ]  # fmt: skip
    labels = ("positive", "negative", "neutral")
    return [
        Sample(str(index), f"post {index} of {'few ' * index}words", label=labels[index % 3],
               rationale=f"Text_analysis: post {index}", **files)
        for index, files in enumerate(media)
    ]  # fmt: skip
