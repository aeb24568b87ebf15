"""Stage `assistant`: multitask fine-tuning of the assistant on the teacher's reasoning data."""

from distill.stages.context import Context
from distill.tracking import StageRun
from distill.training.assistant import AssistantModule


def run(context: Context, tracked: StageRun) -> None:
    settings = context.recipe.assistant
    assert settings is not None
    if context.recipe.annotate is not None:
        tracked.use_artifact("rationales")
    rows = context.training_samples("annotate")
    context.train("assistant", lambda model, _: AssistantModule(model, settings), rows, tracked)
    tracked.log_artifact("assistant", "model", context.folder / "assistant" / "adapter")
