"""A chain's settings: the sections that each room declares for itself, in one dataclass, read from YAML and flags."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from distill.annotation.annotate import AnnotateSettings
from distill.annotation.augment import AugmentSettings
from distill.data.corpus import DataSettings
from distill.errors import SettingsError
from distill.evaluation.evaluate import EvaluateSettings
from distill.export.export import ExportSettings
from distill.models.backbone import ModelSettings
from distill.models.chat import EndpointSettings
from distill.task.labels import LabelSpace
from distill.tracking import TrackingSettings
from distill.training.assistant import TrainSettings
from distill.training.batches import check_tasks
from distill.training.fit import check_trainer
from distill.training.student import StudentSettings

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass
class TaskSettings:
    labels: list[str] = field(default_factory=lambda: ["negative", "neutral", "positive"])
    """Label names, from the most negative to the most positive."""
    polarity: list[int] | None = None
    """Polarity of each label (-1, 0, 1); null: spread evenly over the names."""


@dataclass
class TeacherSettings(TrainSettings):
    tasks: dict[str, float] = field(default_factory=lambda: {"predict": 1.0, "explain": 1.0, "classify": 1.0})
    """Tasks and their weights in the loss; a teacher needs predict, explain and classify."""


@dataclass
class AnnotateStageSettings(AnnotateSettings):
    endpoint: EndpointSettings | None = None
    """The teacher as an OpenAI-compatible server."""
    model: ModelSettings | None = None
    """The teacher as a ready model on this machine."""


@dataclass
class Recipe:
    name: str
    """Name of the chain; it writes to <runs>/<name>."""
    runs: str = "runs"
    """Folder of all runs."""
    seed: int = 42
    """Seed of weights, order and sampling."""
    task: TaskSettings = field(default_factory=TaskSettings)
    """What is predicted."""
    data: DataSettings = field(default_factory=DataSettings)
    """Where the posts come from."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Arguments of lightning.Trainer for every training: accelerator, devices, precision, strategy, max_epochs, ..."""
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    """wandb."""
    teacher: TeacherSettings | None = None
    """Stage: fine-tune a local teacher on the gold rationales of the training split."""
    annotate: AnnotateStageSettings | None = None
    """Stage: the teacher writes reasoning data."""
    assistant: TrainSettings | None = None
    """Stage: train the assistant on the teacher's rationales."""
    augment: AugmentSettings | None = None
    """Stage: the assistant writes more rationales, kept when right."""
    student: StudentSettings | None = None
    """Stage: distil the student."""
    evaluate: EvaluateSettings | None = None
    """Stage: judge every role on the test split."""
    export: ExportSettings | None = None
    """Stage: write the student as a folder that transformers loads."""

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name

    @property
    def labels(self) -> LabelSpace:
        return LabelSpace.from_names(self.task.labels, self.task.polarity)


def parser(command: str) -> jsonargparse.ArgumentParser:
    """The options of one command: `--config`, and every field of the recipe by its dotted name."""
    options = jsonargparse.ArgumentParser(prog=f"distill {command}", exit_on_error=False)
    options.add_argument("--config", action="config", help="The recipe, a YAML file.")
    options.add_class_arguments(Recipe, None)
    return options


def load(options: jsonargparse.ArgumentParser, arguments: Sequence[str]) -> tuple[Recipe, jsonargparse.Namespace]:
    """The checked recipe, and all that was parsed (a command may have options of its own).

    Raises:
        SettingsError: one sentence that names the field and the values it takes.
    """
    try:
        parsed = options.parse_args(list(arguments))
        values = options.instantiate_classes(parsed)
    except (jsonargparse.ArgumentError, TypeError, ValueError, OSError) as error:
        raise SettingsError(_sentence(error)) from None
    recipe = Recipe(**{item.name: values[item.name] for item in dataclasses.fields(Recipe)})
    check(recipe)
    return recipe, parsed


