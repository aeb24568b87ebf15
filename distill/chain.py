"""Runs the stages of a recipe in order; a stage is skipped if it is done and its inputs are unchanged.

`chain.json` in the run's folder is the manifest: for each stage its status, fingerprint, inputs, outputs, duration in
seconds, peak memory and the versions of the libraries it ran with.
"""

import errno
import fcntl
import gc
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from distill.annotation import curation
from distill.data.source import data_digest
from distill.digests import Digests, combine
from distill.errors import NonFiniteError, RunError, SettingsError
from distill.files import write_text
from distill.fingerprints import contents, fingerprints, reads, translate
from distill.manifest import Manifest
from distill.models import memory
from distill.models.backbone import ModelSettings
from distill.progress import Progress
from distill.recipe import Recipe, masked, to_yaml
from distill.stages import (
    annotate,
    assistant,
    augment,
    calibrate,
    cascade,
    evaluate,
    export,
    preflight,
    refine,
    student,
    teacher,
)
from distill.stages.context import Context
from distill.tracking import Tracker
from distill.training import processes
from distill.training.trainer_arguments import try_trainer

log = logging.getLogger(__name__)


class Stage(NamedTuple):
    """A stage: its function, the earlier stages and other recipe sections it depends on, and its outputs."""

    run: Any
    reads: tuple[str, ...]
    sections: tuple[str, ...]
    outputs: tuple[str, ...]


STAGES = {
    "teacher": Stage(teacher.run, (), ("trainer",), ("adapter",)),
    "annotate": Stage(
        annotate.run, ("teacher",), (), ("rationales.jsonl", "quarantine.jsonl", "curated.jsonl", "summary.json")
    ),
    "assistant": Stage(assistant.run, ("annotate",), ("trainer",), ("adapter", "metrics.csv")),
    "augment": Stage(augment.run, ("annotate", "assistant"), (), ("rationales.jsonl", "summary.json")),
    "student": Stage(student.run, ("annotate", "assistant", "augment"), ("trainer",), ("adapter", "metrics.csv")),
    "refine": Stage(refine.run, ("annotate", "assistant", "augment", "student"), (), ("adapter", "metrics.csv")),
    "evaluate": Stage(
        evaluate.run,
        ("teacher", "annotate", "assistant", "student", "refine"),
        (),
        ("metrics.json", "predictions.jsonl"),
    ),
    "calibrate": Stage(
        calibrate.run, ("teacher", "annotate", "student", "refine"), ("cascade.teacher",), ("calibration.json",)
    ),
    "cascade": Stage(
        cascade.run,
        ("teacher", "annotate", "student", "refine", "calibrate"),
        (),
        ("metrics.json", "decisions.jsonl", "deferral_curve.csv"),
    ),
    "export": Stage(export.run, ("student", "refine", "evaluate"), (), ("config.json", "README.md")),
}
"""All stages in the order of a chain. A recipe has the stages whose sections it has."""

_DIGESTS = ".digests.json"  # in the run's folder: a cache
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_LIBRARIES = ("distill", "torch", "lightning", "transformers", "peft", "datasets", "wandb")


def stages_of(recipe: Recipe) -> list[str]:
    """Names of the recipe's stages, in order."""
    return [name for name in STAGES if getattr(recipe, name) is not None]


