"""Runs the stages of a recipe in order; a stage is skipped if it is done and its inputs are unchanged.

`chain.json` in the run's folder is the manifest: for each stage its status, fingerprint, inputs, outputs, duration in
seconds, peak memory and the versions of the libraries it ran with.
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
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distill.data.corpus import data_fingerprint
from distill.errors import NonFiniteError, RunError, SettingsError
from distill.files import read_json, write_json, write_text
from distill.recipe import Recipe, masked, to_yaml
from distill.stages import annotate, assistant, augment, calibrate, cascade, evaluate, export, student, teacher
from distill.stages.context import Context
from distill.task import prompts
from distill.tracking import Tracker
from distill.training.fit import try_trainer, worker_folder

log = logging.getLogger(__name__)


class Stage(NamedTuple):
    """A stage: its function, the earlier stages and extra recipe sections it depends on, and its outputs."""

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
"""All stages in the order of a chain. A recipe has the stages whose sections it has."""

_KEPT = ("ledger.jsonl", "soft_targets")  # caches whose entries are keyed by their own inputs
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_LIBRARIES = ("distill", "torch", "lightning", "transformers", "peft", "datasets", "wandb")


def stages_of(recipe: Recipe) -> list[str]:
    """Names of the recipe's stages, in order."""
    return [name for name in STAGES if getattr(recipe, name) is not None]


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """Hash of the inputs of each stage: its settings, the data, the seed, and the fingerprints of the stages it reads.

    Of the data, only the content is hashed, not its folder.
    """
    settings = masked(recipe)
    data = [data_fingerprint(recipe.data), {name: value for name, value in settings["data"].items() if name != "root"}]
    hashes: dict[str, str] = {}
    for name in stages_of(recipe):
        stage = STAGES[name]
        inputs = [
            data,
            prompts.VERSION,
            recipe.seed,
            settings["task"],
            settings[name],
            *(settings[section] for section in stage.sections),
            *(hashes.get(earlier) for earlier in stage.reads),
        ]
        hashes[name] = sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
    return hashes


def run(recipe: Recipe, until: str | None = None, only: str | None = None) -> list[str]:
    """Run the stages that are not up to date, in order.

    Args:
        until: stop after this stage.
        only: run this stage only; the stages it reads must be up to date.

    Returns:
        The names of the stages that ran.

    Raises:
        SettingsError: the recipe has no section for the stage, or `only` reads a stage that is not up to date.
        RunError: a stage failed, the disk is full, or another process uses the same run.
    """
    names = stages_of(recipe)
    for stage in (until, only):
        if stage is not None and stage not in names:
            raise SettingsError(f"the recipe has no section {stage}; its stages are {', '.join(names)}")
    if until is not None:
        names = names[: names.index(until) + 1]
    current = fingerprints(recipe)
    context = Context(recipe, current)
    tracker = Tracker(recipe.tracking, recipe.folder, recipe.name)
    if (folder := worker_folder()) is not None:  # a worker process of a distributed training in progress
        name = folder.relative_to(recipe.folder).parts[0]
        with tracker.stage(name, {}) as tracked:
            STAGES[name].run(context, tracked)
        return []
    try:
        with _locked(recipe.folder):
            manifest = _Manifest(recipe.folder)
            if only is not None:
                _check_inputs(only, STAGES[only].reads, manifest, current)
                names = [only]
            for name in names:
                if "trainer" in STAGES[name].sections and not manifest.done(name, current[name]):
                    try_trainer(recipe.trainer, getattr(recipe, name).trainer, name)
            ran = []
            for name in names:
                if not manifest.done(name, current[name]):
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
    """The recipe's stages in order, and whether each is done with the current settings and data."""
    manifest = _Manifest(recipe.folder)
    return {name: manifest.done(name, current) for name, current in fingerprints(recipe).items()}


