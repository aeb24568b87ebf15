"""Posts with small videos and sounds."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distill.task.sample import Sample
from tests.clip_files import write_clip


def write(path: Path, *, frames: int = 0, seconds: float = 0.0, pitch: float | None = None, seed: int = 0) -> Path:
    """A clip of so many frames of one colour each at 4 a second, or of a tone of so many seconds."""
    colours = [tuple(map(int, colour)) for colour in np.random.default_rng(seed).integers(0, 256, (frames, 3))]
    return write_clip(path, colours, pitch, seconds=seconds or frames / 4)  # type: ignore[arg-type]


def posts(folder: Path) -> list[Sample]:
    """Posts with a picture, a video, a sound, a video with sound, all of them, and none."""
    folder.mkdir(parents=True, exist_ok=True)
    picture, silent, spoken, sound = (folder / name for name in ("a.png", "silent.mp4", "spoken.mp4", "a.wav"))
    if not sound.exists():
        Image.effect_noise((56, 40), 90).convert("RGB").save(picture)
        write(silent, frames=3, seed=1)
        write(spoken, frames=5, pitch=440, seed=2)
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