def identities(recipe: Recipe) -> dict[str, str]:
    """Identities of the stages, for a `Context`: hashes of settings, data and outputs. Raises SettingsError."""
    return _State(recipe).context.fingerprints


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
    tracker = Tracker(recipe.tracking, recipe.folder, recipe.name)
    if processes.is_worker():
        for name in processes.stages(recipe.folder):
            with suppress(processes.Trained), tracker.stage(name, {}) as tracked:
                STAGES[name].run(_State(recipe).context, tracked)
        return []
    try:
        with locked(recipe.folder):
            state = _State(recipe)
            state.adopt()
            state.log_edited()
            if only is not None:
                _check_inputs(only, [*state.inputs(only)], state.done)
                names = [only]
            pending = [name for name in names if not state.done[name]]
            for name in pending:  # before anything is paid for
                state.manifest.check_names(name)
                if "trainer" in STAGES[name].sections:
                    try_trainer(recipe.trainer, getattr(recipe, name).trainer, name)
            preflight.check(state.context, pending)
            for notice in preflight.notices(state.context, pending):
                log.warning("%s", notice)
            ran = []
            progress = Progress(stages_of(recipe), pending, state.manifest.stages)
            for name in names:
                if not state.compare(name):
                    progress.begin(name)
                    _run_stage(name, state, tracker)
                    progress.end(name)
                    state.compare(name)
                    ran.append(name)
            state.digests.save()
            processes.announce(None)
            return ran
    except OSError as error:
        raise RunError(f"{error.filename or recipe.folder}: {error.strerror or error}") from error
    except Exception as error:
        if (reason := _disk_failure(error)) is None:
            raise
        raise RunError(f"{recipe.folder}: {reason}") from error


def up_to_date(recipe: Recipe) -> dict[str, bool]:
    """The recipe's stages in order, and whether each is done with the current settings, data and earlier outputs.

    Raises:
        SettingsError: an output of a finished stage is damaged.
    """
    return _State(recipe).done


def input_fingerprints(recipe: Recipe, command: str, reads: Sequence[str]) -> dict[str, str]:
    """Identities of the stages, for a command that is not a stage but reads the outputs of the stages in `reads`.

    Raises:
        SettingsError: the recipe has no section for such a stage, or the stage is not up to date. A chain without a
            teacher stage is accepted.
    """
    for name in reads:
        if name not in stages_of(recipe) and name != "teacher":
            raise SettingsError(f"{command} needs a {name} section")
    state = _State(recipe)
    _check_inputs(command, reads, state.done)
    state.log_edited()
    return state.context.fingerprints


def check_outputs(recipe: Recipe) -> None:
    """Raise SettingsError if an output of a finished stage is damaged; neither settings nor data are compared."""
    read_manifest(recipe.folder).check()


def read_manifest(folder: Path, digests: Digests | None = None) -> Manifest:
    """The manifest of a run's folder. Raises SettingsError if it is none."""
    outputs = {name: stage.outputs for name, stage in STAGES.items()}
    return Manifest(folder, digests or Digests(folder / _DIGESTS), outputs)


def _check_inputs(reader: str, reads: Sequence[str], done: Mapping[str, bool]) -> None:
    """Raise SettingsError if a stage in `reads` is not up to date."""
    if stale := [name for name in reads if not done.get(name, True)]:
        raise SettingsError(f"{reader} reads {stale[0]}, which has not run with this recipe; run it first")


