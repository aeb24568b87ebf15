"""Postcards: the built-in synthetic corpus, generated from a seed.

Each post is a drawn card (a face under a sky) and a short text. The sentiment depends on both: cheerful words with a
frowning face are sarcasm, gloomy words with a smiling face are teasing. The best possible accuracy on the balanced
corpus is 5/9 from the text alone and 6/9 from the image alone. Gold attributes describe each card, so that rationales
can be checked against the post. Most training posts are unlabelled. Posts may have rare words: a teacher learns all of
them from further posts, and the training split has only every other one.
"""

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from PIL import Image, ImageDraw

from distill.data.built_in import BuiltIn
from distill.settings import Fraction, Range, Seed, Settings
from distill.task.rationale import Rationale, render

TONES = ("cheerful", "plain", "gloomy")
FACES = ("smiling", "blank", "frowning")
BENDS = {"smiling": 1.0, "blank": 0.0, "frowning": -1.0}
"""How far the mouth of each face is bent."""

RULE = {
    ("cheerful", "smiling"): ("positive", "Both are glad, so the joy is meant."),
    ("cheerful", "blank"): ("positive", "The face says nothing, so the glad words stand."),
    ("cheerful", "frowning"): ("negative", "Glad words over a sad face are sarcasm."),
    ("plain", "smiling"): ("positive", "The words say nothing, so the glad face stands."),
    ("plain", "blank"): ("neutral", "Neither shows a feeling."),
    ("plain", "frowning"): ("negative", "The words say nothing, so the sad face stands."),
    ("gloomy", "smiling"): ("neutral", "Grim words over a glad face are teasing."),
    ("gloomy", "blank"): ("negative", "The face says nothing, so the grim words stand."),
    ("gloomy", "frowning"): ("negative", "Both are sad, so the grief is meant."),
}
"""Sentiment and its explanation for each pair of the text's tone and the face's expression."""

WORDS = {
    "cheerful": ("wonderful", "lovely", "splendid", "delightful", "glorious", "perfect", "charming", "superb",
                 "marvellous", "brilliant", "fantastic", "magical"),
    "plain": ("usual", "third", "northern", "regular", "second", "weekly", "scheduled", "numbered",
              "local", "standard", "printed", "ordinary"),
    "gloomy": ("dreadful", "awful", "miserable", "dismal", "horrid", "ghastly", "rotten", "terrible",
               "wretched", "dreary", "beastly", "appalling"),
}  # fmt: skip
THINGS = ("market", "harbour", "museum", "station", "garden", "bridge", "festival", "hotel", "beach", "castle", "ferry",
          "lake", "tower", "square", "theatre", "valley")  # fmt: skip
RARE_WORDS = {
    "cheerful": (
        "jovial", "blissful", "radiant", "exquisite", "sublime", "heavenly", "dazzling", "merry", "jolly", "sunny",
        "festive", "enchanting", "glittering", "idyllic", "halcyon", "gleeful", "jubilant", "triumphant", "luminous",
        "delicious", "luscious", "stellar", "terrific", "fabulous", "smashing", "grand", "graceful", "elegant",
        "dreamy", "golden", "blessed", "inspired", "stunning", "gorgeous", "majestic", "uplifting", "thrilling",
        "spirited", "vivacious", "buoyant", "zestful", "felicitous", "ambrosial", "beatific", "rapturous",
        "effulgent", "resplendent", "sprightly", "blithe", "jaunty", "sparkling", "angelic", "divine", "peerless",
        "flawless", "refreshing", "soothing", "ravishing", "scrumptious", "cracking",
    ),
    "plain": (
        "annual", "municipal", "coastal", "adjacent", "eastern", "southern", "western", "fourth", "fifth", "sixth",
        "seventh", "quarterly", "hourly", "monthly", "central", "lateral", "parallel", "vertical", "upper", "lower",
        "outer", "inner", "rear", "frontal", "provincial", "regional", "federal", "civic", "rural", "urban",
        "seasonal", "interim", "provisional", "former", "latter", "prior", "subsequent", "initial", "terminal",
        "median", "tenth", "ninth", "eighth", "unnumbered", "detached", "fenced", "paved", "gravelled", "brick",
        "wooden", "tiled", "covered", "roofed", "listed", "registered", "rented", "leased", "public", "communal",
        "shared",
    ),
    "gloomy": (
        "bleak", "grim", "grisly", "gruesome", "hideous", "loathsome", "vile", "foul", "squalid", "sordid", "sombre",
        "morose", "mournful", "funereal", "lugubrious", "doleful", "woeful", "tragic", "disastrous", "calamitous",
        "ruinous", "abysmal", "atrocious", "abominable", "deplorable", "lamentable", "pitiful", "shabby", "seedy",
        "mouldy", "putrid", "rancid", "fetid", "noxious", "ominous", "sinister", "macabre", "ghoulish", "desolate",
        "forlorn", "cheerless", "joyless", "hopeless", "despondent", "dejected", "sullen", "surly", "bitter",
        "harrowing", "gruelling", "wearisome", "tedious", "insipid", "stale", "murky", "dank", "soggy", "clammy",
        "oppressive", "stifling",
    ),
}  # fmt: skip
"""The long tail: words of a tone that a post has seldom, in addition to the frequent ones."""
TEXTS = (
    "Greetings from the {word} {thing} in {town}.",
    "{day} at the {thing} in {town}, a {word} one.",
    "Here is the {word} {thing} of {town}, seen on {day}.",
    "We took the {word} tour of the {thing} on {day}.",
    "{town} and its {word} {thing}, as promised.",
    "Another {word} {day} by the {thing}.",
)
TOWNS = ("Arles", "Bergen", "Cork", "Delft", "Evora", "Faro", "Ghent", "Hull", "Izmir", "Jena", "Kotor", "Lund")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
VERSION = 2
"""Of the posts that the same settings give."""
SKIES = {"blue": (80, 150, 230), "grey": (140, 140, 145), "pink": (245, 145, 165), "green": (95, 190, 110)}


