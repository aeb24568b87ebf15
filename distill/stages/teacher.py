"""Stage `teacher`: fine-tunes a local teacher on gold labels and rationales: the training split and its own posts."""

from distill.data.stored import StoredPosts, labelled, selected
from distill.errors import SettingsError
from distill.stages.context import Context
from distill.task.prompts import SCORED
from distill.tracking import StageRun
from distill.training.assistant import AssistantModule


def run(context: Context, tracked: StageRun) -> None:
    settings = context.recipe.teacher
    assert settings is not None
    posts = context.corpus.train
    if not isinstance(posts, StoredPosts):  # a stream takes no posts of the teacher
        posts = [*posts, *context.corpus.teacher]
    rows = labelled(posts)
    if not set(settings.tasks) <= set(SCORED) and not settings.labelled_posts:
        rows = selected(rows, lambda sample: sample.rationale is not None)
        if not rows:
            raise SettingsError("teacher: no training row has both a label and a rationale to learn from")
    context.train("teacher", lambda model, _: AssistantModule(model, settings), rows, tracked)
