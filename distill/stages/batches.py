"""Batch files of the stages: filling a ledger from them, and `distill batches`, which lists and cancels them."""

import contextlib
from collections.abc import Iterator, Sequence

from distill.annotation.batch import FOLDER, Batches
from distill.annotation.batch_files import RequestFile, Round, read_rounds
from distill.annotation.cached_teacher import CachedTeacher, Start
from distill.errors import RunError, SettingsError
from distill.models.endpoint import BatchSettings, Endpoint, EndpointSettings
from distill.models.endpoint.batch_api import BatchService
from distill.recipe import Recipe
from distill.stages.context import Context, progress
from distill.task.sample import Sample


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
    annotating, cascade = recipe.annotating_teacher, recipe.cascade_teacher
    asked = {"annotate": annotating, "evaluate": annotating, "calibrate": cascade}
    endpoints = {stage: teacher for stage, teacher in asked.items() if isinstance(teacher, EndpointSettings)}
    if not endpoints:
        raise SettingsError("batches needs an endpoint of annotate or cascade.teacher")
    any_open = False
    for stage, endpoint in endpoints.items():
        rounds = read_rounds(recipe.folder / stage / FOLDER)
        found = [(round, file) for round in rounds for file in round.files if _may_be_answered(round, file)]
        if not found:
            continue
        any_open = True
        with contextlib.closing(BatchService(endpoint)) as service:
            for round, file in found:
                name = f"{stage} {round.folder.name} file {file.number}, {file.requests} requests"
                yield f"{name}: {_state(service, round, file, cancel)}"
    if not any_open:
        yield f"{recipe.folder}: no batch waits for answers"


def _may_be_answered(round: Round, file: RequestFile) -> bool:
    """Whether answers may come that somebody waits for or pays for."""
    if round.submit == "files":
        return round.is_open(file) and not round.closed
    return round.is_open(file) or bool(file.input_file and not file.batch)


def _state(service: BatchService, round: Round, file: RequestFile, cancel: bool) -> str:
    if round.submit == "files":
        return f"waits for {round.results(file)}"
    if round.address != service.settings.address:
        return f"batch {file.batch} is at {round.address}"
    if not file.batch:
        return "a run ended while it created the batch; the next one looks for it"
    try:
        batch = service.get(file.batch)
        if cancel and not batch.ended:
            batch = service.cancel(file.batch)
    except RunError as error:
        return str(error)
    counts = f", {batch.finished} of {batch.total} finished" if batch.total else ""
    return f"batch {file.batch} is {batch.status}{counts}"
