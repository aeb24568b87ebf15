"""Stage `student`: distillation from reasoning data and the assistant's distribution, and the baseline beside it."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from distill.models import backbone
from distill.models.backbone import Backbone
from distill.stages.context import Context, progress
from distill.task.prompts import Template
from distill.task.sample import Sample
from distill.tracking import StageRun
from distill.training import soft_target_cache
from distill.training.batches import encode, questions
from distill.training.fit import active_folder
from distill.training.soft_target_cache import CachedTargets
from distill.training.soft_targets import SoftTargets
from distill.training.student import StudentModule, StudentSettings

log = logging.getLogger(__name__)

HARD_LABELS = "hard_labels"
"""Folder of the baseline below the stage's: the same student, trained on the gold labels alone."""


def run(context: Context, tracked: StageRun) -> None:
    settings = context.recipe.student
    assert settings is not None
    artifacts = {"annotate": "rationales", "assistant": "assistant", "augment": "augmented-rationales"}
    for stage, artifact in artifacts.items():
        if getattr(context.recipe, stage) is not None:
            tracked.use_artifact(artifact)

    rows = context.training_rows("annotate", "augment")

    def soft_targets(model: Backbone) -> SoftTargets | CachedTargets | None:
        with torch.random.fork_rng():  # whether the assistant is loaded must not change what the student draws
            return _soft_targets(context, settings, model, rows) if settings.distillation.weight > 0 else None

    context.train("student", lambda model: StudentModule(model, settings, soft_targets(model)), rows, tracked)
    if settings.hard_labels_baseline:
        plain = replace(settings, tasks={"classify": 1.0})
        labelled = [replace(sample, rationale=None) for sample in context.corpus.train if sample.label is not None]
        # fewer rows make shorter epochs: as many more of them give both as many steps and as many validations
        longer = max(1, round(len(rows) / max(1, len(labelled))))
        context.train(
            "student", lambda model: StudentModule(model, plain), labelled, tracked, part=HARD_LABELS, longer=longer
        )
    tracked.log_artifact("student", "model", context.folder / "student" / "adapter")


def _soft_targets(
    context: Context, settings: StudentSettings, student: Backbone, rows: Sequence[Sample]
) -> SoftTargets | CachedTargets:
    """The assistant, or what it says about the rows, asked for now where it is not known yet."""

    def assistant() -> SoftTargets:
        return SoftTargets(context.load("assistant"), student)

    options, folder = settings.distillation, context.folder / soft_target_cache.FOLDER
    if not _cached(context, settings, student, rows):
        return assistant()
    tasks: dict[Template, float] = settings.tasks  # type: ignore[assignment]
    key = soft_target_cache.keys(student, list(tasks), context.weights("assistant"), options.top_k, options.temperature)
    if active_folder() is None:  # the processes of one training would write them at once
        with progress("soft targets") as show:
            soft_target_cache.write(
                folder,
                rows,
                key,
                lambda samples: encode(samples, student, tasks, settings.packing),
                assistant,
                device=context.device,
                top_k=options.top_k,
                temperature=options.temperature,
                workers=settings.workers,
                progress=show,
            )
    return CachedTargets(folder, key)


def _cached(context: Context, settings: StudentSettings, student: Backbone, rows: Sequence[Sample]) -> bool:
    """Whether soft targets are written to the disk: as the recipe says, or where that pays and there is room."""
    options, model = settings.distillation, context.recipe.assistant
    assert model is not None
    epochs, (there, free) = context.trainer_arguments(settings)["max_epochs"], soft_target_cache.room(context.folder)
    if options.soft_targets is not None or not options.use_cache(epochs, 0, there, free):
        return options.use_cache(epochs, 0, there, free)  # whatever they take: it need not be counted
    tasks: list[Template] = list(settings.tasks)  # type: ignore[arg-type]
    answers = (answer for sample in rows for _, answer in questions(sample, context.labels, tasks))
    tokens = sum(len(student.answer_tokens(answer)) for answer in answers)
    width = backbone.on_meta(model.model).get_output_embeddings().weight.shape[1]  # type: ignore[operator]
    needed = tokens * soft_target_cache.bytes_per_token(width, options.top_k)
    keeps = options.use_cache(epochs, needed, there, free)
    if not keeps:
        found = ((needed - there) / 1e9, free / 1e9)
        log.warning("soft targets would take %.1f GB of %.1f: the assistant is asked in every epoch instead", *found)
    return keeps
