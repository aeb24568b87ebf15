"""Stage `export`: writes the student as a transformers folder with a model card."""

import logging
from pathlib import Path
from typing import Any

from distill.export.card import base_licence, model_card
from distill.export.export import export
from distill.models.adapters import Source, find_source
from distill.recipe import to_yaml
from distill.stages.context import Context
from distill.stages.evaluate import read_metrics
from distill.task.sample import Sample
from distill.tracking import StageRun

log = logging.getLogger(__name__)

_MEDIA: dict[str, Any] = {"images": (Path("image"),), "video": Path("video"), "audio": Path("video")}
"""Placeholders for what posts have besides their text."""


def run(context: Context, tracked: StageRun) -> None:
    recipe = context.recipe
    assert recipe.export is not None and recipe.student is not None
    stage = recipe.student_stage
    student = context.load(stage)
    scores = (
        read_metrics(context.folder, recipe.student_role)[recipe.student_role] if recipe.evaluate is not None else {}
    )
    settings = recipe.student.model
    base = find_source(settings.path, settings.revision) if settings.path else Source("", "main")
    corpus = context.corpus
    dropped = len(corpus.dropped) + corpus.unlisted
    data = (
        f"`{recipe.data.source}`: {len(corpus.train)} training, {len(corpus.validation)} validation and "
        f"{len(corpus.test)} test posts; {dropped} rows were left out as unreadable or inconsistent."
    )
    # a placeholder post: the card may be published where the data may not
    example = Sample(
        "example", "(the text of a post)", aspect=corpus.test[0].aspect and "(its target)",
        **{name: value for name, value in _MEDIA.items() if any(getattr(post, name) for post in corpus.train)},
    )  # fmt: skip
    card = model_card(
        recipe.name, base.path, base_licence(base.path, base.revision), data, to_yaml(recipe), scores, example, student,
        "reason" in recipe.student.tasks,
    )  # fmt: skip
    folder = context.folder / "export"
    result = export(
        student, corpus.validation, folder, context.folder / stage / "adapter", card, recipe.export, context.foreign
    )
    if result["steps"] and result["steps"]["quantisation"] and result["disagreements"]:
        log.warning(
            "the student's 4-bit base changes %d of %d labels in the check of the export; "
            "evaluate has the metrics of the 4-bit student",
            len(result["disagreements"]),
            result["samples"],
        )
    tracked.log(result)
