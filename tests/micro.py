"""Recipes of complete chains that are small enough for tests, and functions to write and load them."""

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
"""A chain on recorded rationales: the gold rationales of the postcards replace a teacher. Trains for two epochs."""

LONG_TRAINING: dict[str, Any] = LEARNER | {
    "batch_size": 4,
    "learning_rate": 5e-3,
    "warmup_steps": 10,
    "trainer": {"max_epochs": 25, "check_val_every_n_epoch": 25},
}

WITH_TEACHER: dict[str, Any] = RECORDED | {
    "teacher": LONG_TRAINING,
    "annotate": {"max_new_tokens": 100, "retries": 1, "unlabelled": "keep_confident", "confidence": 0.4, "chunk": 4},
    "assistant": LONG_TRAINING,
    "augment": {"max_new_tokens": 100, "chunk": 4},
    "calibrate": {"budget": 0.5, "min_label_mass": 0.0},
    "cascade": {"resamples": 20},
}
"""A chain with a trained teacher, which also labels the unlabelled posts. Teacher and assistant learn little more than
the format of a rationale."""


def write(folder: Path, content: dict[str, Any], **changes: Any) -> Path:
    """Write the recipe to `folder`, which also holds its data and runs; `a__b=1` sets the field a.b."""
    content = json.loads(json.dumps({"runs": str(folder / "runs")} | content))  # a deep copy
    content["data"].setdefault("root", str(folder / "data"))
    for name, value in changes.items():
        *sections, field = name.split("__")
        target = content
        for section in sections:
            target = target.setdefault(section, {})
        target[field] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def read(path: Path, *flags: str) -> Recipe:
    """Load a recipe as the command line does."""
    return load(parser("run"), ["--config", str(path), *flags])[0]


def manifest(recipe: Recipe) -> dict[str, Any]:
    """The entries of the chain's manifest."""
    return json.loads((recipe.folder / "chain.json").read_text())["stages"]
