"""Stage `student`: distillation from reasoning data and the assistant's distribution, and the hard-label baseline."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from distill.annotation.reasoning_data import labels_only
from distill.data.stored import StoredPosts
from distill.models import backbone
from distill.models.backbone import Backbone
from distill.stages.context import Context, progress
from distill.stages.label_targets import label_targets, unlabelled
from distill.task.prompts import Template
from distill.task.sample import Sample
from distill.tracking import StageRun
from distill.training import soft_target_cache
from distill.training.batches import encode, prompts_and_answers, target_answer
from distill.training.processes import worker_folder
from distill.training.soft_target_cache import CachedTargets
from distill.training.soft_targets import OnlineTargets
from distill.training.student import StudentModule, StudentSettings

log = logging.getLogger(__name__)

HARD_LABELS = "hard_labels"
"""Subfolder of the baseline: the same student, trained on the gold labels only."""


def run(context: Context, tracked: StageRun) -> None:
    settings = context.recipe.student
    assert settings is not None
    rows = context.training_samples("annotate", "augment", labelled_posts=settings.labelled_posts)
    targets = None
    if settings.distillation.label_weight > 0:
        rows = [*rows, *unlabelled(context.curated, rows)]
        targets = label_targets(context, rows) if rows else None

    def soft_targets(model: Backbone, rows: Sequence[Sample]) -> OnlineTargets | CachedTargets | None:
        with torch.random.fork_rng():  # loading the assistant must not change the student's random numbers
            return _soft_targets(context, settings, model, rows) if settings.distillation.weight > 0 else None

    def module(model: Backbone, kept: Sequence[Sample]) -> StudentModule:
        return StudentModule(model, settings, soft_targets(model, kept), targets)

    context.train("student", module, rows, tracked)
    if settings.hard_labels_baseline:
        baseline = replace(settings, tasks={"classify": 1.0})
        gold = labels_only(context.curated)
        # fewer rows make shorter epochs: the factor gives both trainings about as many steps and validations
        epoch_factor = max(1, round(len(rows) / max(1, len(gold))))
        context.train(
            "student",
            lambda model, _: StudentModule(model, baseline),
            gold,
            tracked,
            part=HARD_LABELS,
            epoch_factor=epoch_factor,
        )


def _soft_targets(
    context: Context, settings: StudentSettings, student: Backbone, rows: Sequence[Sample]
) -> OnlineTargets | CachedTargets:
    """Return the loaded assistant, or its cached soft targets for the rows, after computing those that are missing.

    Rows without an answer, which teach a label distribution only, have no soft targets.
    """

    def assistant() -> OnlineTargets:
        return OnlineTargets(context.load("assistant"), student)

    options, folder = settings.distillation, context.folder / soft_target_cache.FOLDER
    if not _use_cache(context, settings, student, rows):
        return assistant()
    tasks: dict[Template, float] = settings.tasks  # type: ignore[assignment]
    rows = [row for row in rows if any(target_answer(task, row, context.labels) is not None for task in tasks)]
    key = soft_target_cache.key_function(
        student, list(tasks), context.weights("assistant"), options.top_k, options.temperature
    )
    if worker_folder() is None:  # only the main process writes
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


def _use_cache(context: Context, settings: StudentSettings, student: Backbone, rows: Sequence[Sample]) -> bool:
    """Whether soft targets are cached on disk (`DistillationSettings.use_cache`)."""
    options, model = settings.distillation, context.recipe.assistant
    assert model is not None
    if context.recipe.data.drop_modality or isinstance(rows, StoredPosts):  # other posts in each epoch; too many
        return False
    epochs = context.trainer_arguments(settings)["max_epochs"]
    cached, free = soft_target_cache.disk_space(context.folder)
    if options.soft_targets is not None or not options.use_cache(epochs, 0, cached, free):
        return options.use_cache(epochs, 0, cached, free)  # the size does not matter
    tasks: list[Template] = list(settings.tasks)  # type: ignore[arg-type]
    answers = (answer for sample in rows for _, answer in prompts_and_answers(sample, context.labels, tasks))
    tokens = sum(len(student.answer_tokens(answer)) for answer in answers)
    width = backbone.on_meta(model.model).get_output_embeddings().weight.shape[1]  # type: ignore[operator]
    needed = tokens * soft_target_cache.bytes_per_token(width, options.top_k)
    use_cache = options.use_cache(epochs, needed, cached, free)
    if not use_cache:
        log.warning(
            "soft targets are not cached: they need %.1f GB, and caching requires twice that; %.1f GB are free; "
            "the assistant runs in every epoch instead",
            (needed - cached) / 1e9,
            free / 1e9,
        )
    return use_cache
