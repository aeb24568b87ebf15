"""The wandb run of one stage. wandb errors never stop a chain.

Every call to wandb is guarded: the first error (not installed, no network, full disk, expired key) logs one warning and
disables tracking for the rest of the stage.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import WandbLogger

from distill.data.images import ImageError, decode
from distill.files import finite
from distill.tracking.lineage import UPLOADS, Edge, Lineage
from distill.tracking.settings import TrackingSettings, wandb_name

_THUMBNAIL_SIDE = 256

_log = logging.getLogger(__name__)


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

    def __init__(self, run: Any, guard: Guard, settings: TrackingSettings, group: str, folder: Path) -> None:
        self._run = run
        self._guard = guard
        self._settings = settings
        self._group = group
        self._folder = folder
        self._lineage = Lineage(folder)
        self._inputs: list[str] = []

    @property
    def active(self) -> bool:
        """Whether tracking is enabled and no call has failed."""
        return self._run is not None and not self._guard.failed

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log metrics at a training step; by default at the next step.

        Only numbers are logged, those in nested mappings under `outer/inner`. Unknown values (None, not finite) are
        left out.
        """
        if self.active and (known := dict(_numbers(finite(metrics)))):
            self._guard(self._run.log, known, step=step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log a table whose columns are the keys of the first row. A Path is shown as a thumbnail of that image."""
        if self.active and rows:
            self._guard(self._table, name, rows)

    def curves(
        self, name: str, title: str, x: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    ) -> None:
        """Log a chart with one line for each name, given by the values on both axes; `x` names the horizontal one."""
        if self.active and lines:
            self._guard(self._curves, name, title, x, lines)

    def use_artifact(self, name: str) -> None:
        """Record that this stage uses the version of an artifact that an earlier stage of the chain logged last.

        The name is added to `inputs` in the run's config. Online, the version is also linked; otherwise `distill sync`
        links it later.
        """
        if self.active:
            self._guard(self._use_artifact, name)

    def log_artifact(self, name: str, type: str, paths: Sequence[Path]) -> None:
        """Log files that this stage wrote, and the content of folders; those that do not exist are left out.

        Online, the files are uploaded without a local copy. Offline, they are kept until `distill sync`: files of
        weights as hard links, others as copies.
        """
        if self.active and any(path.exists() for path in paths):
            self._guard(self._log_artifact, name, type, [path for path in paths if path.exists()])

    def lightning_loggers(self, prefix: str = "") -> list[WandbLogger]:
        """A Lightning logger for this run; none if tracking is disabled.

        Args:
            prefix: of the names of metrics, for a second training of the stage.
        """
        logger = self._guard(GuardedLogger, self._run, self._guard, self._folder, prefix) if self.active else None
        return [] if logger is None else [logger]

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
        self._run.log({name: wandb.Table(columns=columns, data=data, allow_mixed_types=True)})

    def _curves(self, name: str, title: str, x: str, lines: Mapping[str, tuple[Any, Any]]) -> None:
        import wandb

        xs, ys = ([[*line[axis]] for line in lines.values()] for axis in (0, 1))
        self._run.log({name: wandb.plot.line_series(xs, ys, keys=[*lines], title=title, xname=x)})

    def _use_artifact(self, name: str) -> None:
        artifact = wandb_name(f"{self._group}-{name}")
        self._inputs.append(artifact)
        self._run.config.update({"inputs": self._inputs}, allow_val_change=True)
        if (digest := self._lineage.digest(artifact)) is None:
            return
        linked = False
        if not self._run.offline:
            try:
                self._run.use_artifact(f"{artifact}:{digest}")
                linked = True
            except Exception as error:  # noqa: BLE001 (for example logged offline and not sent yet)
                _log.info("wandb has no artifact %s: %s", name, error)
        self._add_edge("uses", artifact, digest, linked)

    def _log_artifact(self, name: str, type: str, paths: Sequence[Path]) -> None:
        import wandb

        artifact = wandb.Artifact(wandb_name(f"{self._group}-{name}"), type=type)
        for path, entry in _files(paths):
            if self._settings.artifacts == "reference":
                artifact.add_reference(path.resolve().as_uri(), name=entry)
            else:
                source = self._keep(path, f"{name}/{entry}") if self._run.offline else path
                artifact.add_file(str(source), name=entry, skip_cache=True, policy="immutable")
        digest = artifact.digest
        self._run.log_artifact(artifact, aliases=["latest", digest])
        self._add_edge("logs", artifact.name, digest, not self._run.offline)

    def _keep(self, path: Path, entry: str) -> Path:
        """A second name of a file, or a copy, that stays as it is when the stage runs again."""
        kept = self._folder / UPLOADS / self._run.id / entry
        kept.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            with suppress(OSError):  # a file system without hard links
                os.link(path, kept)
                return kept
        shutil.copyfile(path, kept)
        return kept

    def _add_edge(self, kind: Literal["uses", "logs"], artifact: str, digest: str, linked: bool) -> None:
        run = self._run
        place = (run.project, run.entity or self._settings.entity)
        self._lineage.add(Edge(kind, self._guard.stage, run.id, artifact, digest, *place, linked))


class GuardedLogger(WandbLogger):
    """Lightning's wandb logger, whose errors do not stop the training."""

    LOGGER_JOIN_CHAR = "/"

    def __init__(self, run: Any, guard: Guard, folder: Path, prefix: str = "") -> None:
        super().__init__(experiment=run, save_dir=folder, project=run.project, name=run.name, prefix=prefix)
        self._guard = guard

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._guard(super().log_metrics, metrics, step)

    def log_hyperparams(self, params: Any) -> None:
        self._guard(super().log_hyperparams, params)

    def finalize(self, status: str) -> None:
        self._guard(super().finalize, status)


def _thumbnail(path: Path) -> Any:
    """A small wandb image; None if the file cannot be decoded."""
    import wandb

    try:
        image = decode(path)
    except ImageError:
        return None
    image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    return wandb.Image(image)


def _files(paths: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """The files of an artifact and their names in it; the content of a folder is at its root."""
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                yield file, file.relative_to(path).as_posix() if path.is_dir() else file.name


def _numbers(metrics: Mapping[str, Any], outer: str = "") -> Iterator[tuple[str, int | float]]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{outer}{name}/")
        elif isinstance(value, int | float):
            yield f"{outer}{name}", value
