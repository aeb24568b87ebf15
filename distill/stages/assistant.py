"""Stage `assistant`: multitask fine-tuning of the assistant on the teacher's reasoning data."""

from distill.stages.context import Context
from distill.tracking import StageRun
from distill.training.assistant import AssistantModule


def run(context: Context, tracked: StageRun) -> None:
    settings = context.recipe.assistant
    assert settings is not None
    rows = context.training_samples("annotate", labelled_posts=settings.labelled_posts)
    context.train("assistant", lambda model, _: AssistantModule(model, settings), rows, tracked)
