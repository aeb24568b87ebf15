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
        RunError: the server refuses a run or a link, or cannot be reached.
    """
    records, lineage = sorted(folder.glob("wandb/offline-run-*/run-*.wandb")), Lineage(folder)
    edges, pending = lineage.unlinked(), [path for path in records if not _is_sent(path)]
    if not records and not edges:
        raise SettingsError(f"{folder / 'wandb'} holds no offline runs")
    if not pending and not edges:
        return Sent(0, 0)
    with local_files(folder / "wandb"), _online():
        import wandb

        try:
            if not wandb.login(prompt=False, verify=False):
                raise SettingsError("sync needs a login to wandb: wandb login, or WANDB_API_KEY")
            api = wandb.Api()
            _send(folder, pending)
            for edge in edges:
                _link(api, edge)
                lineage.add(replace(edge, linked=True))
        except (SettingsError, RunError):
            raise
        except Exception as error:  # of wandb: it may raise anything
            raise RunError(f"sync: the wandb server cannot be used: {first_line(error)}") from error
    return Sent(len(pending), len(edges))


def _is_sent(record: Path) -> bool:
    return record.with_suffix(".wandb.synced").exists()


def _send(folder: Path, records: Sequence[Path]) -> None:
    """Send the records of offline runs, and delete the files that were kept for them."""
    if not records:
        return
    command = [sys.executable, "-m", "wandb", "sync", *(str(path.absolute()) for path in records)]
    environment = _RETRIES | dict(os.environ) | {"WANDB_SILENT": "false"}  # not silent: the reason of a refusal
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    for record in filter(_is_sent, records):
        shutil.rmtree(folder / UPLOADS / record.stem.removeprefix("run-"), ignore_errors=True)
    if refused := [path.parent.name for path in records if not _is_sent(path)]:
        lines = [line.partition("ERROR")[2].strip() or line for line in ran.stderr.splitlines() if "rror" in line]
        reason = mask(next(filter(None, lines), f"exit status {ran.returncode}"))
        raise RunError(f"sync: {len(refused)} of {len(records)} offline runs were not sent; {refused[0]}: {reason}")


def _link(api: Any, edge: Edge) -> None:
    """Record on the server that a run used a version of an artifact."""
    place = f"{edge.entity or api.default_entity}/{edge.project}"
    artifact = api.artifact(f"{place}/{edge.artifact}:{edge.digest}")
    api.run(f"{place}/{edge.run}").use_artifact(artifact)


@contextmanager
def _online() -> Iterator[None]:
    """Without WANDB_MODE, which may ask for offline runs."""
    mode = os.environ.pop("WANDB_MODE", None)
    try:
        yield
    finally:
        if mode is not None:
            os.environ["WANDB_MODE"] = mode
