"""The trainings of a chain before it runs: rows, epochs, steps, tokens, FLOPs, memory and disk of each."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from distill.errors import SettingsError
from distill.models.backbone import Backbone
from distill.planning.training_cost import DeviceMemory, Targets, Work, disk_bytes, flop, memory, work
from distill.planning.workload import ChainForecast, Rows, spread
from distill.training.assistant import TrainSettings
from distill.training.batches import answer
from distill.training.soft_target_cache import room
from distill.training.student import StudentSettings


@dataclass(frozen=True)
class Training:
    """One training: how long it is, and where its model can be had what it takes, as published and as it will run."""

    name: str
    settings: TrainSettings
    rows: int
    known: bool
    epochs: float
    steps: float
    model: Backbone | None = None
    tokens: tuple[Work, Work] | None = None
    flop: tuple[float, float] | None = None
    memory: tuple[DeviceMemory, DeviceMemory] | None = None
    targets: Targets = "none"
    disk: float = 0.0

    @property
    def in_all(self) -> tuple[float, float] | None:
        """FLOP of all posts and epochs, None where nobody knows."""
        if self.flop is None or not math.isfinite(self.epochs):
            return None
        before, after = (self.rows * self.epochs * flop for flop in self.flop)
        return before, after


def trainings(forecast: ChainForecast, problems: list[str]) -> list[Training]:
    """The trainings of a chain in order; why a model cannot be had is added to `problems`, a line each."""
    recipe, found = forecast.recipe, []
    if recipe.teacher is not None:
        found.append(
            _training(forecast, "teacher", recipe.teacher, forecast.teacher_rows(recipe.teacher.tasks), problems)
        )
    if recipe.assistant is not None:
        found.append(_training(forecast, "assistant", recipe.assistant, forecast.annotated(), problems))
    student = recipe.student
    if student is not None:
        rows = forecast.student_rows()
        found.append(_training(forecast, "student", student, rows, problems))
        if student.hard_labels_baseline:
            plain = replace(student, tasks={"classify": 1.0}, distillation=replace(student.distillation, weight=0.0))
            gold = forecast.gold()
            longer = max(1, round(len(rows.samples) / max(1, len(gold.samples))))
            found.append(_training(forecast, "hard labels", plain, gold, problems, longer))
    return found


def _training(
    forecast: ChainForecast, name: str, settings: TrainSettings, rows: Rows, problems: list[str], longer: int = 1
) -> Training:
    tasks: Any = settings.tasks
    samples = [row for row in rows.samples if any(answer(task, row, forecast.labels) is not None for task in tasks)]
    epochs, steps = _length(forecast, settings, len(samples), longer)
    plain = Training(name, settings, len(samples), rows.known, epochs, steps)
    if not samples:
        return plain
    try:
        model = forecast.model(settings.model)
    except SettingsError as error:
        problems.append(f"{name}: {error}")
        return plain
    before, after = work(spread(samples), model, settings)
    plain = replace(plain, model=model, tokens=(before, after))
    targets: Targets = "none"
    assistant, disk = None, 0.0
    if isinstance(settings, StudentSettings) and settings.distillation.weight > 0:
        assert forecast.recipe.assistant is not None
        try:
            assistant = forecast.model(forecast.recipe.assistant.model)
        except SettingsError:  # said under its own name
            return plain
        disk = disk_bytes(len(samples) * after.logits, settings.distillation, assistant)
        keeps = settings.distillation.use_cache(epochs, disk, *room(forecast.recipe.folder))
        targets = "cached" if keeps else "online"
    module = None if assistant is None else assistant.model
    arguments = forecast.context.trainer_arguments(settings)
    half, on = "16" in str(arguments.get("precision", "")), _cuda(arguments)
    return replace(
        plain,
        flop=flop(model.model, settings, before, after, assistant=module, targets=targets, epochs=epochs),
        memory=memory(model, settings, before, after, assistant=assistant, targets=targets, half=half, cuda=on),
        targets=targets,
        disk=disk,
    )


def _length(forecast: ChainForecast, settings: TrainSettings, rows: int, longer: int) -> tuple[float, float]:
    """Epochs and optimiser steps, infinite where only time or progress ends the training."""
    arguments = forecast.context.trainer_arguments(settings)
    batches = math.ceil(math.ceil(rows / _processes(arguments)) / settings.batch_size)
    limit = arguments.get("limit_train_batches")
    if limit is not None:
        batches = min(batches, limit if isinstance(limit, int) else int(batches * limit))
    steps = math.ceil(batches / arguments.get("accumulate_grad_batches", 1))
    epochs, most = arguments["max_epochs"], arguments.get("max_steps", -1)
    if epochs is None:
        epochs = 1000 if most < 0 else -1  # as Lightning reads it
    if steps and most > 0 and (epochs < 0 or most < epochs * longer * steps):
        return most / steps, most
    length = math.inf if epochs < 0 else epochs * longer
    return length, length * steps if steps else 0


def _processes(arguments: dict[str, Any]) -> int:
    """As Lightning counts them, on this machine where the recipe leaves it to the machine."""
    devices, nodes = arguments.get("devices", "auto"), arguments.get("num_nodes", 1)
    if isinstance(devices, str) and devices != "auto":
        devices = [part for part in devices.split(",") if part.strip()] if "," in devices else int(devices)
    if devices in ("auto", -1):
        devices = torch.cuda.device_count() if _cuda(arguments) else 1
    return max(len(devices) if isinstance(devices, list) else devices, 1) * nodes


def _cuda(arguments: dict[str, Any]) -> bool:
    kind = arguments.get("accelerator", "auto")
    return kind in ("gpu", "cuda") or (kind == "auto" and torch.cuda.is_available())
