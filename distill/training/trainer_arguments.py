"""The arguments of lightning.Trainer in a recipe: defaults, ranges, and a trial before any stage runs."""

import copy
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
from lightning.pytorch.loggers import Logger

from distill.errors import SettingsError
from distill.settings import Range, parse_error_message
from distill.training import processes, sharding
from distill.training.assistant import TrainSettings
from distill.training.schedules import DECAYING

DEFAULTS: dict[str, Any] = {
    "max_epochs": 20,
    "check_val_every_n_epoch": 1,
    "enable_model_summary": False,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
}
"""Default arguments of lightning.Trainer; a recipe overrides them."""

_RESERVED = (
    "logger", "plugins", "default_root_dir", "use_distributed_sampler", "enable_checkpointing",
    "overfit_batches",
)  # fmt: skip
"""Trainer arguments that `fit` sets itself, or that its stateful loaders do not support."""

_EXTENSIONS: dict[str, Any] = {"callbacks": L.Callback, "loggers": Logger}
"""Further arguments: lists of classes by `class_path` and `init_args`, which are added to those that `fit` sets."""

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


def check_schedule(settings: TrainSettings, shared: Mapping[str, Any], stage: str) -> None:
    """Raise SettingsError if the learning rate falls until the last step, and the number of steps has no limit.

    Args:
        shared: arguments in the recipe's `trainer`.
    """
    arguments = with_defaults(shared, settings.trainer)
    unlimited = arguments.get("max_epochs") == -1 and arguments.get("max_steps") in (None, -1)
    if settings.schedule in DECAYING and unlimited:
        raise SettingsError(f"{stage}.schedule {settings.schedule} needs trainer.max_epochs or trainer.max_steps")


def check_trainer(arguments: Mapping[str, Any], field: str) -> None:
    """Raise SettingsError for an argument of lightning.Trainer that is unknown, set by `fit`, of another type, or out
    of its range."""
    known = [name for name in inspect.signature(L.Trainer.__init__).parameters if name not in ("self", *_RESERVED)]
    known += [name for name in _EXTENSIONS if name not in known]
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
        _parser().parse_object({"trainer": {k: value for k, value in arguments.items() if k not in _EXTENSIONS}})
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise SettingsError(parse_error_message(TrainSettings, error).replace("trainer", field, 1)) from None
    for name in _EXTENSIONS:
        _parse(name, arguments.get(name), field)


def check_strategy(settings: TrainSettings, shared: Mapping[str, Any], stage: str) -> None:
    """Raise SettingsError if a training cannot run with its strategy.

    Args:
        shared: arguments in the recipe's `trainer`.
    """
    arguments = with_defaults(shared, settings.trainer)
    strategy, lora = str(arguments.get("strategy")), settings.model.lora
    field = f"{stage}.trainer.strategy" if "strategy" in settings.trainer else "trainer.strategy"
    for start, name in zip(("fsdp", "deepspeed"), sharding.SHARDED, strict=True):
        if strategy.startswith(start) and strategy != name:
            raise SettingsError(f"{field}: {strategy} is not supported; use {name}")
    if strategy not in sharding.SHARDED:
        return
    if lora is not None and lora.quantize:
        raise SettingsError(
            f"{stage}.model.lora.quantize: weights in 4 bits cannot be sharded; set it to false, or {field} to ddp"
        )
    if str(arguments.get("precision")) in ("16", "16-mixed", "16-true"):
        raise SettingsError(f"{field}: {strategy} does not support float16; set precision to bf16-mixed")


