"""A chain's settings: the sections that each room declares for itself, in one dataclass, read from YAML and flags."""

import argparse
import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Sequence
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
    """What is predicted."""

    labels: list[str] = field(default_factory=lambda: ["negative", "neutral", "positive"])
    """Label names, from the most negative to the most positive."""
    polarity: list[int] | None = None
    """Polarity of each label (-1, 0, 1); null: spread evenly over the names."""


@dataclass
class TeacherSettings(TrainSettings):
    """How a local teacher is trained."""

    tasks: dict[str, float] = field(default_factory=lambda: {"predict": 1.0, "explain": 1.0, "classify": 1.0})
    """Tasks and their weights in the loss; a teacher needs predict, explain and classify."""


@dataclass
class AnnotateStageSettings(AnnotateSettings):
    """Who writes the reasoning data, and how."""

    endpoint: EndpointSettings | None = None
    """The teacher as an OpenAI-compatible server."""
    model: ModelSettings | None = None
    """The teacher as a ready model on this machine."""


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
    options = jsonargparse.ArgumentParser(prog=f"distill {command}", exit_on_error=False, allow_abbrev=False)
    options.add_argument("--config", action="config", help="The recipe, a YAML file.")
    options.add_class_arguments(Recipe, None)
    for path, section in _optional_sections(Recipe):
        if "." in path:  # jsonargparse names these in its help, but does not answer to them
            options.add_argument(f"--{path}.help", action=_SectionHelp, const=section)
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
        raise SettingsError(_sentence(error)) from None
    check(recipe := _build(Recipe, parsed, ""))
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
    stages = [item.name for item in dataclasses.fields(Recipe) if _section(item.type) is not item.type]
    given = [name for name in stages if _section(_fields(Recipe)[name]) and getattr(recipe, name) is not None]
    if recipe.data.source == "mosi" and given:
        raise SettingsError(f"data.source mosi has continuous labels, which {given[0]} cannot use; it takes label names")
    annotate, student = recipe.annotate, recipe.student
    if annotate is not None:
        teachers = [recipe.teacher, annotate.endpoint, annotate.model]
        if sum(item is not None for item in teachers) > 1:
            raise SettingsError("annotate takes one teacher: the teacher section, annotate.endpoint or annotate.model")
        if not any(item is not None for item in teachers) and not annotate.recorded:
            raise SettingsError("annotate needs a teacher, annotate.endpoint, annotate.model or annotate.recorded")
    for stage in ("assistant", "student"):
        learner: TrainSettings | None = getattr(recipe, stage)
        if annotate is None and learner is not None and set(learner.tasks) != {"classify"}:
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


class _SectionHelp(argparse.Action):
    """`--student.model.lora.help`: the fields of an optional section inside another one."""

    def __init__(self, **given: Any) -> None:
        super().__init__(nargs=0, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **given)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        section = jsonargparse.ArgumentParser(prog=parser.prog)
        section.add_class_arguments(self.const, self.dest.removesuffix(".help"))
        section.print_help()
        parser.exit()


def _fields(section: type) -> dict[str, Any]:
    """Names and types of a section's fields."""
    return {item.name: item.type for item in dataclasses.fields(section)}


def _section(annotation: Any) -> type | None:
    """The dataclass that a field holds, always or optionally; None for a field of values."""
    kinds = [kind for kind in (annotation, *typing.get_args(annotation)) if isinstance(kind, type)]
    return next(filter(dataclasses.is_dataclass, kinds), None)


def _optional_sections(section: type, path: str = "") -> Iterator[tuple[str, type]]:
    for name, annotation in _fields(section).items():
        if inner := _section(annotation):
            if inner is not annotation:
                yield path + name, inner
            yield from _optional_sections(inner, f"{path}{name}.")


def _build(section: type, values: Any, path: str) -> Any:
    """A section from what was parsed; what its own check refuses is named by its place in the recipe."""
    inner = {name: _section(annotation) for name, annotation in _fields(section).items()}
    content = {name: values[name] for name in inner}
    for name, kind in inner.items():
        if kind and content[name] is not None:
            content[name] = _build(kind, content[name], f"{path}{name}.")
    try:
        return section(**content)
    except SettingsError as error:
        message = str(error)
        raise SettingsError(message if message.startswith(path) else path + message) from None


def _check_files(arguments: Sequence[str]) -> None:
    """Refuse in recipe files what jsonargparse may pass over: unknown fields, and values in a section's place."""
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
            raise SettingsError(f"--config: {file} holds no fields; a recipe takes {', '.join(_fields(Recipe))}")
        _check_names(content, Recipe, "")


def _check_names(values: dict[Any, Any], section: type, path: str) -> None:
    for name, value in values.items():
        if name not in _fields(section):
            raise SettingsError(_unknown(f"{path}{name}"))
        inner = _section(_fields(section)[name])
        if inner and isinstance(value, dict):
            _check_names(value, inner, f"{path}{name}.")
        elif inner and value is not None:
            raise SettingsError(_no_section(f"{path}{name}", value))


_TAKES = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text; quote it in YAML",
    "list": "a list such as [a, b]", "dict": "a mapping such as {name: value}",
}  # fmt: skip


def _sentence(error: BaseException) -> str:
    """The innermost complaint of jsonargparse, with the field's dotted name, its value, and what it takes."""
    text = re.sub(r"<class '([^']+)'>", r"\1", str(error)).replace("typing.", "")
    path = ".".join(re.findall(r"[Pp]arser key \"([^\"]+)\":$", text, re.MULTILINE))
    dot = path and f"{path}."
    if unknown := re.search(r"Option '([^']+)' is not accepted|nrecognized arguments: --([^\s=]+)", text):
        return _unknown(f"{dot}{unknown[1] or unknown[2]}")
    if unknown := re.search(r"Group '([^']+)' does not accept option '([^']+)'", text):
        return _unknown(f"{dot}{unknown[1]}.{unknown[2]}")
    if missing := re.search(r"arguments are required: (\S+)|[Kk]ey \"([^\"]+)\" is required", text):
        return f"{dot}{missing[1] or missing[2]} is required"
    given = re.search(r"Got value: (.*)|NestedArg\(.*val='(.*)'\)|Given value: (.*)|Unable to load config '(.*)'", text)
    value = next(filter(None, given.groups()), "") if given else ""
    if re.search("dot import path|Not a valid subclass|Unable to load config", text):
        return _no_section(path, value)
    kinds = [kind for kind in re.findall(r"Expected an? (\w+(?:\[.*?\])?)", text) if kind != "NoneType"]
    if not kinds:
        return f"{dot and path + ': '}{' '.join(text.split())}"
    choices = re.findall(r"'([^']+)'", kinds[0])
    takes = f"one of {', '.join(choices)}" if choices else _TAKES.get(kinds[0], kinds[0])
    return f"{path}: {value} is not {takes}"


def _no_section(path: str, value: object) -> str:
    section: Any = Recipe
    for part in path.split("."):
        section = _section(_fields(section)[part])
    return f"{path}: {value} is not a section; it takes {', '.join(_fields(section))}"


def _unknown(path: str) -> str:
    """A field that is not there: where it was looked for, and what is there instead."""
    section: type | None = Recipe
    parts = path.split(".")
    for depth, part in enumerate(parts):
        known = _fields(section) if section else {}
        if part not in known:
            close = difflib.get_close_matches(part, known, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            where = ".".join(parts[:depth]) or "the recipe"
            return f"{'.'.join(parts[: depth + 1])} is not a field{hint}; {where} takes {', '.join(known)}"
        section = _section(known[part])
    return f"{path} is not a field"
