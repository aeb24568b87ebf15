"""The stages of a recipe in order: each is skipped while nothing it was made from has changed.

`chain.json` in the run's folder is the manifest: per stage its status, fingerprint, inputs, outputs, seconds, peak
memory and the versions it ran with.
"""

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distill.data.corpus import data_fingerprint
from distill.errors import RunError, SettingsError
from distill.files import read_json, write_json, write_text
from distill.recipe import Recipe, to_yaml
from distill.stages import annotate, assistant, augment, calibrate, cascade, evaluate, export, student, teacher
from distill.stages.context import Context
from distill.task import prompts
from distill.tracking import Tracker
from distill.training.fit import active_folder

log = logging.getLogger(__name__)


class Stage(NamedTuple):
    """A stage: what runs, which earlier stages and recipe sections it reads, and what it leaves in its folder."""

    run: Any
    reads: tuple[str, ...]
    sections: tuple[str, ...]
    outputs: tuple[str, ...]


STAGES = {
    "teacher": Stage(teacher.run, (), ("trainer",), ("adapter",)),
    "annotate": Stage(annotate.run, ("teacher",), (), ("rationales.jsonl", "quarantine.jsonl", "summary.json")),
    "assistant": Stage(assistant.run, ("annotate",), ("trainer",), ("adapter", "metrics.csv")),
    "augment": Stage(augment.run, ("annotate", "assistant"), (), ("rationales.jsonl", "summary.json")),
    "student": Stage(student.run, ("annotate", "assistant", "augment"), ("trainer",), ("adapter", "metrics.csv")),
    "evaluate": Stage(
        evaluate.run, ("teacher", "annotate", "assistant", "student"), (), ("metrics.json", "predictions.jsonl")
    ),
    "calibrate": Stage(calibrate.run, ("teacher", "annotate", "student"), (), ("calibration.json",)),
    "cascade": Stage(
        cascade.run,
        ("teacher", "annotate", "student", "calibrate"),
        (),
        ("metrics.json", "decisions.jsonl", "deferral_curve.csv"),
    ),
    "export": Stage(export.run, ("student", "evaluate"), (), ("config.json", "README.md")),
}
"""In the order of a chain; a recipe has the stages whose sections it has."""

_KEPT = ("ledger.jsonl", "soft_targets")  # each entry of which says itself what it was made from
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_LIBRARIES = ("distill", "torch", "lightning", "transformers", "peft", "datasets", "wandb")


def stages_of(recipe: Recipe) -> list[str]:
    """The names of the recipe's stages, in order."""
    return [name for name in STAGES if getattr(recipe, name) is not None]


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """What each stage is made from, as a hash: its settings, the data, the seed, and the stages it reads.

    The folder of the data does not count, only what is in it.
    """
    settings = asdict(recipe)
    data = [data_fingerprint(recipe.data), {name: value for name, value in settings["data"].items() if name != "root"}]
    found: dict[str, str] = {}
    for name in stages_of(recipe):
        stage = STAGES[name]
        made_from = [
            data,
            prompts.VERSION,
            recipe.seed,
            settings["task"],
            settings[name],
            *(settings[section] for section in stage.sections),
            *(found.get(earlier) for earlier in stage.reads),
        ]
        found[name] = sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    return found


def run(recipe: Recipe, until: str | None = None, only: str | None = None) -> list[str]:
    """Run what is stale, in order, and return the names of the stages that ran.

    Args:
        until: stop after this stage.
        only: run this stage alone; what it reads must be there.

    Raises:
        SettingsError: the recipe lacks the stage, or `only` reads a stage that is missing or stale.
        RunError: a stage failed, or another process works on the same run.
    """
    names = stages_of(recipe)
    for wanted in (until, only):
        if wanted is not None and wanted not in names:
            raise SettingsError(f"the recipe has no section {wanted}; its stages are {', '.join(names)}")
    if until is not None:
        names = names[: names.index(until) + 1]
    found = fingerprints(recipe)
    context = Context(recipe, found)
    tracker = Tracker(recipe.tracking, recipe.folder, recipe.name)
    if (folder := active_folder()) is not None:  # started by a training strategy, for the fit that goes on there
        name = folder.relative_to(recipe.folder).parts[0]
        with tracker.stage(name, {}) as tracked:
            STAGES[name].run(context, tracked)
        return []
    try:
        with _locked(recipe.folder):
            manifest = _Manifest(recipe.folder)
            if only is not None:
                _check_read(only, STAGES[only].reads, manifest, found)
                names = [only]
            ran = []
            for name in names:
                if not manifest.done(name, found[name]):
                    _run_stage(name, context, tracker, manifest)
                    ran.append(name)
            return ran
    except OSError as error:
        raise RunError(f"{error.filename or recipe.folder}: {error.strerror or error}") from error
    except Exception as error:
        if (reason := _disk_failure(error)) is None:
            raise
        raise RunError(f"{recipe.folder}: {reason}") from error


