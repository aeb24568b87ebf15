"""One training run with Lightning: resumable after a kill at any point, ends with the best weights in the module."""

import csv
import logging
import os
import pickle
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from distill import logs
from distill.errors import NonFiniteError, SettingsError
from distill.files import atomic_write
from distill.models.memory import memory_errors
from distill.training import processes
from distill.training.assistant import AssistantModule
from distill.training.datamodule import ReasoningDataModule
from distill.training.sharding import NAME as FSDP2
from distill.training.sharding import has_towers, unshard
from distill.training.shutdown import end_together, handle_sigterm, kill
from distill.training.trainer_arguments import extensions, with_defaults
from distill.training.zero3 import NAME as ZERO3
from distill.training.zero3 import ZeRO3Strategy

log = logging.getLogger(__name__)

_MEMORY_REMEDY = (
    "reduce the stage's batch_size and raise trainer.accumulate_grad_batches by the same factor, "
    "or reduce data.max_tokens or model.image_size"
)
_FAILURE = ".worker.part"
"""File in a training's folder in which a worker process describes its failure."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, so that a kill never leaves a truncated one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_write(Path(path), "wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        with _readable(Path(path)):
            checkpoint: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        # after a run's folder was moved or copied, the best checkpoint is beside this one, not in the old folder
        for state in checkpoint.get("callbacks", {}).values():
            for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
                if state.get(name):
                    state[name] = str(Path(path).with_name(Path(state[name]).name))
            if "best_k_models" in state:
                models = state["best_k_models"].items()
                state["best_k_models"] = {str(Path(path).with_name(Path(best).name)): score for best, score in models}
            if "dirpath" in state:
                state["dirpath"] = os.path.abspath(Path(path).parent)
        return checkpoint


class LatestCheckpoint(Checkpoint):
    """Saves the complete training state after each validation and each epoch.

    ModelCheckpoint's `save_last` saves only when the best metric improves. After a validation at the last batch of an
    epoch it saves a state from which Lightning skips the next epoch, so here the end of the epoch saves that state.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


class _EarlyStopping(EarlyStopping):
    """Ends a training after validations without improvement of what decides between the epochs."""

    def __init__(self, patience: int) -> None:
        super().__init__("val/selection", patience=patience, mode="max")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.wait_count >= self.patience:  # killed after its last validation
            trainer.should_stop = True


class _Process(L.Callback):
    """Sets up each process of a training: logging in those that ddp_spawn starts, and the handler of SIGTERM."""

    def __init__(self, main_process: int) -> None:
        self.main_process = main_process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        logs.configure()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        handle_sigterm(self.main_process)
        if not trainer.is_global_zero:
            logs.configure(main=False)


def fit(
    module: AssistantModule,
    data: ReasoningDataModule,
    folder: Path,
    arguments: Mapping[str, Any],
    loggers: Sequence[Logger] = (),
) -> L.Trainer:
    """Train to the end and load the best weights into the module; resumes from `folder/checkpoints/last.ckpt`.

    Writes `checkpoints/` and `metrics.csv`. The best weights have the highest validation accuracy, ties broken by
    the F1 of `tie_break`; for labels on a scale, the lowest mean absolute error.

    In a worker process, this function does not return (`processes.leave`). After a sharded training, the trained
    weights of the module are whole and on the CPU; it can be saved, not called.

    Raises:
        SettingsError: lightning.Trainer rejects a value of `arguments`.
        RunError: there is not enough memory for a step, an image or clip cannot be read, or a process of the
            training ended.
    """
    checkpoints = folder / "checkpoints"
    main_process = processes.begin(folder)
    worker = main_process is not None
    best = ModelCheckpoint(checkpoints, "best", monitor="val/selection", mode="max", enable_version_counter=False)
    last = checkpoints / "last.ckpt"
    earlier = _move_earlier_metrics(folder / "metrics.csv") if not worker else None
    arguments, callbacks, own_loggers = extensions(arguments)
    if module.settings.early_stopping:
        callbacks.append(_EarlyStopping(module.settings.early_stopping))
    callbacks += [_Process(main_process or os.getpid()), best, LatestCheckpoint(last)]
    extra = {"callbacks": callbacks, "logger": [CSVLogger(folder, name="", version=""), *loggers, *own_loggers]}
    try:
        trainer = _trainer(arguments, folder, **extra)
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise SettingsError(f"trainer: {' '.join(str(error).split())}") from error
    module.uses_all_weights = _uses_all_weights(module, data)
    if isinstance(trainer.strategy, ZeRO3Strategy) and not module.uses_all_weights:
        raise SettingsError(
            f"trainer.strategy: {ZERO3} needs a model of text alone, or an image in each post; use {FSDP2} instead"
        )
    if isinstance(trainer.strategy, DDPStrategy) and not module.uses_all_weights:
        # weights that a batch does not use, such as those of a vision or audio tower, would be waited for forever
        trainer.strategy._ddp_kwargs.setdefault("find_unused_parameters", True)
    if (twice := -len(data.train) % trainer.world_size) and not worker:
        message = "%d of %d posts are trained twice in each epoch, so that all %d devices have as many"
        log.info(message, twice, len(data.train), trainer.world_size)

    def children() -> Sequence[Any]:
        return getattr(trainer.strategy.launcher, "procs", ())

    try:
        with (
            end_together(children, main_process, folder / _FAILURE),
            _expected_errors(),
            memory_errors(lambda: module.current_ids, _MEMORY_REMEDY),
        ):
            trainer.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=True)
            unshard(module, trainer.strategy)
    except SystemExit as interruption:  # raised by Lightning after Ctrl-C or SIGTERM
        if worker:
            raise SystemExit(0) from None
        kill(children())
        cause = interruption.__context__  # Lightning exits when it handles a KeyboardInterrupt
        raise (type(cause) if isinstance(cause, KeyboardInterrupt) else KeyboardInterrupt) from None
    if worker:
        processes.leave()
    processes.end()
    if earlier is not None:
        _merge_metrics(earlier, folder / "metrics.csv")
    _load_best(module, checkpoints)
    return trainer