def check(recipe: Recipe) -> None:
    """Refuse what cannot work before any model is loaded. Raises SettingsError."""
    if not re.fullmatch(r"[\w.-]+", recipe.name) or recipe.name.startswith("."):
        raise SettingsError(f"name: {recipe.name!r} takes letters, digits, '-', '_' and '.'")
    try:
        recipe.labels  # noqa: B018
    except ValueError as error:
        raise SettingsError(str(error)) from None
    check_trainer(recipe.trainer, "trainer")
    for stage in ("teacher", "assistant", "student"):
        settings: TrainSettings | None = getattr(recipe, stage)
        if settings is not None:
            check_tasks(settings.tasks, f"{stage}.tasks")
            check_trainer(settings.trainer, f"{stage}.trainer")
            if settings.batch_size < 1:
                raise SettingsError(f"{stage}.batch_size is {settings.batch_size}; it takes 1 or more")
            if settings.model.lora is not None and not settings.model.path:
                raise SettingsError(f"{stage}.model.lora needs {stage}.model.path: a tiny model has nothing to adapt")
    annotate, student = recipe.annotate, recipe.student
    if annotate is not None:
        teachers = [recipe.teacher, annotate.endpoint, annotate.model]
        if sum(item is not None for item in teachers) > 1:
            raise SettingsError("annotate takes one teacher: the teacher section, annotate.endpoint or annotate.model")
        if not any(item is not None for item in teachers) and not annotate.recorded:
            raise SettingsError("annotate needs a teacher section, annotate.endpoint, annotate.model or annotate.recorded")
    for stage in ("assistant", "student"):
        if getattr(recipe, stage) is not None and annotate is None and set(getattr(recipe, stage).tasks) != {"classify"}:
            raise SettingsError(f"{stage}.tasks: reasoning needs an annotate section; without one the task is classify")
    if recipe.augment is not None and (recipe.assistant is None or "reason" not in recipe.assistant.tasks):
        raise SettingsError("augment needs an assistant section that trains the reason task")
    if student is not None:
        options = student.distillation
        if not 0 <= options.weight <= 1:
            raise SettingsError(f"student.distillation.weight is {options.weight}; it takes 0 to 1")
        if options.temperature <= 0:
            raise SettingsError(f"student.distillation.temperature is {options.temperature}; it takes more than 0")
        if options.weight > 0 and recipe.assistant is None:
            raise SettingsError("student.distillation.weight needs an assistant section; without one it takes 0")
    for stage in ("evaluate", "export"):
        if getattr(recipe, stage) is not None and student is None:
            raise SettingsError(f"{stage} needs a student section")


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe; `load` reads it back."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)


def _sentence(error: BaseException) -> str:
    """The innermost complaint of jsonargparse, with the field's dotted name and what it takes."""
    text = str(error)
    keys = re.findall(r"[Pp]arser key \"([^\"]+)\"", text)
    path = ".".join(keys)
    unknown = re.search(r"(?:Option '([^']+)' is not accepted|[Uu]nrecognized arguments: --(\S+))", text)
    if unknown:
        name = unknown[1] or unknown[2].split("=")[0]
        path = ".".join(filter(None, [path, name]))
        return _unknown(path)
    missing = re.search(r"(?:Key|key) \"([^\"]+)\" is required", text)
    if missing:
        return f"{'.'.join(filter(None, [path, missing[1]]))} is required"
    details = [line.strip(" -") for line in text.splitlines() if re.search(r"Expected |not |Not |invalid|needs|takes", line)]
    details = [line for line in details if "NoneType" not in line and "Does not validate" not in line]
    detail = details[0] if details else " ".join(text.split())
    detail = detail.replace("typing.", "").replace("<class '", "").replace("'>", "").rstrip(".")
    return f"{path}: {detail}" if path and not detail.startswith(path) else detail


def _unknown(path: str) -> str:
    """A field that is not there: where it was looked for, and what is there instead."""
    here: Any = Recipe
    parts = path.split(".")
    for depth, part in enumerate(parts):
        known = {item.name: item.type for item in dataclasses.fields(here)} if dataclasses.is_dataclass(here) else {}
        if part not in known:
            section = ".".join(parts[:depth]) or "the recipe"
            close = difflib.get_close_matches(part, known, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            return f"{'.'.join(parts[: depth + 1])} is not a field{hint}; {section} takes {', '.join(known)}"
        options = typing.get_args(known[part]) if isinstance(known[part], types.UnionType) else (known[part],)
        here = options[0]
    return f"{path} is not a field"
