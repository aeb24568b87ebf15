"""Clips: the built-in synthetic corpus of short videos with sound, generated from a seed.

Each post is a video of two seconds and a short text. A drawn face turns to a smile, to a frown or keeps its mouth; a
voice-like tone rises by an octave, falls by one or holds its pitch; the words are cheerful, plain or gloomy. Each of
the three adds 1, 0 or -1 to the sentiment, a value from -3 to 3. A face or a pitch that does not move stays at either
end of the movement, so that one frame or one moment of the sound is not sufficient. Posts may have rare words: a
teacher learns all words from further posts, and the training split has only every other rare one.
"""

import itertools
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from distill.data.built_in import BuiltIn
from distill.data.postcards import RARE_WORDS, TONES, WORDS, Posts
from distill.errors import SettingsError
from distill.settings import Fraction, Range, Seed, Settings
from distill.task.rationale import Rationale, render

LEVELS = {
    "tone": TONES,
    "face": ("brightening", "still", "darkening"),
    "voice": ("rising", "level", "falling"),
}
"""The values of each attribute; they add 1, 0 and -1 to the sentiment. All combinations are equally frequent."""
RARE = {tone: words[:12] for tone, words in RARE_WORDS.items()}
"""The rare words; there are as many frequent ones."""
TEXTS = ("How {}.", "So {}.", "It was {}.", "Just {}.", "Really {}.", "That is {}.")
VERSION = 1
"""Of the posts that the same settings give."""


@dataclass
class ClipsSettings(Settings):
    """Size and seed of the built-in corpus of videos (`data.source: clips`)."""

    seed: Seed = 7
    """Seed of the texts, pictures and sounds."""
    labelled: Posts = 270
    """Number of training posts with a gold label and a gold rationale."""
    unlabelled: Posts = 540
    """Number of training posts without label and rationale."""
    validation: Posts = 189
    """Number of validation posts, all labelled."""
    test: Posts = 405
    """Number of test posts, all labelled."""
    teacher: Posts = 0
    """Number of labelled posts with all words in turn, on which only the teacher is trained."""
    rare: Fraction = 0.0
    """Fraction of the posts of the splits whose word is rare. The training split has only every other rare word."""
    image_size: Annotated[int, Range(16, 512, step=2)] = 56
    """Width and height of the videos, in pixels."""


def corpus(settings: ClipsSettings) -> BuiltIn:
    """The clips of these settings. The same settings give the same files with the same build of the encoders."""
    return BuiltIn("clips", "clips", ".mp4", VERSION, settings, partial(_parts, settings))


def _parts(
    settings: ClipsSettings, root: Path, counts: Mapping[str, int]
) -> Iterator[tuple[str, Iterable[dict[str, Any]]]]:
    drawing = _drawing()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # drawing and encoding release the GIL for the most part
        for part, count in counts.items():
            yield part, pool.map(partial(_with_clip, settings, root, drawing.write_clip), _posts(settings, part, count))


def _drawing() -> ModuleType:
    """The module that writes videos. Raises SettingsError without PyAV or one of its encoders."""
    try:
        from distill.data import synthetic_clips
    except ImportError:
        raise SettingsError("data.source clips needs PyAV: pip install 'distill[media]'") from None
    if missing := synthetic_clips.missing_encoders():
        raise SettingsError(f"data.source clips needs a PyAV with the encoder {missing[0]}, as its wheels are")
    return synthetic_clips


def _with_clip(
    settings: ClipsSettings, root: Path, write_clip: Callable[..., None], row: dict[str, Any]
) -> dict[str, Any]:
    """Write the video of a row, which depends on the seed and on the row alone. Returns the row."""
    rng = random.Random(f"{settings.seed} {row['id']}")
    _, face, voice = _signs(row["attributes"])
    write_clip(root / row["video"], _ends(face, rng), _ends(voice, rng), settings.image_size, rng)
    return row


def _ends(sign: int, rng: random.Random) -> tuple[int, int]:
    """Start and end of a movement from one end, -1 or 1, to the other; without a movement, either end twice."""
    end = sign or rng.choice((-1, 1))
    return (-sign or end), end


def _posts(settings: ClipsSettings, part: str, count: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"{settings.seed} {part}")
    cells = list(itertools.product(*LEVELS.values()))
    labelled = settings.labelled if part == "train" else count
    every_word = {tone: itertools.cycle(WORDS[tone] + RARE[tone]) for tone in TONES}
    rare_words = {tone: words[::2] if part == "train" else words for tone, words in RARE.items()}
    for number in range(count):
        if number % len(cells) == 0:
            rng.shuffle(cells)  # every 27 posts contain each cell once
        attributes = dict(zip(LEVELS, cells[number % len(cells)], strict=True))
        tone = attributes["tone"]
        if part == "teacher":
            word = next(every_word[tone])
        else:
            word = rng.choice((rare_words if rng.random() < settings.rare else WORDS)[tone])
        name = f"{part}-{number:04d}"
        row: dict[str, Any] = {"id": name, "text": rng.choice(TEXTS).format(word), "video": f"clips/{name}.mp4"}
        row |= {"label": None, "rationale": None}
        if number < labelled:
            row |= {"label": value(attributes), "rationale": render(rationale(attributes))}
        yield row | {"attributes": attributes}


def _signs(attributes: Mapping[str, str]) -> tuple[int, ...]:
    """What the words, the face and the voice add to the value: 1, 0 or -1 each."""
    return tuple(1 - levels.index(attributes[name]) for name, levels in LEVELS.items())


def value(attributes: Mapping[str, str]) -> float:
    """The sentiment of a post with these attributes."""
    return float(sum(_signs(attributes)))


def rationale(attributes: Mapping[str, str]) -> Rationale:
    """The gold rationale: the attributes of text, video and sound, and the sum that they make."""
    signs = _signs(attributes)
    return Rationale(
        (
            f"The words sound {attributes['tone']}.",
            f"The face is {attributes['face']} and the voice is {attributes['voice']}.",
            f"Of words, face and voice, {signs.count(1)} are glad and {signs.count(-1)} are sad.",
            f"The post is {sum(signs)}.",
        ),
        str(sum(signs)),
    )