def _uses_all_weights(module: AssistantModule, data: ReasoningDataModule) -> bool:
    """Whether each step and validation uses all weights of the model, those of the towers too."""
    encoder = module.backbone.encoder
    if not has_towers(module.model):
        return True
    images = encoder.reads_images and all(post.images for post in [*data.train, *data.validation])
    return images and not encoder.media.audio and not data.drop


def _trainer(arguments: Mapping[str, Any], folder: Path, **extra: Any) -> L.Trainer:
    return L.Trainer(
        **with_defaults({"enable_progress_bar": False} if logs.quiet() else {}, arguments),
        default_root_dir=folder,
        plugins=[AtomicCheckpointIO()],
        use_distributed_sampler=False,
        **extra,
    )


@contextmanager
def _expected_errors() -> Iterator[None]:
    """Raise SettingsError or RunError for what a training may fail with, in this or another process."""
    try:
        yield
    except Exception as error:
        if (failure := processes.expected_failure(error)) is not None:
            raise failure from error
        raised = isinstance(error, torch.multiprocessing.ProcessRaisedException)
        problem = processes.last_message(error) if raised else str(error)
        if isinstance(error, MisconfigurationException) or "val_check_interval" in problem:  # there are fewer batches
            raise SettingsError(f"trainer: {re.sub(r'^[A-Za-z]+: +', '', ' '.join(problem.split()))}") from error
        if raised:
            raise RuntimeError(" ".join(problem.split())) from error
        raise


@contextmanager
def _readable(checkpoint: Path) -> Iterator[None]:
    """Raise SettingsError if a checkpoint is damaged."""
    try:
        yield
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
        raise SettingsError(
            f"{checkpoint} is damaged ({type(error).__name__}); delete its folder and run: distill run"
        ) from error


def _load_best(module: AssistantModule, checkpoints: Path) -> None:
    path = checkpoints / "best.ckpt"
    if path.exists():  # fast_dev_run writes no checkpoint
        with _readable(path):
            best = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        weights = dict(module.named_parameters())
        with torch.no_grad():  # not load_state_dict: layers that were sharded want shards
            for name, value in best.items():
                weights[name].copy_(value)
    for name, values in module.named_parameters():  # a step after the last validation may have broken them
        if values.requires_grad and not values.isfinite().all():
            raise NonFiniteError(f"after the last step, the weights {name} are")


def _move_earlier_metrics(path: Path) -> Path | None:
    """Rename the metrics of a killed run, which the logger would overwrite, and return their path."""
    earlier = path.with_name("metrics.earlier.csv")
    if path.exists() and earlier.exists():
        _merge_metrics(earlier, path)
    if path.exists():
        os.replace(path, earlier)
    return earlier if earlier.exists() else None


def _merge_metrics(earlier: Path, later: Path) -> None:
    """Prepend the rows of `earlier` to `later`, without the steps that the resumed run repeated; delete `earlier`."""
    parts: list[list[dict[str, Any]]] = []
    for path in (earlier, later):
        if not path.exists():  # the run was complete and logged nothing
            parts.append([])
            continue
        with path.open(newline="") as file:  # a kill may have truncated the last row
            parts.append([row for row in csv.DictReader(file) if (row.get("step") or "").isdigit()])
    begin = min((int(row["step"]) for row in parts[1]), default=sys.maxsize)
    rows = [row for row in parts[0] if int(row["step"]) < begin] + parts[1]
    names = sorted({name for row in rows for name in row})  # the order of CSVLogger
    with atomic_write(later) as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    earlier.unlink()
