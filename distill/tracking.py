"""Tracking with wandb: one group per chain, one run per stage, artifacts between them. wandb errors never stop a chain.

Every call to wandb is guarded: the first error (not installed, no network, full disk, expired key) logs one warning and
disables tracking for the rest of the stage.
"""

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from distill.data.images import ImageError, decode
from distill.files import finite
from distill.masking import mask
from distill.settings import Settings

_THUMBNAIL_SIDE = 256
_INIT_SECONDS, _FINISH_SECONDS = 30, 300
_NAME_LENGTH, _GROUP_LENGTH = 128, 80  # wandb's limit, and what leaves room in it for the name of a stage or artifact

_log = logging.getLogger(__name__)


@dataclass
class TrackingSettings(Settings):
    """Experiment tracking with Weights & Biases (wandb)."""

    project: str = "distill"
    """wandb project."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: the value of WANDB_MODE if it is set, otherwise online if the user is logged in, otherwise offline."""
    group: str = ""
    """Group of the runs of this chain; empty: the recipe's name."""
    entity: str = ""
    """wandb user or team; empty: the default of the login."""


class Guard:
    """Calls wandb functions until the first error; after it, calls do nothing."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.failed = False

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the result of the call; None if it fails or an earlier call failed."""
        if self.failed:
            return None
        try:
            return call(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 (no error of wandb may stop the chain)
            self.failed = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            _log.warning("wandb is disabled for the rest of stage %s: %s", self.stage, reason)
            return None


class StageRun:
    """The wandb run of one stage. All methods do nothing if tracking is disabled."""

    def __init__(self, run: Any, guard: Guard, group: str, folder: Path) -> None:
        self._run = run
        self._guard = guard
        self._group = group
        self._folder = folder
        self._inputs: list[str] = []

    @property
    def active(self) -> bool:
        """Whether tracking is enabled and no call has failed."""
        return self._run is not None and not self._guard.failed

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log metrics at a training step; by default at the next step. Unknown values (not finite) are left out."""
        if self.active:
            known = {name: value for name, value in finite(metrics).items() if value is not None}
            self._guard(self._run.log, known, step=step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log a table whose columns are the keys of the first row. A Path is shown as a thumbnail of that image."""
        if self.active and rows:
            self._guard(self._table, name, rows)

    def use_artifact(self, name: str) -> None:
        """Record that this stage uses an artifact that an earlier stage of the chain logged.

        The name is added to `inputs` in the run's config. Online, the artifact is also linked, which needs the server.
        """
        if self.active:
            self._guard(self._use_artifact, name)

    def log_artifact(self, name: str, type: str, path: Path) -> None:
        """Log a file or folder that this stage wrote. It is uploaded without a local copy."""
        if self.active:
            self._guard(self._log_artifact, name, type, path)

    def lightning_logger(self) -> WandbLogger | None:
        """A Lightning logger for this run; None if tracking is disabled."""
        return self._guard(GuardedLogger, self._run, self._guard, self._folder) if self.active else None

    def finish(self, exit_code: int = 0) -> None:
        """End the run, also after a failed call, so that it is not active in the next stage."""
        run, self._run = self._run, None
        if run is not None and not self._guard.failed:
            self._guard(run.finish, exit_code=exit_code)
        elif run is not None:
            with suppress(Exception):
                run.finish(exit_code=1)

    def _table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        def cell(value: Any) -> Any:
            return _thumbnail(value) if isinstance(value, Path) else value

        columns: list[str | int] = list(rows[0])
        data = [[cell(row.get(str(column))) for column in columns] for row in rows]
        self._run.log({name: wandb.Table(columns=columns, data=data)})

    def _use_artifact(self, name: str) -> None:
        self._inputs.append(self._artifact_name(name))
        self._run.config.update({"inputs": self._inputs}, allow_val_change=True)
        if not self._run.offline:
            try:
                self._run.use_artifact(f"{self._artifact_name(name)}:latest")
            except Exception as error:  # noqa: BLE001 (for example logged offline: skip the link)
                _log.info("wandb has no artifact %s: %s", name, error)

    def _log_artifact(self, name: str, type: str, path: Path) -> None:
        import wandb

        artifact = wandb.Artifact(self._artifact_name(name), type=type)
        add = artifact.add_dir if path.is_dir() else artifact.add_file
        add(str(path), skip_cache=True, policy="immutable")
        self._run.log_artifact(artifact)

    def _artifact_name(self, name: str) -> str:
        return wandb_name(f"{self._group}-{name}")


class Tracker:
    """Starts the wandb runs of one chain. Local files of wandb are written to `<folder>/wandb`."""

    def __init__(self, settings: TrackingSettings, folder: Path, name: str) -> None:
        """Initialise the tracker.

        Args:
            folder: the chain's folder.
            name: name of the recipe, the default group.
        """
        self.settings = settings
        self.folder = folder
        self.group = _shorten(settings.group or name, _GROUP_LENGTH)

    @contextmanager
    def stage(self, stage: str, config: Mapping[str, Any]) -> Iterator[StageRun]:
        """Start a wandb run for one stage; it ends with the block, and is marked as failed if the block raises."""
        guard = Guard(stage)
        with _environment(self.folder / "wandb"):
            with _masked_arguments():
                run = guard(self._start, stage, config) if getattr(rank_zero_only, "rank", 0) == 0 else None
            tracked = StageRun(run, guard, self.group, self.folder)
            try:
                yield tracked
            except BaseException:
                tracked.finish(exit_code=1)
                raise
            tracked.finish()

    def _start(self, stage: str, config: Mapping[str, Any]) -> Any:
        mode = self.settings.mode
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE", "auto")  # type: ignore[assignment]
        if mode == "disabled":
            return None
        import wandb

        if mode not in ("offline", "dryrun"):
            logged_in = wandb.login(prompt=False, verify=False)
            if mode == "online" and not logged_in:
                _log.warning("wandb: not logged in (wandb login, or WANDB_API_KEY); stage %s runs offline", stage)
            mode = "online" if logged_in else "offline"
        else:
            mode = "offline"
        self.folder.mkdir(parents=True, exist_ok=True)
        return wandb.init(
            project=self.settings.project,
            entity=self.settings.entity or None,
            group=self.group,
            job_type=stage,
            name=f"{self.group}-{stage}",
            config=dict(config),
            dir=str(self.folder),
            mode=mode,
            settings=wandb.Settings(
                silent=True,
                console="off",
                reinit="create_new",
                init_timeout=_INIT_SECONDS,
                finish_timeout=_FINISH_SECONDS,  # limits the wait without network; `wandb sync` uploads later
            ),
        )


def not_logged_in(settings: TrackingSettings) -> bool:
    """Whether the settings ask for online runs although nobody is logged in to wandb."""
    mode = os.environ.get("WANDB_MODE", "auto") if settings.mode == "auto" else settings.mode
    if mode != "online":
        return False
    try:
        import wandb

        return not wandb.login(prompt=False, verify=False)
    except Exception:  # noqa: BLE001 (no error of wandb may stop the chain)
        return True


class GuardedLogger(WandbLogger):
    """Lightning's wandb logger, whose errors do not stop the training."""

    def __init__(self, run: Any, guard: Guard, folder: Path) -> None:
        super().__init__(experiment=run, save_dir=folder, project=run.project, name=run.name)
        self._guard = guard

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._guard(super().log_metrics, metrics, step)

    def log_hyperparams(self, params: Any) -> None:
        self._guard(super().log_hyperparams, params)

    def finalize(self, status: str) -> None:
        self._guard(super().finalize, status)


def wandb_name(text: str) -> str:
    """A name that wandb accepts for an artifact: ASCII letters, digits, '-', '_' and '.', at most 128 of them.

    Two texts with different letters outside ASCII have different names.
    """
    ascii_text = re.sub(r"[^A-Za-z0-9_.-]+", "-", text)
    return _shorten(ascii_text if text.isascii() else f"{ascii_text}-{_digest(text)}", _NAME_LENGTH)


def _shorten(text: str, length: int) -> str:
    """A text of at most `length` characters; a longer one ends with a hash of itself."""
    return text if len(text) <= length else f"{text[: length - 9]}-{_digest(text)}"


def _digest(text: str) -> str:
    return sha256(text.encode("utf-8", "replace")).hexdigest()[:8]


@contextmanager
def _masked_arguments() -> Iterator[None]:
    """Mask passwords in the command line, which wandb records; worker processes start with the real one."""
    arguments, sys.argv = sys.argv, mask(sys.argv)
    try:
        yield
    finally:
        sys.argv = arguments


@contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """Set variables that silence wandb and keep its files in the run's folder; variables already set are kept."""
    variables = {"WANDB_SILENT": "true", "WANDB_DATA_DIR": str(folder), "WANDB_CACHE_DIR": str(folder / "cache")}
    added = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _thumbnail(path: Path) -> Any:
    """A small wandb image; None if the file cannot be decoded."""
    import wandb

    try:
        image = decode(path)
    except ImageError:
        return None
    image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    return wandb.Image(image)
