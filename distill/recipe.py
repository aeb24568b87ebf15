"""A chain's settings: the sections that each room declares for itself, in one dataclass, read from YAML and flags."""

import argparse
import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonargparse
import lightning as L
import yaml

from distill.annotation.annotate import AnnotateSettings
from distill.annotation.augment import AugmentSettings
from distill.cascade.calibration import CalibrateSettings
from distill.cascade.cascade import CascadeSettings
from distill.data.corpus import DataSettings, check_labels
from distill.errors import SettingsError
from distill.evaluation.evaluate import EvaluateSettings
from distill.export.export import ExportSettings
from distill.models.backbone import ModelSettings
from distill.models.endpoint import EndpointSettings
from distill.serving.settings import ServeSettings
from distill.settings import SectionHelp, build, check_names, fields, optional_sections, sentence
from distill.task.labels import LabelSpace, Scale
from distill.tracking import TrackingSettings
from distill.training.assistant import TrainSettings
from distill.training.batches import check_tasks
from distill.training.fit import check_trainer
from distill.training.student import StudentSettings

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass
class TaskSettings:
    """What is predicted."""

    labels: list[str] | None = None
    """Label names, from the most negative to the most positive; null: negative, neutral, positive, or a scale's
    centres."""
    polarity: list[int] | None = None
    """Polarity of each label (-1, 0, 1); null: spread evenly over the names."""
    scale: Scale | None = None
    """Continuous labels: the scale, and the bins it is cut into. Without it, labels are names."""


@dataclass
class TeacherSettings(TrainSettings):
    """How a local teacher is trained."""

    tasks: dict[str, float] = field(default_factory=lambda: {"predict": 1.0, "explain": 1.0, "classify": 1.0})
    """Tasks and their weights in the loss: predict, explain and classify where a teacher annotates, classify alone
    where it does not; review prepares it for the cascade's second look."""


@dataclass
class AnnotateStageSettings(AnnotateSettings):
    """Who writes the reasoning data, and how."""

    endpoint: EndpointSettings | None = None
    """The teacher as an OpenAI-compatible server."""
    model: ModelSettings | None = None
    """The teacher as a ready model on this machine."""


@dataclass
class CalibrateStageSettings(CalibrateSettings):
    """How the cascade's thresholds are fitted, and with whom."""

    endpoint: EndpointSettings | None = None
    """The cascade's teacher as an OpenAI-compatible server, where it is not the one that annotates."""
    model: ModelSettings | None = None
    """The cascade's teacher as a ready model on this machine, where it is not the one that annotates."""


@dataclass
class Recipe:
    """The settings of one chain; a stage runs where its section is given, be it empty: {}."""

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
    calibrate: CalibrateStageSettings | None = None
    """Stage: fit temperatures and thresholds of the cascade on the validation split."""
    cascade: CascadeSettings | None = None
    """Stage: student and teacher share the test split; what that is worth."""
    export: ExportSettings | None = None
    """Stage: write the student as a folder that transformers loads."""
    serve: ServeSettings = field(default_factory=ServeSettings)
    """How `distill serve` puts student and teacher into service."""

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name

    @property
    def labels(self) -> LabelSpace:
        task = self.task
        if task.scale is not None:
            return LabelSpace.from_scale(task.scale, task.labels)
        return LabelSpace.from_names(task.labels or LabelSpace().names, task.polarity)


def parser(command: str) -> jsonargparse.ArgumentParser:
    """The options of one command: `--config`, and every field of the recipe by its dotted name."""
    options = jsonargparse.ArgumentParser(prog=f"distill {command}", exit_on_error=False, allow_abbrev=False)
    options.add_argument("--config", action="config", help="The recipe, a YAML file.")
    options.add_class_arguments(Recipe, None)
    optional = dict(optional_sections(Recipe))
    for path, section in optional.items():
        if any(path.startswith(f"{outer}.") for outer in optional):  # named in jsonargparse's help, but not answered to
            options.add_argument(f"--{path}.help", action=SectionHelp, const=section)
    return options


def load(options: jsonargparse.ArgumentParser, arguments: Sequence[str]) -> tuple[Recipe, jsonargparse.Namespace]:
    """The checked recipe, and all that was parsed (a command may have options of its own).

    Raises:
        SettingsError: one sentence that names the field and the values it takes.
    """
    _check_files(arguments)
    try:
        parsed = options.parse_args(list(arguments))
    except (jsonargparse.ArgumentError, argparse.ArgumentError, TypeError, ValueError, OSError) as error:
        raise SettingsError(sentence(Recipe, error)) from None
    check(recipe := build(Recipe, parsed))
    return recipe, parsed


