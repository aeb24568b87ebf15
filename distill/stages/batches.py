"""Batch files of the stages: filling a ledger from them, and `distill batches`, which lists and cancels them."""

import contextlib
from collections.abc import Iterator, Sequence

from distill.annotation.batch import FOLDER, Batches
from distill.annotation.batch_files import read_rounds
from distill.annotation.cached_teacher import CachedTeacher, Start
from distill.errors import RunError, SettingsError
from distill.models.endpoint import BatchSettings, Endpoint, EndpointSettings
from distill.models.endpoint.batch_api import BatchService
from distill.recipe import Recipe
from distill.stages.context import Context, progress
from distill.task.sample import Sample

STAGES = ("annotate", "evaluate")
"""The stages that ask in batches."""


def fill(
    context: Context,
    stage: str,
    settings: BatchSettings | None,
    teacher: CachedTeacher,
    samples: Sequence[Sample],
    starts: Sequence[Start],
) -> Batches | None:
    """Fill the ledger of a stage from its batches; see `Batches.fill`. None if it has none and makes none.

    Raises:
        RunError: see `Batches.fill`.
    """
    folder = context.folder / stage
    if not isinstance(teacher.teacher, Endpoint) or (settings is None and not (folder / FOLDER).is_dir()):
        return None
    with progress(f"{stage} batches") as show:
        batches = Batches(teacher, folder, settings, context.recipe.name, stage, show)
        batches.fill(samples, starts)
    return batches


def listing(recipe: Recipe, *, cancel: bool = False) -> Iterator[str]:
    """Yield a line of text about each batch of a run that may still be answered, or that there is none.

    Args:
        cancel: cancel those at the service; what they have answered so far is used by the next run.

    Raises:
        SettingsError: the recipe has no endpoint.
        RunError: the service does not answer.
    """
    endpoint = recipe.annotating_teacher
    if not isinstance(endpoint, EndpointSettings):
        raise SettingsError("batches needs annotate.endpoint")
    any_open = False
    with contextlib.closing(BatchService(endpoint)) as service:
        for stage in STAGES:
            for round in read_rounds(recipe.folder / stage / FOLDER):
                for file in filter(round.is_open, round.files):
                    any_open = True
                    name = f"{stage} {round.folder.name} file {file.number}, {file.requests} requests"
                    if round.submit == "files":
                        yield f"{name}: waits for {round.results(file)}"
                    elif round.address != endpoint.address:
                        yield f"{name}: batch {file.batch} is at {round.address}"
                    else:
                        try:
                            batch = service.get(file.batch)
                            if cancel and not batch.ended:
                                batch = service.cancel(file.batch)
                        except RunError as error:
                            yield f"{name}: {error}"
                        else:
                            counts = f", {batch.finished} of {batch.total} finished" if batch.total else ""
                            yield f"{name}: batch {file.batch} is {batch.status}{counts}"
    if not any_open:
        yield f"{recipe.folder}: no batch waits for answers"
