"""The arguments of lightning.Trainer in a recipe: defaults, ranges, and a trial before any stage runs."""

import functools
import inspect
import logging
import re
from collections.abc import Mapping
from typing import Any

import jsonargparse
import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from distill.errors import SettingsError
from distill.settings import Range, parse_error_message
from distill.training.assistant import TrainSettings

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


def check_trainer(arguments: Mapping[str, Any], field: str) -> None:
    """Raise SettingsError for an argument of lightning.Trainer that is unknown, set by `fit`, of another type, or out
    of its range."""
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
    try:
        _parser().parse_object({"trainer": dict(arguments)})
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise SettingsError(parse_error_message(TrainSettings, error).replace("trainer", field, 1)) from None


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
    messages = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = messages.level
    messages.setLevel(logging.ERROR)  # nothing is trained yet
    hardware = {"accelerator": "cpu", "devices": 1} if on_cpu else {}
    try:
        arguments = with_defaults(given, hardware)
        L.Trainer(
            **arguments,
            default_root_dir="unused",
            plugins=[TorchCheckpointIO()],
            callbacks=[ModelCheckpoint()],
            logger=[],
        )
    except Exception as error:  # noqa: BLE001 (of many types; each is the answer to a setting)
        return " ".join(str(error).split()) or type(error).__name__
    finally:
        messages.setLevel(level)
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
    return None


@functools.cache
def _parser() -> jsonargparse.ArgumentParser:
    options = jsonargparse.ArgumentParser(exit_on_error=False)
    options.add_class_arguments(L.Trainer, "trainer")
    return options