def _check_files(arguments: Sequence[str]) -> None:
    """Refuse what is no recipe, or has names that a recipe does not take, before jsonargparse reads it."""
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    files.add_argument("--config", action="append", nargs="?", default=[])
    for file in filter(None, files.parse_known_args(arguments)[0].config):
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise SettingsError(f"--config: cannot read {file}: {error.strerror}") from None
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise SettingsError(f"--config: {file} is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict):
            raise SettingsError(f"--config: {file} holds no fields; a recipe takes {', '.join(fields(Recipe))}")
        check_names(Recipe, content)


def check(recipe: Recipe) -> None:
    """Refuse what cannot work before any model is loaded. Raises SettingsError."""
    if not re.fullmatch(r"[\w.-]+", recipe.name) or recipe.name.startswith("."):
        raise SettingsError(f"name: {recipe.name!r} takes letters, digits, '-', '_' and '.'")
    try:
        recipe.labels  # noqa: B018
    except ValueError as error:
        raise SettingsError(str(error)) from None
    _check_trainer(recipe.trainer, "trainer")
    for stage in ("teacher", "assistant", "student"):
        settings: TrainSettings | None = getattr(recipe, stage)
        if settings is not None:
            check_tasks(settings.tasks, f"{stage}.tasks")
            _check_trainer(settings.trainer, f"{stage}.trainer")
            if settings.batch_size < 1:
                raise SettingsError(f"{stage}.batch_size is {settings.batch_size}; it takes 1 or more")
            if settings.packing and settings.model.attention == "flash_attention_2":
                raise SettingsError(f"{stage}.packing takes false where {stage}.model.attention is flash_attention_2")
            if settings.model.lora is not None and not settings.model.path:
                raise SettingsError(f"{stage}.model.lora needs {stage}.model.path: a tiny model has nothing to adapt")
    check_labels(recipe.data, recipe.labels)
    annotate, student = recipe.annotate, recipe.student
    if annotate is not None:
        teachers = [recipe.teacher, annotate.endpoint, annotate.model]
        if sum(item is not None for item in teachers) > 1:
            raise SettingsError("annotate takes one teacher: the teacher section, annotate.endpoint or annotate.model")
        if not any(item is not None for item in teachers) and not annotate.recorded:
            raise SettingsError("annotate needs a teacher, annotate.endpoint, annotate.model or annotate.recorded")
    for stage in ("assistant", "student", "teacher"):
        learner: TrainSettings | None = getattr(recipe, stage)
        also = {"review"} if stage == "teacher" else set()
        if annotate is None and learner is not None and set(learner.tasks) - also != {"classify"}:
            known = " and ".join(["classify", *also])
            raise SettingsError(f"{stage}.tasks: reasoning needs an annotate section; without one the task is {known}")
    if annotate is not None and recipe.task.scale is not None:
        raise SettingsError("annotate takes label names; with task.scale the models classify alone")
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
        asked = recipe.assistant.model.attention if recipe.assistant is not None and options.weight > 0 else None
        if asked == "flash_attention_2" and student.packing and options.positions == "response":
            raise SettingsError("student.packing takes false where assistant.model.attention is flash_attention_2")
        if options.weight > 0 and recipe.task.scale is not None and recipe.task.scale.spread > 0:
            raise SettingsError("student.distillation.weight takes 0 where task.scale.spread makes the targets soft")
    for stage in ("evaluate", "calibrate", "cascade", "export"):
        if getattr(recipe, stage) is not None and student is None:
            raise SettingsError(f"{stage} needs a student section")
    for name in ("annotate", "calibrate"):
        section: AnnotateStageSettings | CalibrateStageSettings | None = getattr(recipe, name)
        if section is not None and section.model is not None and not section.model.path:
            raise SettingsError(f"{name}.model.path is required: an untrained tiny model is no teacher")
    if (calibrate := recipe.calibrate) is not None:
        if calibrate.endpoint is not None and calibrate.model is not None:
            raise SettingsError("calibrate takes one teacher: calibrate.endpoint or calibrate.model")
        named = [item for section in (annotate, calibrate) if section for item in (section.endpoint, section.model)]
        if all(item is None for item in [recipe.teacher, *named]):
            raise SettingsError(
                "calibrate needs a teacher to ask: teacher, or an endpoint or model of annotate or of calibrate"
            )
    if recipe.cascade is not None and recipe.calibrate is None:
        raise SettingsError("cascade needs a calibrate section, for its thresholds")


def _check_trainer(arguments: Mapping[str, Any], field: str) -> None:
    """Raises SettingsError for a name or a value that lightning.Trainer does not take."""
    check_trainer(arguments, field)
    try:
        _trainer_options().parse_object({"trainer": dict(arguments)})
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise SettingsError(sentence(Recipe, error).replace("trainer", field, 1)) from None


@functools.cache
def _trainer_options() -> jsonargparse.ArgumentParser:
    options = jsonargparse.ArgumentParser(exit_on_error=False)
    options.add_class_arguments(L.Trainer, "trainer")
    return options


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe; `load` reads it back."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)
