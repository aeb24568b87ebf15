"""One training run with Lightning: resumable after a kill at any point, ends with the best weights in the module."""

import csv
import inspect
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
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from distill.errors import NonFiniteError, SettingsError
from distill.files import atomic_write
from distill.models.memory import memory_errors
from distill.settings import Range
from distill.training.assistant import AssistantModule
from distill.training.datamodule import ReasoningDataModule
from distill.training.shutdown import end_on_sigterm

DEFAULTS: dict[str, Any] = {
    "max_epochs": 20,
    "check_val_every_n_epoch": 1,
    "enable_model_summary": False,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
}
"""Default arguments of lightning.Trainer; a recipe overrides them."""

_RESERVED = (
    "logger", "callbacks", "plugins", "default_root_dir", "use_distributed_sampler", "enable_checkpointing",
    "overfit_batches",
)  # fmt: skip
"""Trainer arguments that `fit` sets itself, or that its stateful loaders do not support."""

_MEMORY_REMEDY = (
    "reduce the stage's batch_size and raise trainer.accumulate_grad_batches by the same factor, "
    "or reduce data.max_tokens or model.image_size"
)
_RANGES = {
    "max_epochs": Range(1),
    "max_steps": Range(1),
    "min_epochs": Range(0),
    "min_steps": Range(0),
    "devices": Range(1, 1024),
    "num_nodes": Range(1, 100_000),
    "accumulate_grad_batches": Range(1),
    "check_val_every_n_epoch": Range(1),
    "val_check_interval": Range(0, above=True),
    "limit_train_batches": Range(0, above=True),
    "limit_val_batches": Range(0, above=True),
    "limit_test_batches": Range(0),
    "limit_predict_batches": Range(0),
    "fast_dev_run": Range(0),
    "log_every_n_steps": Range(0),
    "gradient_clip_val": Range(0),
    "num_sanity_val_steps": Range(0),
    "reload_dataloaders_every_n_epochs": Range(0),
}
"""What Trainer arguments take. Lightning checks some of them only in `fit`, after other stages have run."""

_UNLIMITED = {"max_epochs": -1, "max_steps": -1, "devices": -1, "num_sanity_val_steps": -1}
"""Values of Trainer arguments that mean all or no limit."""

_HARDWARE = ("accelerator", "devices", "num_nodes", "strategy", "precision", "sync_batchnorm")
"""Trainer arguments that another machine may accept."""

_ACTIVE_FOLDER = "DISTILL_ACTIVE_FIT"
"""Environment variable that passes the folder of the running training to worker processes."""

_MAIN_PROCESS = "DISTILL_MAIN_PROCESS"
"""Environment variable that passes the id of the main process to worker processes."""


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


def with_defaults(*sections: Mapping[str, Any]) -> dict[str, Any]:
    """Merge Trainer arguments: later sections override earlier ones, all override DEFAULTS.

    `max_steps` without `max_epochs` removes the epoch limit. A `max_epochs` of null is no value.
    """
    given = {name: value for section in sections for name, value in section.items()}
    if given.get("max_epochs", 0) is None:
        del given["max_epochs"]
    if given.get("max_steps", -1) != -1:
        given = {"max_epochs": -1} | given
    return DEFAULTS | given


