"""`distill sync`: sends the offline runs of a chain to the wandb server, and links the artifacts that they used.

wandb sends runs with what they logged. An offline run cannot use an artifact, so the uses are kept in the run's folder
(`Lineage`) and are linked here, after the runs that logged the artifacts have been sent.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from distill.errors import RunError, SettingsError, first_line
from distill.masking import mask
from distill.tracking.lineage import UPLOADS, Edge, Lineage
from distill.tracking.records import is_empty, remove_incomplete_end
from distill.tracking.tracker import local_files

_RETRIES = {f"WANDB_X_{what}_RETRY_MAX": "5" for what in ("GRAPHQL", "FILE_STREAM", "FILE_TRANSFER")}
"""About a minute without a server; wandb's own limits are longer. Variables that are set are kept."""


class Sent(NamedTuple):
    """How many offline runs were sent, and how many uses of artifacts were linked."""

    runs: int
    links: int


def sync(folder: Path) -> Sent:
    """Send the offline runs in a run's folder that were not sent, and link the artifacts that they used.

    What is done is recorded at once, so that an interrupted call can be repeated.

    Raises:
        SettingsError: there are no offline runs, or nobody is logged in to wandb.
        RunError: the server refuses a run or a link, has not received an artifact, or cannot be reached.
    """
    lineage = Lineage(folder)
    order = {edge.run: number for number, edge in enumerate(lineage)}  # by time; that of folders is in seconds
    records = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda r: (order.get(_run_id(r), -1), r))
    edges, pending = lineage.unlinked(), [path for path in records if not _is_sent(path)]
    if not records and not edges:
        raise SettingsError(f"{folder / 'wandb'} holds no offline runs")
    if not pending and not edges and not _unchecked(folder, records):
        return Sent(0, 0)
    with local_files(folder.absolute() / "wandb"), _online():
        import wandb

        try:
            if not wandb.login(prompt=False, verify=False):
                raise SettingsError("sync needs a login to wandb: wandb login, or WANDB_API_KEY")
            api = wandb.Api()
            _send(folder, pending)
            empty = [path for path in records if is_empty(path)]
            missing = [_missing(api, folder, record, lineage) for record in _unchecked(folder, records)]
            if lost := next(filter(None, missing), None):
                raise RunError(
                    f"sync: the server has not received the artifact {lost}; repeat this. If {folder} was moved after "
                    "it ran, first move it back"
                )
            edges = [edge for edge in edges if edge.run not in map(_run_id, empty)]
            for edge in edges:
                _link(api, edge)
                lineage.add(replace(edge, linked=True))
        except (SettingsError, RunError):
            raise
        except Exception as error:  # of wandb: it may raise anything
            raise RunError(f"sync: the wandb server cannot be used: {first_line(error)}") from error
    return Sent(len([path for path in pending if path not in empty]), len(edges))


def _run_id(record: Path) -> str:
    return record.stem.removeprefix("run-")


def _mark(record: Path) -> Path:
    """The file by which wandb marks a record as sent."""
    return record.with_suffix(".wandb.synced")


def _is_sent(record: Path) -> bool:
    return _mark(record).exists()


def _unchecked(folder: Path, records: Sequence[Path]) -> list[Path]:
    """The records that were sent, and whose artifacts are not known to have arrived."""
    return [path for path in records if _is_sent(path) and (folder / UPLOADS / _run_id(path)).exists()]


def _send(folder: Path, records: Sequence[Path]) -> None:
    """Send the records of offline runs one after the other, so that the versions of an artifact keep their order.

    No stage is running, so an incomplete end was left by a kill. It is removed: wandb never counts such a record as
    sent.
    """
    for done, record in enumerate(records):
        reason = _wandb_sync(folder, record)
        if not _is_sent(record) and remove_incomplete_end(record):
            if is_empty(record):
                _mark(record).touch()
            else:
                reason = _wandb_sync(folder, record)
        if not _is_sent(record):
            missing = f"{len(records) - done} of {len(records)} offline runs were not sent"
            raise RunError(f"sync: {missing}; {record.parent.name}: {reason}")


def _wandb_sync(folder: Path, record: Path) -> str:
    """Run `wandb sync`. Returns its first line about an error, or its exit status."""
    command = [sys.executable, "-m", "wandb", "sync", str(record.absolute())]
    environment = _RETRIES | dict(os.environ) | {"WANDB_SILENT": "false"}  # not silent: the reason of a refusal
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    lines = [line.partition("ERROR")[2].strip() or line for line in ran.stderr.splitlines() if "error" in line.lower()]
    return str(mask(next(filter(None, lines), f"exit status {ran.returncode}")))


def _missing(api: Any, folder: Path, record: Path, lineage: Lineage) -> str | None:
    """Delete the files that were kept for a run once the server has its artifacts; wandb ignores a failed upload.

    Returns:
        What is missing; the run is then sent again by the next call.
    """
    sent = record.read_bytes()  # a stage that was killed may have logged what its record does not have
    for edge in lineage:
        if (edge.kind, edge.run) == ("logs", _run_id(record)) and edge.digest.encode() in sent:
            try:
                _artifact(api, edge)
            except Exception as error:  # noqa: BLE001 (of wandb: it may raise anything)
                _mark(record).unlink()
                return f"{edge.artifact} of {record.parent.name} ({first_line(error)})"
    shutil.rmtree(folder / UPLOADS / _run_id(record))
    return None


def _artifact(api: Any, edge: Edge) -> Any:
    return api.artifact(f"{edge.entity or api.default_entity}/{edge.project}/{edge.artifact}:{edge.digest}")


def _link(api: Any, edge: Edge) -> None:
    """Record on the server that a run used a version of an artifact."""
    place = f"{edge.entity or api.default_entity}/{edge.project}"
    api.run(f"{place}/{edge.run}").use_artifact(_artifact(api, edge))


@contextmanager
def _online() -> Iterator[None]:
    """Without WANDB_MODE, which may ask for offline runs."""
    mode = os.environ.pop("WANDB_MODE", None)
    try:
        yield
    finally:
        if mode is not None:
            os.environ["WANDB_MODE"] = mode
