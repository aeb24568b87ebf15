"""Stage `teacher`: fine-tunes a local teacher on gold labels and rationales: the training split and its own posts."""

from distill.errors import SettingsError
from distill.stages.context import Context
from distill.task.prompts import SCORED
from distill.tracking import StageRun
from distill.training.assistant import AssistantModule


def run(context: Context, tracked: StageRun) -> None:
    settings = context.recipe.teacher
    assert settings is not None
    rows = [sample for sample in (*context.corpus.train, *context.corpus.teacher) if sample.label is not None]
    if not set(settings.tasks) <= set(SCORED) and not settings.labelled_posts:
        rows = [sample for sample in rows if sample.rationale is not None]
        if not rows:
            raise SettingsError("teacher: no training row has both a label and a rationale to learn from")
    context.train("teacher", lambda model, _: AssistantModule(model, settings), rows, tracked)