class _State:
    """A run's manifest compared with the recipe: the one place that decides which stages are up to date.

    Attributes:
        done: whether each stage is up to date.
        context: its `fingerprints` are the identities of the stages, as far as they are known.

    Raises:
        SettingsError: an output of a finished stage is damaged, or a file of the data is missing.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.digests = Digests(recipe.folder / _DIGESTS)
        self.manifest = read_manifest(recipe.folder, self.digests)
        self.fingerprints = fingerprints(recipe, STAGES)
        translate(self.manifest, recipe, self.fingerprints, STAGES)
        self.context = Context(recipe, {})
        self.contents = self._contents()
        self.done: dict[str, bool] = {}
        for name in stages_of(recipe):
            self.compare(name)
            if name in ("annotate", "calibrate"):
                self._name_teacher(getattr(recipe, name).model, self.contents[name].get("model"))

    def _contents(self) -> dict[str, dict[str, str | None]]:
        recipe, decisions = self.context.recipe, curation.digest(self.context.decisions)
        data = data_digest(recipe.data, self.digests)
        return {name: contents(recipe, name, data, self.digests, decisions) for name in stages_of(recipe)}

    def compare(self, name: str) -> bool:
        """Compare a stage with the stages before it. Returns whether it is up to date."""
        fingerprint, inputs = self.fingerprints.whole[name], self.inputs(name)
        self.done[name] = self.manifest.done(name, fingerprint, inputs, self.contents[name])
        # if only outputs are missing, the stage is expected to write the same again
        same = self.manifest.finished_with(name, fingerprint, inputs, self.contents[name])
        new = combine([fingerprint, inputs])  # no identity that a later stage has read
        self.context.fingerprints[name] = self.manifest.identity(name) if same else new
        return self.done[name]

    def learn_contents(self, name: str) -> None:
        """Add the contents that were not known before a stage ran, such as the commit of a model it downloaded."""
        known = self.contents[name]
        if None in known.values():
            now = self._contents()[name]
            self.contents[name] = {key: digest or now[key] for key, digest in known.items()}

    def inputs(self, name: str) -> dict[str, str]:
        """The identities of the stages that a stage reads."""
        known, section = self.context.fingerprints, asdict(getattr(self.context.recipe, name))
        return {read: known[read] for read in reads(name, STAGES[name], section) if read in known}

    def adopt(self) -> None:
        """Complete the manifest of a run that an earlier version finished."""
        for name, done in self.done.items():
            if done and "files" not in self.manifest.stages[name]:
                self.manifest.adopt(name, self.contents[name])

    def log_edited(self) -> None:
        """Log the files that were edited since their stage wrote them."""
        for name in filter(self.done.get, self.done):
            for file in self.manifest.changed(name):
                path = self.context.folder / name / file
                log.warning(
                    "%s was edited by hand and is used as it is; to rebuild it, delete it and run: distill run", path
                )

    def _name_teacher(self, model: ModelSettings | None, digest: str | None) -> None:
        """Give other weights in the same folder another name: the answers in the ledgers are those of the first."""
        if model is None or digest is None or not Path(model.path).is_dir():
            return
        if self.manifest.models.setdefault(model.path, digest) != digest:
            self.context.variants[model.path] = digest


def _disk_failure(error: BaseException | None) -> str | None:
    """The disk error that caused an exception, if any: torch hides it in the context, Rust writers in the message."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            return error.strerror
        if (match := re.search(r"\(os error (\d+)\)", str(error))) and int(match[1]) in _DISK_ERRORS:
            return os.strerror(int(match[1]))
        error = error.__context__
    return None


def _run_stage(name: str, state: _State, tracker: Tracker) -> None:
    context, manifest, stage = state.context, state.manifest, STAGES[name]
    recipe, inputs, earlier = context.recipe, state.inputs(name), manifest.stages.get(name, {})
    resumes = earlier.get("fingerprint") == state.fingerprints.whole[name] or state.fingerprints.lengthens(
        name, earlier
    )
    resumes = resumes and manifest.same_inputs(name, inputs, state.contents[name])
    context.fingerprints[name] = state.fingerprints.whole[name]  # its identity is known when it has ended
    manifest.keep_edited(name)
    if not resumes:
        manifest.check_names(name)
        if name != "export":  # an export is kept until the next one is verified
            manifest.clear(name)
    context.foreign = manifest.foreign(name)
    (recipe.folder / name).mkdir(parents=True, exist_ok=True)
    write_text(recipe.folder / "recipe.yaml", to_yaml(recipe))
    began, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    previous = earlier.get("seconds", 0.0) if resumes else 0.0
    entry: dict[str, Any] = {
        "status": "running",
        **state.fingerprints.entry(name),
        "started": started,
        "inputs": inputs,
        "contents": state.contents[name],
        "outputs": [f"{name}/{output}" for output in stage.outputs],
        "versions": {library: version(library) for library in _LIBRARIES},
    }
    manifest.write(name, entry)
    gc.collect()
    memory.return_freed()
    memory.reset_peak()
    status = "failed"
    try:
        with tracker.stage(name, masked(recipe), inputs) as tracked:
            stage.run(context, tracked)
        status = "done"
    except NonFiniteError as error:
        raise RunError(f"{name}: {error}") from None
    finally:
        entry |= {"status": status, "seconds": round(previous + time.monotonic() - began, 1)}
        entry["peak_memory_mb"] = memory.peak_mb()
        state.learn_contents(name)
        manifest.write(name, manifest.ended(name, entry | {"contents": state.contents[name]}, context.foreign))
        state.digests.save()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run's folder for this process. Raises RunError if another process holds the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{folder} is in use by another process") from None
        yield