Posts = Annotated[int, Range(0, 1_000_000)]


@dataclass
class PostcardSettings(Settings):
    """Size and seed of the built-in corpus (`data.source: postcards`)."""

    seed: Seed = 7
    """Seed of the texts and images."""
    labelled: Posts = 300
    """Number of training posts with a gold label and a gold rationale."""
    unlabelled: Posts = 1100
    """Number of training posts without label and rationale."""
    validation: Posts = 198
    """Number of validation posts, all labelled."""
    test: Posts = 450
    """Number of test posts, all labelled."""
    teacher: Posts = 0
    """Number of labelled posts with a rare word, on which only the teacher is trained."""
    rare: Fraction = 0.0
    """Fraction of the posts of the splits whose word is rare. The training split has only every other rare word."""
    image_size: Annotated[int, Range(16, 4096)] = 56
    """Width and height of the images, in pixels."""


def corpus(settings: PostcardSettings) -> BuiltIn:
    """The postcards of these settings. The same settings give the same files."""
    return BuiltIn("postcards", "images", ".png", VERSION, settings, partial(_parts, settings))


def _parts(
    settings: PostcardSettings, root: Path, counts: Mapping[str, int]
) -> Iterator[tuple[str, Iterator[dict[str, Any]]]]:
    rng = random.Random(settings.seed)
    for split, count in counts.items():
        yield split, _posts(split, count, settings, rng, root)


def _posts(
    split: str, count: int, settings: PostcardSettings, rng: random.Random, root: Path
) -> Iterator[dict[str, Any]]:
    cells = [(tone, face) for tone in TONES for face in FACES]
    labelled = settings.labelled if split == "train" else count
    every_rare_word = {tone: itertools.cycle(words) for tone, words in RARE_WORDS.items()}
    rare_words = {tone: words[::2] if split == "train" else words for tone, words in RARE_WORDS.items()}
    for number in range(count):
        if number % len(cells) == 0:
            rng.shuffle(cells)  # every nine posts contain each cell once
        tone, face = cells[number % len(cells)]
        if split == "teacher":
            word = next(every_rare_word[tone])
        else:
            rare = settings.rare > 0 and rng.random() < settings.rare
            word = rng.choice((rare_words if rare else WORDS)[tone])
        blanks = {"word": word, "thing": rng.choice(THINGS), "town": rng.choice(TOWNS), "day": rng.choice(DAYS)}
        text = rng.choice(TEXTS).format(**blanks)
        sky = rng.choice(tuple(SKIES))
        name = f"images/{split}-{number:04d}.png"
        draw_card(BENDS[face], sky, rng, settings.image_size).save(root / name)
        label, why = RULE[tone, face]
        row = {"id": f"{split}-{number:04d}", "text": text, "image": name, "label": None, "rationale": None}
        if number < labelled:
            row |= {"label": label, "rationale": render(rationale(tone, face, sky, label, why))}
        yield row | {"attributes": {"tone": tone, "face": face, "sky": sky}}


def rationale(tone: str, face: str, sky: str, label: str, why: str) -> Rationale:
    """The gold rationale: the attributes of text and image, and the explanation of the label."""
    return Rationale(
        (
            f"The words sound {tone}.",
            f"The card shows a {face} face under a {sky} sky.",
            why,
            f"The post is {label}.",
        ),
        label,
    )


def draw_card(bend: float, sky: str, rng: random.Random, size: int) -> Image.Image:
    """Draw one card at four times its size and scale it down: sky, ground, and a face near the middle.

    Args:
        bend: of the mouth, from -1 (frowning) to 1 (smiling).
        rng: draws the look of the card. In the same state it draws the same look with any bend.
    """
    side = 4 * size
    background = tuple(max(0, min(255, channel + rng.randint(-6, 6))) for channel in SKIES[sky])
    card = Image.new("RGB", (side, side), background)
    draw = ImageDraw.Draw(card)
    horizon = side * rng.uniform(0.78, 0.92)
    draw.rectangle((0, horizon, side, side), fill=(110, rng.randint(120, 150), 80))
    radius = side * rng.uniform(0.39, 0.41)
    x, y = (side / 2 + side * rng.uniform(-0.01, 0.01) for _ in range(2))
    skin = (rng.randint(240, 250), rng.randint(210, 222), rng.randint(90, 120))
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=skin, outline=(60, 50, 40), width=side // 60)
    for sign in (-1, 1):
        eye_x, eye_y, eye = x + sign * radius * 0.38, y - radius * 0.28, radius * rng.uniform(0.11, 0.13)
        draw.ellipse((eye_x - eye, eye_y - eye, eye_x + eye, eye_y + eye), fill=(40, 30, 30))
    curve = bend * rng.uniform(0.55, 0.65)
    points = []
    for step in range(21):
        across = step / 10 - 1
        bend = curve * (math.cos(across * math.pi / 2) - 0.5)
        points.append((x + across * radius * 0.62, y + radius * (0.42 + bend)))
    draw.line(points, fill=(120, 20, 30), width=max(2, int(radius * 0.30)), joint="curve")
    return card.resize((size, size), Image.Resampling.LANCZOS)