def should_train(folder: Path) -> bool:
    """Whether this process takes part in the training in `folder`.

    A strategy that starts worker processes by running the command again (ddp) makes them reach every earlier training
    as well; a worker skips all trainings except the one that started it.
    """
    return not _is_worker() or os.environ.get(_ACTIVE_FOLDER) == str(folder)


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

    In a worker process started by the Trainer, this function exits the process after training and does not return.

    Raises:
        SettingsError: lightning.Trainer rejects a value of `arguments`.
        RunError: there is not enough memory for a step.
    """
    checkpoints = folder / "checkpoints"
    worker = _is_worker()
    os.environ[_ACTIVE_FOLDER] = str(folder)
    parent = int(os.environ[_MAIN_PROCESS]) if worker else None
    if not worker:
        os.environ[_MAIN_PROCESS] = str(os.getpid())
    best = ModelCheckpoint(checkpoints, "best", monitor="val/selection", mode="max", enable_version_counter=False)
    last = checkpoints / "last.ckpt"
    earlier = _move_earlier_metrics(folder / "metrics.csv") if not worker else None
    extra = {"callbacks": [best, LatestCheckpoint(last)], "logger": [CSVLogger(folder, name="", version=""), *loggers]}
    try:
        trainer = _trainer(arguments, folder, **extra)
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise SettingsError(f"trainer: {' '.join(str(error).split())}") from error
    if isinstance(trainer.strategy, DDPStrategy) and any(not sample.images for sample in data.train):
        # weights that a batch does not use, such as those of the vision tower, would be waited for forever
        trainer.strategy._ddp_kwargs.setdefault("find_unused_parameters", True)
    try:
        with (
            end_on_sigterm(lambda: _children(trainer), parent),
            memory_errors(lambda: module.current_ids, _MEMORY_REMEDY),
        ):
            trainer.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=True)
    except SystemExit:  # raised by Lightning after Ctrl-C or SIGTERM
        raise KeyboardInterrupt from None
    except NonFiniteError:
        if worker:  # the main process raises the same error; a failed worker would kill it first
            sys.exit(0)
        raise
    except (ValueError, MisconfigurationException) as error:
        if isinstance(error, ValueError) and "val_check_interval" not in str(error):
            raise
        raise SettingsError(f"trainer: {' '.join(str(error).split())}") from error  # more batches than there are
    except torch.multiprocessing.ProcessRaisedException as error:  # ddp_spawn
        if "NonFiniteError: " not in str(error):
            raise
        raise _from_worker(str(error)) from None
    if worker:
        sys.exit(0)
    _end_distributed()
    if earlier is not None:
        _merge_metrics(earlier, folder / "metrics.csv")
    _load_best(module, checkpoints)
    return trainer


def check_trainer(arguments: Mapping[str, Any], field: str) -> None:
    """Raise SettingsError for an argument of lightning.Trainer that is unknown, set by `fit`, or out of its range."""
    known = [name for name in inspect.signature(L.Trainer.__init__).parameters if name not in ("self", *_RESERVED)]
    for name, value in arguments.items():
        if name not in known:
            raise SettingsError(f"{field}.{name} is not a setting of lightning.Trainer; it takes {', '.join(known)}")
        if isinstance(value, int | float) and not isinstance(value, bool) and value != _UNLIMITED.get(name):
            problem = _RANGES.get(name, Range()).problem(value)
            if problem and name in _UNLIMITED:
                problem += f", or {_UNLIMITED[name]}"
            if problem:
                raise SettingsError(f"{field}.{name} {problem}")


def try_trainer(shared: Mapping[str, Any], own: Mapping[str, Any], stage: str, *, on_cpu: bool = False) -> None:
    """Raise SettingsError naming the argument that lightning.Trainer refuses for the training of a stage.

    Args:
        shared: arguments in the recipe's `trainer`.
        own: arguments in the stage's `trainer`.
        on_cpu: replace the arguments that depend on the hardware, which may be that of another machine.
    """
    given = {name: value for name, value in {**shared, **own}.items() if not on_cpu or name not in _HARDWARE}
    if (problem := _refusal(given, on_cpu)) is None:
        return
    culprits = [name for name in given if _refusal({n: v for n, v in given.items() if n != name}, on_cpu) is None]
    culprits += [name for name in given if re.search(rf"\b{name}\b", problem)]
    field = f"{stage}.trainer" if not culprits or culprits[0] in own else "trainer"
    raise SettingsError(f"{'.'.join([field, *culprits[:1]])}: {problem}")


def _refusal(given: Mapping[str, Any], on_cpu: bool) -> str | None:
    """What lightning.Trainer says against arguments; None if it takes them."""
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    hardware = {"accelerator": "cpu", "devices": 1} if on_cpu else {}
    try:
        _trainer({**given, **hardware}, Path("unused"), callbacks=[ModelCheckpoint()], logger=[])
    except Exception as error:  # noqa: BLE001 (of many types; each is the answer to a setting)
        return " ".join(str(error).split()) or type(error).__name__
    finally:
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
    return None


def _trainer(arguments: Mapping[str, Any], folder: Path, **extra: Any) -> L.Trainer:
    return L.Trainer(
        **with_defaults(arguments),
        default_root_dir=folder,
        plugins=[AtomicCheckpointIO()],
        use_distributed_sampler=False,
        **extra,
    )


def worker_folder() -> Path | None:
    """Return the folder of the training that started this worker process; None in the process that the user started."""
    return Path(os.environ[_ACTIVE_FOLDER]) if _is_worker() else None


def _is_worker() -> bool:
    return int(os.environ.get("LOCAL_RANK", "0")) > 0


@contextmanager
def _readable(checkpoint: Path) -> Iterator[None]:
    """Raise SettingsError if a checkpoint is damaged."""
    try:
        yield
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
        raise SettingsError(
            f"{checkpoint} is damaged ({type(error).__name__}); delete its folder and run: distill run"
        ) from error


def _children(trainer: L.Trainer) -> list[int]:
    """Ids of the worker processes that the Trainer has started."""
    return [process.pid for process in getattr(trainer.strategy.launcher, "procs", ())]


def _from_worker(traceback: str) -> NonFiniteError:
    """The error that a worker process of ddp_spawn raised, from its traceback."""
    error = NonFiniteError("")
    error.args = (traceback.rpartition("NonFiniteError: ")[2].strip(),)
    return error


def _load_best(module: AssistantModule, checkpoints: Path) -> None:
    path = checkpoints / "best.ckpt"
    if path.exists():  # fast_dev_run writes no checkpoint
        with _readable(path):
            best = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        module.load_state_dict(best, strict=False)
    for name, weights in module.named_parameters():  # a step after the last validation may have broken them
        if weights.requires_grad and not weights.isfinite().all():
            raise NonFiniteError(f"after the last step, the weights {name} are")


def _end_distributed() -> None:
    """Destroy the process group and Lightning's environment variables, so that the next fit starts its own workers."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in (_ACTIVE_FOLDER, _MAIN_PROCESS, "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


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
