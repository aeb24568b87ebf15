"""Whole chains small enough for tests: recipes as dictionaries, and how to write and load them."""

import json
from pathlib import Path
from typing import Any

import yaml

from distill.recipe import Recipe, load, parser

MODEL: dict[str, Any] = {
    "tiny": {"hidden": 64, "layers": 1, "vision_hidden": 32, "vision_depth": 1, "vocabulary": 600},
    "image_size": 28,
    "batch_size": 64,
}

LEARNER: dict[str, Any] = {"model": MODEL, "batch_size": 8, "trainer": {"max_epochs": 2}}

RECORDED: dict[str, Any] = {
    "name": "micro",
    "seed": 1,
    "data": {
        "source": "postcards",
        "postcards": {"labelled": 27, "unlabelled": 9, "validation": 9, "test": 9, "image_size": 28},
    },
    "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "log_every_n_steps": 1},
    "tracking": {"mode": "disabled"},
    "annotate": {"recorded": True},
    "assistant": LEARNER,
    "augment": {"max_new_tokens": 100},
    "student": LEARNER,
    "evaluate": {"max_new_tokens": 100},
    "export": {"check_samples": 4},
}
"""The gold rationales of the postcards are the teacher; nothing learns much in two epochs."""

FLUENT: dict[str, Any] = LEARNER | {
    "batch_size": 4,
    "learning_rate": 5e-3,
    "warmup_steps": 10,
    "trainer": {"max_epochs": 25, "check_val_every_n_epoch": 25},
}

TAUGHT: dict[str, Any] = RECORDED | {
    "teacher": FLUENT,
    "annotate": {"max_new_tokens": 100, "retries": 1, "unlabelled": "keep_confident", "confidence": 0.4, "chunk": 4},
    "assistant": FLUENT,
    "augment": {"max_new_tokens": 100, "chunk": 4},
    "calibrate": {"budget": 0.5, "min_label_mass": 0.0},
    "cascade": {"resamples": 20},
}
"""Teacher and assistant learn the format of a rationale, if not the truth; the teacher labels what has no label."""


def write(folder: Path, content: dict[str, Any], **changes: Any) -> Path:
    """The recipe as a file in `folder`, where its data and its runs go too; `a__b=1` changes the field a.b."""
    content = json.loads(json.dumps({"runs": str(folder / "runs")} | content))  # no part is shared with another
    content["data"].setdefault("root", str(folder / "data"))
    for name, value in changes.items():
        *sections, field = name.split("__")
        place = content
        for section in sections:
            place = place.setdefault(section, {})
        place[field] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def read(path: Path, *flags: str) -> Recipe:
    """The recipe as the command line would load it."""
    return load(parser("run"), ["--config", str(path), *flags])[0]


def manifest(recipe: Recipe) -> dict[str, Any]:
    """What the chain's manifest says of each stage."""
    return json.loads((recipe.folder / "chain.json").read_text())["stages"]