def try_trainer(shared: Mapping[str, Any], own: Mapping[str, Any], stage: str, *, on_cpu: bool = False) -> None:
    """Raise SettingsError naming the argument that lightning.Trainer refuses for the training of a stage.

    Args:
        shared: arguments in the recipe's `trainer`.
        own: arguments in the stage's `trainer`.
        on_cpu: replace the arguments that depend on the hardware, which may be that of another machine.
    """
    given = {name: value for name, value in {**shared, **own}.items() if not on_cpu or name not in _HARDWARE}
    if not on_cpu:
        _check_processes(given, f"{stage}.trainer" if {"devices", "num_nodes"} & own.keys() else "trainer")
        # before anything is paid; the classes may belong to libraries of the training machine
        for name in _EXTENSIONS:
            _create(name, given.get(name), f"{stage}.trainer" if name in own else "trainer")
    if (problem := _refusal(given, on_cpu)) is None:
        return
    culprits = [name for name in given if _refusal({n: v for n, v in given.items() if n != name}, on_cpu) is None]
    culprits += [name for name in given if re.search(rf"\b{name}\b", problem)]
    field = f"{stage}.trainer" if not culprits or culprits[0] in own else "trainer"
    raise SettingsError(f"{'.'.join([field, *culprits[:1]])}: {problem}")


def _check_processes(given: Mapping[str, Any], field: str) -> None:
    """Raise SettingsError if the processes of a training are not those that torchrun has started."""
    count, nodes = processes.process_count(given), given.get("num_nodes", 1)
    if processes.by_torchrun() and count != (started := processes.started()):
        raise SettingsError(
            f"{field}.devices times {field}.num_nodes is {count}, but torchrun has started {started} processes"
        )
    if nodes > 1 and not processes.by_torchrun():
        raise SettingsError(f"{field}.num_nodes is {nodes}: start distill by torchrun on each node")


def _refusal(given: Mapping[str, Any], on_cpu: bool) -> str | None:
    """What lightning.Trainer says against arguments; None if it takes them."""
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    messages = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = messages.level
    messages.setLevel(logging.ERROR)  # nothing is trained yet
    hardware = {"accelerator": "cpu", "devices": 1} if on_cpu else {}
    try:
        L.Trainer(
            **{name: value for name, value in with_defaults(given, hardware).items() if name not in _EXTENSIONS},
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
    options.add_class_arguments(L.Trainer, "trainer", skip=set(_EXTENSIONS))
    return options


def extensions(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[L.Callback], list[Logger]]:
    """Create the callbacks and loggers of a training. Returns the other arguments, the callbacks and the loggers.

    Raises:
        SettingsError: a class refuses its arguments, or a library that it needs is not installed.
    """
    rest = {name: value for name, value in arguments.items() if name not in _EXTENSIONS}
    callbacks, loggers = (_create(name, arguments.get(name), "trainer") for name in _EXTENSIONS)
    return rest, callbacks, loggers


def _create(name: str, items: Any, field: str) -> list[Any]:
    """The instances of a list of classes in the settings."""
    created = []
    for path, options, parsed in _parse(name, items, field):
        try:
            created.append(options.instantiate_classes(parsed).item)
        except Exception as error:  # of the user's class: it may raise anything
            raise SettingsError(f"{field}.{name}: {path}: {_reason(error)}") from error
    return created


def _parse(name: str, items: Any, field: str) -> list[tuple[str, jsonargparse.ArgumentParser, jsonargparse.Namespace]]:
    """The name, the parser and the parsed arguments of each class of a list in the settings. Raises SettingsError."""
    if items is not None and not isinstance(items, list):
        raise SettingsError(f"{field}.{name} takes a list of classes, each with class_path and, if needed, init_args")
    found = []
    for item in items or ():
        path = item.get("class_path") if isinstance(item, Mapping) else item
        if path is None:
            raise SettingsError(f"{field}.{name}: {item} names no class; each has class_path and, if needed, init_args")
        options = jsonargparse.ArgumentParser(exit_on_error=False)
        options.add_argument("--item", type=_EXTENSIONS[name])
        try:
            parsed = options.parse_object({"item": copy.deepcopy(item)})
        except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
            raise SettingsError(f"{field}.{name}: {path}: {_reason(error)}") from None
        found.append((str(path), options, parsed))
    return found


def _reason(error: Exception) -> str:
    """What is wrong with a class, without jsonargparse's words around it."""
    text = " ".join(str(error).split()).partition(" Subclass types expect")[0] or type(error).__name__
    return re.sub(r'^(Parser key "item": )?(Problem with given class_path \S+: )?(- )?', "", text)
