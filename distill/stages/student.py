"""Stage `student`: distillation from reasoning data and the assistant's distribution, and the baseline beside it."""

from dataclasses import replace

from distill.models.backbone import Backbone
from distill.stages.context import Context
from distill.tracking import StageRun
from distill.training.soft_targets import SoftTargets
from distill.training.student import StudentModule

HARD_LABELS = "hard_labels"
"""Folder of the baseline below the stage's: the same student, trained on the gold labels alone."""


def run(context: Context, tracked: StageRun) -> None:
    settings = context.recipe.student
    assert settings is not None
    artifacts = {"annotate": "rationales", "assistant": "assistant", "augment": "augmented-rationales"}
    for stage, artifact in artifacts.items():
        if getattr(context.recipe, stage) is not None:
            tracked.use_artifact(artifact)

    def student(model: Backbone) -> StudentModule:
        soft_targets = SoftTargets(context.load("assistant"), model) if settings.distillation.weight > 0 else None
        return StudentModule(model, settings, soft_targets)

    rows = context.training_rows("annotate", "augment")
    context.train("student", student, rows, tracked)
    if settings.hard_labels_baseline:
        plain = replace(settings, tasks={"classify": 1.0})
        labelled = [replace(sample, rationale=None) for sample in context.corpus.train if sample.label is not None]
        # fewer rows make shorter epochs: as many more of them give both as many steps and as many validations
        longer = max(1, round(len(rows) / max(1, len(labelled))))
        context.train(
            "student", lambda model: StudentModule(model, plain), labelled, tracked, part=HARD_LABELS, longer=longer
        )
    tracked.log_artifact("student", "model", context.folder / "student" / "adapter")
