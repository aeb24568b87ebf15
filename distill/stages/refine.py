"""Stage `refine`: on-policy training of the student by trl, on the posts that it was trained on."""

import logging

from distill.models import backbone
from distill.models.backbone import Backbone, ModelSettings
from distill.stage_settings import TeacherSettings
from distill.stages.context import Context, progress
from distill.tracking import StageRun
from distill.training.length_limit import limit_length
from distill.training.refine import refine

log = logging.getLogger(__name__)


def run(context: Context, tracked: StageRun) -> None:
    recipe, settings = context.recipe, context.recipe.refine
    assert settings is not None and recipe.student is not None
    folder = context.folder / "refine"
    student = context.load("student", train=True)
    tasks = recipe.student.tasks
    rows = {sample.id: sample for sample in reversed(context.training_samples("annotate", "augment"))}  # the first
    posts = limit_length(
        [*reversed(rows.values())], student, tasks, packing=recipe.student.packing,  # type: ignore[arg-type]
        max_length=recipe.student.max_length,
    )  # fmt: skip
    with progress("refine") as show:
        kept = refine(
            student,
            _teacher(context),
            posts,
            context.corpus.validation,
            settings,
            folder,
            seed=recipe.seed,
            device=context.device,
            log_metrics=tracked.log,
            progress=show,
        )
    if not kept:
        log.warning("refine: no checkpoint is as good as the student on validation posts; its weights are kept")
        student = context.load("student")
    student.save(folder / "adapter")


def _teacher(context: Context) -> Backbone | None:
    """The model whose distributions the student learns; None with rewards."""
    recipe, settings = context.recipe, context.recipe.refine
    assert settings is not None
    if settings.method == "grpo":
        return None
    if settings.teacher == "assistant":
        return context.load("assistant")
    teacher = recipe.annotating_teacher
    if isinstance(teacher, TeacherSettings):
        return context.load("teacher")
    assert isinstance(teacher, ModelSettings)  # checked before the first stage
    return backbone.create(teacher, context.labels, context.tokenizer(teacher), train=False, clips=context.clips)
