"""What fills a ledger before a stage asks: shards that a killed run has left, batch files, and Ray workers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from distill.annotation.batch import Batches
from distill.annotation.cached_teacher import CachedTeacher, Conversation, Start, TeacherQuery
from distill.annotation.ledger import Ledger
from distill.models.endpoint import BatchSettings
from distill.models.reasoner import Reasoner
from distill.stages import batches
from distill.stages.context import Context, progress
from distill.task.sample import Sample
from distill.workers import fill as workers


def prefill(
    context: Context,
    stage: str,
    teacher: CachedTeacher,
    samples: Sequence[Sample],
    starts: Sequence[Start],
    batch: BatchSettings | None = None,
) -> Batches | None:
    """Fill the ledger of a stage. What is left, the stage asks.

    Args:
        starts: conversations about each sample that do not depend on each other.
        batch: ask the endpoint in batch files, and then not on Ray workers.

    Returns:
        The batches of the stage, if it has any.

    Raises:
        SettingsError, RunError: see `Batches.fill` and `workers.fill`.
    """
    recipe, folder = context.recipe, context.folder / stage
    workers.merge(teacher.ledger, folder)
    found = batches.fill(context, stage, batch, teacher, samples, starts)
    if recipe.on_ray and batch is None:
        with progress(f"{stage} on Ray") as show:
            workers.fill(teacher, folder, recipe.ray, context.corpus.root, samples, starts, show)
    return found


def asking(query: TeacherQuery) -> Start:
    """A conversation that consists of one question."""
    return partial(_ask, query=query)


def _ask(sample: Sample, query: TeacherQuery) -> Conversation[None]:
    yield query


@contextmanager
def trained(context: Context, stage: str, part: str = "") -> Iterator[Reasoner]:
    """A model that a stage trained, to be evaluated; with `engine: ray` the workers hold it, and evaluate's ledger has
    its answers."""
    if not context.recipe.on_ray:
        yield context.reasoner(stage, part)
        return
    with Ledger(context.folder / "evaluate" / "ledger.jsonl") as ledger:
        yield CachedTeacher(context.source(stage, part), context.labels, ledger, 256)
