"""Forecast of the trainings of a chain: rows, epochs, steps, tokens, FLOPs, memory and disk space of each."""

import math
from dataclasses import dataclass, replace
from typing import Any

from distill.errors import SettingsError, in_section
from distill.models.backbone import Backbone
from distill.planning.training_cost import (
    DeviceMemory,
    SoftTargetSource,
    TokenCounts,
    count_tokens,
    learns_labels,
    soft_target_bytes,
    training_flops,
    training_memory,
)
from distill.planning.workload import ChainForecast, TrainingRows, largest_clip, sample_by_length
from distill.training.assistant import TrainSettings
from distill.training.batches import target_answer
from distill.training.processes import process_count, uses_cuda
from distill.training.sharding import SHARDED
from distill.training.soft_target_cache import disk_space
from distill.training.student import StudentSettings


@dataclass(frozen=True)
class TrainingForecast:
    """Forecast of one training. Pairs are for the published procedure and for this recipe.

    Attributes:
        rows: number of training samples; an upper bound unless `exact`.
        epochs, steps: number of epochs and of optimizer steps; infinite if unlimited.
        model: the model without weights; None if its config cannot be loaded, and then all costs are None too.
        tokens: counts per sample.
        flops: FLOPs per sample and epoch; None if the assistant's config cannot be loaded.
        memory: memory per device.
        source: source of the soft targets.
        disk: bytes of cached soft targets.
    """

    name: str
    settings: TrainSettings
    rows: int
    exact: bool
    epochs: float
    steps: float
    model: Backbone | None = None
    tokens: tuple[TokenCounts, TokenCounts] | None = None
    flops: tuple[float, float] | None = None
    memory: tuple[DeviceMemory, DeviceMemory] | None = None
    source: SoftTargetSource = "none"
    disk: float = 0.0

    @property
    def total_flops(self) -> tuple[float, float] | None:
        """FLOPs over all samples and epochs; None if unknown."""
        if self.flops is None or not math.isfinite(self.epochs):
            return None
        published, ours = (self.rows * self.epochs * flops for flops in self.flops)
        return published, ours


def forecast_trainings(forecast: ChainForecast, problems: list[str], factor: float = 1.0) -> list[TrainingForecast]:
    """Return the trainings of a chain in order; adds a message to `problems` for each model that cannot be loaded.

    Args:
        factor: number of training posts in relation to those of the data, which stand for them.
    """
    recipe, trainings = forecast.recipe, []

    def add(name: str, settings: TrainSettings, rows: TrainingRows, epoch_factor: int = 1) -> None:
        trainings.append(_forecast_training(forecast, name, settings, rows, problems, factor, epoch_factor))

    if recipe.teacher is not None:
        add("teacher", recipe.teacher, forecast.teacher_rows())
    if recipe.assistant is not None:
        add("assistant", recipe.assistant, forecast.assistant_rows())
    student = recipe.student
    if student is not None:
        rows = forecast.student_rows()
        add("student", student, rows)
        if student.hard_labels_baseline:
            no_distillation = replace(student.distillation, weight=0.0, label_weight=0.0)
            baseline = replace(student, tasks={"classify": 1.0}, distillation=no_distillation)
            gold = forecast.gold_rows()
            epoch_factor = max(1, round(len(rows.samples) / max(1, len(gold.samples))))
            add("hard labels", baseline, gold, epoch_factor)
    return trainings


def _forecast_training(
    forecast: ChainForecast,
    name: str,
    settings: TrainSettings,
    rows: TrainingRows,
    problems: list[str],
    factor: float,
    epoch_factor: int,
) -> TrainingForecast:
    tasks: Any = settings.tasks
    labels = forecast.labels
    samples = [row for row in rows.samples if any(target_answer(task, row, labels) is not None for task in tasks)]
    if learns_labels(settings):
        samples = list(rows.samples)
    count = round(len(samples) * factor)
    epochs, steps = _epochs_and_steps(forecast, settings, count, epoch_factor)
    training = TrainingForecast(name, settings, count, rows.exact, epochs, steps)
    if not samples:
        return training
    try:
        with in_section("student" if name == "hard labels" else name):
            model = forecast.model(settings.model)
            published, ours = count_tokens(sample_by_length(samples), model, settings)
            if clip := largest_clip(samples):
                longest = count_tokens(clip, model, settings)
                published, ours = (
                    replace(counts, longest=max(counts.longest, one.longest))
                    for counts, one in zip((published, ours), longest, strict=True)
                )
    except SettingsError as error:
        problems.append(str(error))
        return training
    training = replace(training, model=model, tokens=(published, ours))
    source: SoftTargetSource = "none"
    assistant, disk = None, 0.0
    if isinstance(settings, StudentSettings) and settings.distillation.weight > 0:
        assert forecast.recipe.assistant is not None
        try:
            assistant = forecast.model(forecast.recipe.assistant.model)
        except SettingsError:  # reported for the assistant's own training
            return training
        disk = soft_target_bytes(count * ours.answers, settings.distillation, assistant)
        use_cache = settings.distillation.use_cache(epochs, disk, *disk_space(forecast.recipe.folder))
        source = "cached" if use_cache else "online"
    module = None if assistant is None else assistant.model
    arguments = forecast.context.trainer_arguments(settings)
    half, cuda = "16" in str(arguments.get("precision", "")), uses_cuda(arguments)
    shards = process_count(arguments) if arguments.get("strategy") in SHARDED else 1
    posts = [*samples, *forecast.corpus.validation]
    images = all(post.images for post in posts) and not forecast.recipe.data.drop_modality
    return replace(
        training,
        flops=training_flops(model.model, settings, published, ours, assistant=module, source=source, epochs=epochs),
        memory=training_memory(
            model,
            settings,
            published,
            ours,
            assistant=assistant,
            source=source,
            half=half,
            cuda=cuda,
            shards=shards,
            images=images,
        ),
        source=source,
        disk=disk,
    )


def _epochs_and_steps(
    forecast: ChainForecast, settings: TrainSettings, rows: int, epoch_factor: int
) -> tuple[float, float]:
    """Return the number of epochs and optimizer steps; infinite if neither is limited."""
    arguments = forecast.context.trainer_arguments(settings)
    batches = math.ceil(math.ceil(rows / process_count(arguments)) / settings.batch_size)
    limit = arguments.get("limit_train_batches")
    if limit is not None:
        batches = min(batches, limit if isinstance(limit, int) else int(batches * limit))
    steps = math.ceil(batches / arguments.get("accumulate_grad_batches", 1))
    max_epochs, max_steps = arguments["max_epochs"], arguments.get("max_steps", -1)
    if max_epochs is None:
        max_epochs = 1000 if max_steps < 0 else -1  # the defaults of Lightning
    if steps and max_steps > 0 and (max_epochs < 0 or max_steps < max_epochs * epoch_factor * steps):
        return max_steps / steps, max_steps
    epochs = math.inf if max_epochs < 0 else max_epochs * epoch_factor
    return epochs, epochs * steps if steps else 0