def up_to_date(recipe: Recipe) -> dict[str, bool]:
    """The recipe's stages in order, and whether each has run with these settings and data."""
    manifest = _Manifest(recipe.folder)
    return {name: manifest.done(name, found) for name, found in fingerprints(recipe).items()}


def ready(recipe: Recipe, command: str, reads: Sequence[str]) -> dict[str, str]:
    """The fingerprints of the stages, for a command that is no stage itself and reads what they left.

    Raises:
        SettingsError: the recipe lacks a stage that the command needs, or it is missing or stale.
    """
    found = fingerprints(recipe)
    for name in reads:
        if name not in found and name != "teacher":
            raise SettingsError(f"{command} needs a {name} section")
    _check_read(command, reads, _Manifest(recipe.folder), found)
    return found


def _check_read(reader: str, reads: Sequence[str], manifest: "_Manifest", found: Mapping[str, str]) -> None:
    stale = [name for name in reads if name in found and not manifest.done(name, found[name])]
    if stale:
        raise SettingsError(f"{reader} reads {stale[0]}, which has not run with this recipe; run it first")


def _disk_failure(error: BaseException | None) -> str | None:
    """What the disk said, where that is at the bottom of an error: torch and the writers in Rust hide it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return error.strerror
        if (said := re.search(r"\(os error (\d+)\)", str(error))) and int(said[1]) in _FULL:
            return os.strerror(int(said[1]))
        error = error.__context__
    return None


def _run_stage(name: str, context: Context, tracker: Tracker, manifest: "_Manifest") -> None:
    recipe, stage = context.recipe, STAGES[name]
    folder, fingerprint = recipe.folder / name, context.fingerprints[name]
    if name != "export" and manifest.stages.get(name, {}).get("fingerprint") != fingerprint:
        # what stands there was made from something else; answers and soft targets tell themselves from what, and an
        # export stays until the next one is checked
        _clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(recipe.folder / "recipe.yaml", to_yaml(recipe))
    log.info("stage %s", name)
    began, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    earlier = manifest.stages.get(name, {})
    resumed = earlier.get("seconds", 0.0) if earlier.get("fingerprint") == fingerprint else 0.0
    entry: dict[str, Any] = {
        "status": "running",
        "fingerprint": fingerprint,
        "started": started,
        "inputs": {read: context.fingerprints[read] for read in stage.reads if read in context.fingerprints},
        "outputs": [f"{name}/{output}" for output in stage.outputs],
        "versions": {library: version(library) for library in _LIBRARIES},
    }
    manifest.write(name, entry)
    _reset_peak_memory()
    status = "failed"
    try:
        with tracker.stage(name, asdict(recipe)) as tracked:
            stage.run(context, tracked)
        status = "done"
    finally:
        entry |= {"status": status, "seconds": round(resumed + time.monotonic() - began, 1)}
        manifest.write(name, entry | {"peak_memory_mb": _peak_memory_mb()})


def _clear(folder: Path) -> None:
    for path in folder.iterdir() if folder.exists() else ():
        if path.name in _KEPT:
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class _Manifest:
    """`chain.json`; written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "chain.json"
        self.folder = folder
        try:
            self.stages: dict[str, Any] = read_json(self.path)["stages"]
        except FileNotFoundError:
            self.stages = {}
        except (ValueError, KeyError, TypeError):
            raise SettingsError(f"{self.path} is not a manifest of this program; move it or its folder away") from None

    def done(self, name: str, fingerprint: str) -> bool:
        entry = self.stages.get(name, {})
        there = all((self.folder / output).exists() for output in entry.get("outputs", ()))
        return entry.get("status") == "done" and entry.get("fingerprint") == fingerprint and there

    def write(self, name: str, entry: dict[str, Any]) -> None:
        self.stages[name] = entry
        order: Sequence[str] = [stage for stage in STAGES if stage in self.stages]
        write_json(self.path, {"stages": {stage: self.stages[stage] for stage in order}})


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time works on a run. Raises RunError where another one does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{folder} is in use by another process") from None
        yield


def _reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux: the peak is then that of the whole process so far
        log.debug("the peak of memory cannot be reset here")


def _peak_memory_mb() -> dict[str, int]:
    """Most memory in use since the stage began, in MiB: of this process, and of the GPU where there is one."""
    peak = {}
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        peak["host"] = int(line.split()[1]) // 1024
    except (OSError, StopIteration):
        import resource

        unit = 1 << 20 if os.uname().sysname == "Darwin" else 1 << 10
        peak["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated() >> 20
    return peak
