"""One training run with Lightning: resumed where it stopped, left with the best weights in the module."""

import csv
import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from distill.errors import SettingsError
from distill.files import atomic_write
from distill.training.assistant import AssistantModule
from distill.training.datamodule import ReasoningDataModule

DEFAULTS: dict[str, Any] = {
    "max_epochs": 20,
    "check_val_every_n_epoch": 1,
    "enable_model_summary": False,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
}
"""What the Trainer gets unless a recipe says otherwise."""

_OURS = ("logger", "callbacks", "plugins", "default_root_dir", "use_distributed_sampler", "enable_checkpointing")
_ACTIVE = "DISTILL_ACTIVE_FIT"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, so that a kill never leaves a torn one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_write(Path(path), "wb") as file:
            torch.save(checkpoint, file)


class LatestCheckpoint(Checkpoint):
    """Saves the whole state of training after each validation and each epoch.

    ModelCheckpoint's `save_last` does so only when the best improves, and with a validation at an epoch's last batch it
    saves a state from which Lightning skips the next epoch; that one waits for the epoch's end here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def with_defaults(*sections: Mapping[str, Any]) -> dict[str, Any]:
    """Trainer arguments: later sections over earlier ones over DEFAULTS; `max_steps` alone has no epoch limit."""
    given = {name: value for section in sections for name, value in section.items()}
    if "max_steps" in given:
        given = {"max_epochs": -1} | given
    return DEFAULTS | given


def fits_here(folder: Path) -> bool:
    """Whether this process trains in `folder`.

    A strategy that starts processes by running the command again (ddp) leads them through every earlier training too;
    they skip all but the one that started them.
    """
    return not _started() or os.environ.get(_ACTIVE) == str(folder)


def fit(
    module: AssistantModule,
    data: ReasoningDataModule,
    folder: Path,
    arguments: Mapping[str, Any],
    loggers: Sequence[Logger] = (),
) -> L.Trainer:
    """Train to the end, or go on from `folder/checkpoints/last.ckpt`; the module ends with its best weights.

    Writes `checkpoints/` and `metrics.csv`. Best is the highest validation accuracy, ties by macro F1; on a scale it is
    the lowest mean absolute error.

    A process that the Trainer started ends here when training does; it never returns.

    Raises:
        SettingsError: lightning.Trainer refuses a value of `arguments`.
    """
    checkpoints = folder / "checkpoints"
    started = _started()
    os.environ[_ACTIVE] = str(folder)
    best = ModelCheckpoint(checkpoints, "best", monitor="val/selection", mode="max", enable_version_counter=False)
    last = checkpoints / "last.ckpt"
    earlier = _set_aside(folder / "metrics.csv") if not started else None
    try:
        trainer = L.Trainer(
            **with_defaults(arguments),
            default_root_dir=folder,
            callbacks=[best, LatestCheckpoint(last)],
            plugins=[AtomicCheckpointIO()],
            logger=[CSVLogger(folder, name="", version=""), *loggers],
            use_distributed_sampler=False,
        )
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise SettingsError(f"trainer: {' '.join(str(error).split())}") from error
    try:
        trainer.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=True)
    except SystemExit:  # so Lightning ends after Ctrl-C
        raise KeyboardInterrupt from None
    if started:
        sys.exit(0)
    _leave_group()
    if earlier is not None:
        _join(earlier, folder / "metrics.csv")
    _load_best(module, checkpoints)
    return trainer


def check_trainer(arguments: Mapping[str, Any], field: str) -> None:
    """Raises SettingsError for a name that lightning.Trainer does not take, or that this house sets itself."""
    known = [name for name in inspect.signature(L.Trainer.__init__).parameters if name not in ("self", *_OURS)]
    for name in arguments:
        if name not in known:
            raise SettingsError(f"{field}.{name} is not a setting of lightning.Trainer; it takes {', '.join(known)}")


def active_folder() -> Path | None:
    """Where the training goes on for which this process was started; None in the process that the user started."""
    return Path(os.environ[_ACTIVE]) if _started() else None


def _started() -> bool:
    return int(os.environ.get("LOCAL_RANK", "0")) > 0


def _load_best(module: AssistantModule, checkpoints: Path) -> None:
    path = checkpoints / "best.ckpt"
    if path.exists():  # a dry run (fast_dev_run) leaves none
        module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"], strict=False)


def _leave_group() -> None:
    """End what Lightning keeps until the process ends, so that the next fit starts its own processes."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in (_ACTIVE, "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def _set_aside(path: Path) -> Path | None:
    """Keep the curve of a killed run, which the logger would begin anew."""
    aside = path.with_name("metrics.earlier.csv")
    if path.exists() and aside.exists():
        _join(aside, path)
    if path.exists():
        os.replace(path, aside)
    return aside if aside.exists() else None


def _join(earlier: Path, later: Path) -> None:
    """Put the rows of the earlier part before those of the later one that went on from its last checkpoint."""
    parts: list[list[dict[str, Any]]] = []
    for path in (earlier, later):
        if not path.exists():  # all epochs were done: there was nothing to go on with
            parts.append([])
            continue
        with path.open(newline="") as file:  # a kill may have torn the last row
            parts.append([row for row in csv.DictReader(file) if (row.get("step") or "").isdigit()])
    begin = min((int(row["step"]) for row in parts[1]), default=sys.maxsize)
    rows = [row for row in parts[0] if int(row["step"]) < begin] + parts[1]
    names = sorted({name for row in rows for name in row})  # as the logger orders them
    with atomic_write(later) as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    earlier.unlink()