def input_fingerprints(recipe: Recipe, command: str, reads: Sequence[str]) -> dict[str, str]:
    """Fingerprints of the stages, for a command that is not a stage but reads the outputs of the stages in `reads`.

    Raises:
        SettingsError: the recipe has no section for such a stage, or the stage is not up to date. A chain without a
            teacher stage is accepted.
    """
    current = fingerprints(recipe)
    for name in reads:
        if name not in current and name != "teacher":
            raise SettingsError(f"{command} needs a {name} section")
    _check_inputs(command, reads, _Manifest(recipe.folder), current)
    return current


def _check_inputs(reader: str, reads: Sequence[str], manifest: "_Manifest", current: Mapping[str, str]) -> None:
    """Raise SettingsError if a stage in `reads` is not up to date."""
    stale = [name for name in reads if name in current and not manifest.done(name, current[name])]
    if stale:
        raise SettingsError(f"{reader} reads {stale[0]}, which has not run with this recipe; run it first")


def _disk_failure(error: BaseException | None) -> str | None:
    """The disk error that caused an exception, if any: torch hides it in the context, Rust writers in the message."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            return error.strerror
        if (match := re.search(r"\(os error (\d+)\)", str(error))) and int(match[1]) in _DISK_ERRORS:
            return os.strerror(int(match[1]))
        error = error.__context__
    return None


def _run_stage(name: str, context: Context, tracker: Tracker, manifest: "_Manifest") -> None:
    recipe, stage = context.recipe, STAGES[name]
    folder, fingerprint = recipe.folder / name, context.fingerprints[name]
    if name != "export" and manifest.stages.get(name, {}).get("fingerprint") != fingerprint:
        # The outputs belong to other settings or data. Caches are kept, and an export until the next one is verified.
        _clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(recipe.folder / "recipe.yaml", to_yaml(recipe))
    log.info("stage %s", name)
    began, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    earlier = manifest.stages.get(name, {})
    previous = earlier.get("seconds", 0.0) if earlier.get("fingerprint") == fingerprint else 0.0
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
        with tracker.stage(name, masked(recipe)) as tracked:
            stage.run(context, tracked)
        status = "done"
    except NonFiniteError as error:
        raise RunError(f"{name}: {error}") from None
    finally:
        entry |= {"status": status, "seconds": round(previous + time.monotonic() - began, 1)}
        manifest.write(name, entry | {"peak_memory_mb": _peak_memory_mb()})


def _clear(folder: Path) -> None:
    for path in folder.iterdir() if folder.exists() else ():
        if path.name in _KEPT:
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class _Manifest:
    """The manifest `chain.json`, written atomically."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "chain.json"
        self.folder = folder
        try:
            self.stages: dict[str, Any] = read_json(self.path)["stages"]
        except FileNotFoundError:
            self.stages = {}
        except (ValueError, KeyError, TypeError):
            raise SettingsError(f"{self.path} is not a valid manifest; move it or its folder away") from None

    def done(self, name: str, fingerprint: str) -> bool:
        """Whether a stage has finished with this fingerprint and its outputs exist."""
        entry = self.stages.get(name, {})
        exists = all((self.folder / output).exists() for output in entry.get("outputs", ()))
        return entry.get("status") == "done" and entry.get("fingerprint") == fingerprint and exists

    def write(self, name: str, entry: dict[str, Any]) -> None:
        """Replace the entry of a stage and write the file."""
        self.stages[name] = entry
        order: Sequence[str] = [stage for stage in STAGES if stage in self.stages]
        write_json(self.path, {"stages": {stage: self.stages[stage] for stage in order}})


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a run's folder for this process. Raises RunError if another process holds the lock."""
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
    except OSError:  # not Linux: the peak is that of the whole process so far
        log.debug("the peak memory of the process cannot be reset on this system")


def _peak_memory_mb() -> dict[str, int]:
    """Peak memory since the start of the stage, in MiB: of this process (host), and of the GPU if there is one."""
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
