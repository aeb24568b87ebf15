"""The recipe: the settings sections of all packages in one dataclass, read from YAML files and command-line flags."""

import argparse
import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml

from distill.annotation.augment import AugmentSettings
from distill.data.corpus import check_labels
from distill.data.source import DataSettings
from distill.errors import SettingsError
from distill.evaluation.evaluate import EvaluateSettings
from distill.export.export import ExportSettings
from distill.masking import mask
from distill.models.endpoint import EndpointSettings
from distill.recipe_files import read_files
from distill.scale_settings import ScaleSettings
from distill.serving.settings import ServeSettings
from distill.settings import (
    Natural,
    SectionHelp,
    Seed,
    Settings,
    build,
    fields,
    optional_sections,
    parse_error_message,
)
from distill.stage_settings import (
    AnnotateStageSettings,
    CalibrateStageSettings,
    CascadeStageSettings,
    Teacher,
    TeacherSettings,
    check_stream,
)
from distill.task.labels import LabelSpace, TaskSettings
from distill.tracking import TrackingSettings
from distill.training.assistant import TrainSettings
from distill.training.batches import check_tasks
from distill.training.refine_settings import RefineSettings, check_refine
from distill.training.student import StudentSettings, check_label_teacher
from distill.training.trainer_arguments import check_schedule, check_strategy, check_trainer, try_trainer
from distill.workers.settings import RaySettings

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

log = logging.getLogger(__name__)


@dataclass
class Recipe(Settings):
    """The settings of one chain. A stage runs if its section is given, even if the section is empty: {}."""

    name: str
    """Name of the chain. Its folder is <runs>/<name>."""
    runs: str = "runs"
    """Parent folder of all chains."""
    seed: Seed = 42
    """Random seed of weight initialisation, data order and sampling."""
    stop_after_invalid: Natural = 50
    """A stage stops if the first answers of a teacher or of the assistant are all invalid, and this is their number;
    retries and sampled answers count. 0: never."""
    engine: Literal["local", "ray"] = "local"
    """Where annotate, augment, evaluate and predict ask their models, and where serve runs: in this process, or on the
    workers of `ray` and on Ray Serve with the replicas of `serve.ray`."""
    ray: RaySettings = field(default_factory=RaySettings)
    """The workers of engine: ray."""
    task: TaskSettings = field(default_factory=TaskSettings)
    """The prediction task: label names or a continuous scale."""
    data: DataSettings = field(default_factory=DataSettings)
    """The data: source, files and splits."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Arguments of lightning.Trainer for all trainings: accelerator, devices, precision, strategy, max_epochs, ...;
    strategy also takes fsdp2 and zero3, which divide the weights among the devices."""
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    """Experiment tracking with Weights & Biases (wandb)."""
    teacher: TeacherSettings | None = None
    """Stage: fine-tune a local teacher on the gold rationales and labels of the training split."""
    annotate: AnnotateStageSettings | None = None
    """Stage: the teacher writes rationales for the training posts."""
    assistant: TrainSettings | None = None
    """Stage: train the assistant on the teacher's rationales."""
    augment: AugmentSettings | None = None
    """Stage: the assistant writes further rationales; those that predict the gold label are kept."""
    student: StudentSettings | None = None
    """Stage: train the student, with knowledge distillation from the assistant."""
    refine: RefineSettings | None = None
    """Stage: train the student further on its own rationales, with trl."""
    evaluate: EvaluateSettings | None = None
    """Stage: evaluate teacher, assistant and student on the test split."""
    calibrate: CalibrateStageSettings | None = None
    """Stage: fit the temperatures and thresholds of the cascade on the validation split."""
    cascade: CascadeStageSettings | None = None
    """Stage: run the cascade of student and teacher on the test split and measure accuracy and teacher calls."""
    export: ExportSettings | None = None
    """Stage: export the student as a folder that transformers can load."""
    serve: ServeSettings = field(default_factory=ServeSettings)
    """Settings of `distill serve`, the OpenAI-compatible server of the cascade."""
    scale: ScaleSettings = field(default_factory=ScaleSettings)
    """Hardware, prices and load of `distill plan --posts` and `distill simulate`."""

    @property
    def folder(self) -> Path:
        """The chain's folder, `<runs>/<name>`."""
        return Path(self.runs) / self.name

    @property
    def on_ray(self) -> bool:
        """Whether annotate, augment, evaluate and predict ask their models on Ray workers."""
        return self.engine == "ray"

    @property
    def annotating_teacher(self) -> Teacher | None:
        """The teacher that annotates and is evaluated; None for a recording."""
        if self.teacher is not None or self.annotate is None:
            return self.teacher
        return self.annotate.endpoint or self.annotate.model

    @property
    def student_stage(self) -> Literal["student", "refine"]:
        """The stage whose weights are the student of the cascade, the export and all predictions."""
        return "student" if self.refine is None else "refine"

    @property
    def student_role(self) -> Literal["student", "student_refined"]:
        """The name of that student in `evaluate/metrics.json`."""
        return "student" if self.refine is None else "student_refined"

    @staticmethod
    def model_section(stage: str) -> str:
        """The section with the settings of the model that a stage trains: refine trains the student's."""
        return "student" if stage == "refine" else stage

    @property
    def cascade_teacher(self) -> Teacher | None:
        """The teacher of calibrate, cascade and serve; None if the recipe has none."""
        for own in (self.cascade and self.cascade.teacher, self.calibrate):
            if own and (own.endpoint or own.model):
                return own.endpoint or own.model
        return self.annotating_teacher

    def section_of(self, teacher: Teacher | None) -> str:
        """The section whose fields a teacher's messages name; empty for a teacher of no section."""
        sections = {"annotate": self.annotate, "cascade.teacher": self.cascade and self.cascade.teacher}
        for name, section in (sections | {"calibrate": self.calibrate}).items():
            if section and teacher is not None and teacher in (section.endpoint, section.model):
                return f"{name}.endpoint" if teacher == section.endpoint else name
        return "teacher" if teacher is not None and teacher == self.teacher else ""

    def other_servers(self, *, for_cascade: bool = False) -> list[str]:
        """The address of the other teacher, if it is another server that gives its model the same name.

        Args:
            for_cascade: of the teacher other than the cascade's, instead of other than the annotating one.
        """
        one, other = self.annotating_teacher, self.cascade_teacher
        if not isinstance(one, EndpointSettings) or not isinstance(other, EndpointSettings):
            return []
        if one.model != other.model or one.address == other.address:
            return []
        return [one.address if for_cascade else other.address]

    def teacher_learned(self, task: str) -> bool:
        """Whether the cascade's teacher takes *review* or *explain*: one that the chain trains must learn the task."""
        teacher = self.cascade_teacher
        return not isinstance(teacher, TeacherSettings) or teacher.tasks.get(task, 0.0) > 0

    @property
    def labels(self) -> LabelSpace:
        """The label space. Raises ValueError for labels that do not form one."""
        return self.task.label_space


class RecipeParser(jsonargparse.ArgumentParser):
    """Reads recipes in which sections may be blank, and prints them without passwords and a command's own options."""

    contents: Mapping[str, Any] = {}
    """The recipes of `--config`, by path."""

    def parse_path(self, path: Any, **options: Any) -> jsonargparse.Namespace:
        """Parse the content of a recipe that was read before."""
        options_of_text: Any = {"default_style": '"', "allow_unicode": True, "sort_keys": False}  # text stays text
        return self.parse_string(yaml.safe_dump(self.contents[str(path)], **options_of_text), **options)

    def dump(self, namespace: jsonargparse.Namespace, **options: Any) -> str:
        """The fields of the recipe as YAML, which `load` can read."""
        if "runs" in namespace:  # not one of its sections, for which jsonargparse calls this function as well
            namespace = jsonargparse.Namespace({name: namespace[name] for name in fields(Recipe)})
        return str(mask(super().dump(namespace, **options)))


def parser(command: str) -> RecipeParser:
    """The argument parser of a command: `--config`, and every field of the recipe by its dotted name."""
    options = RecipeParser(prog=f"distill {command}", exit_on_error=False, allow_abbrev=False)
    options.add_argument("--config", action="config", help="The recipe, a YAML file.")
    options.add_class_arguments(Recipe, None)
    optional = dict(optional_sections(Recipe))
    for path, section in optional.items():
        if any(path.startswith(f"{outer}.") for outer in optional):  # jsonargparse shows it, but does not add it
            options.add_argument(f"--{path}.help", action=SectionHelp, const=section)
    return options


def load(options: RecipeParser, arguments: Sequence[str]) -> tuple[Recipe, jsonargparse.Namespace]:
    """Parse the arguments; returns the validated recipe, and the namespace with the command's own options.

    Raises:
        SettingsError: a file, a name or a value is invalid. The message names the field and the accepted values.
    """
    options.contents = read_files(arguments, Recipe)
    try:
        parsed = options.parse_args(list(arguments))
    except (jsonargparse.ArgumentError, argparse.ArgumentError, TypeError, ValueError, OSError) as error:
        raise SettingsError(parse_error_message(Recipe, error)) from None
    check(recipe := build(Recipe, parsed))
    return recipe, parsed


def check(recipe: Recipe) -> None:
    """Validate combinations of settings before any model is loaded. Raises SettingsError."""
    if not re.fullmatch(r"[\w.-]+", recipe.name) or recipe.name.startswith("."):
        raise SettingsError(f"name is {recipe.name!r}; it takes letters, digits, '-', '_' and '.'")
    if (size := len(recipe.name.encode())) > 255:
        raise SettingsError(f"name has {size} bytes; it takes at most 255, because it names a folder")
    try:
        check_labels(recipe.data, recipe.labels)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    check_stream(recipe)
    check_trainer(recipe.trainer, "trainer")
    for stage in ("teacher", "assistant", "student"):
        settings: TrainSettings | None = getattr(recipe, stage)
        if settings is not None:
            check_tasks(settings.tasks, f"{stage}.tasks")
            check_trainer(settings.trainer, f"{stage}.trainer")
            try_trainer(recipe.trainer, settings.trainer, stage, on_cpu=True)
            check_schedule(settings, recipe.trainer, stage)
            check_strategy(settings, recipe.trainer, stage)
            if settings.packing and settings.model.attention == "flash_attention_2":
                raise SettingsError(f"{stage}.packing must be false if {stage}.model.attention is flash_attention_2")
            if recipe.data.drop_modality and "classify" not in settings.tasks:
                raise SettingsError(f"data.drop_modality needs classify in {stage}.tasks: it trains labels only")
            if settings.model.lora is not None and not settings.model.path:
                raise SettingsError(f"{stage}.model.lora needs {stage}.model.path: a tiny model is not pretrained")
    annotate, student = recipe.annotate, recipe.student
    if recipe.task.examples and not (annotate and (annotate.endpoint or annotate.model)):
        raise SettingsError("task.examples needs annotate.endpoint or annotate.model: a trained teacher sees none")
    if annotate is not None:
        teachers = [recipe.teacher, annotate.endpoint, annotate.model]
        if sum(item is not None for item in teachers) > 1:
            raise SettingsError("annotate takes one teacher: a teacher section, annotate.endpoint or annotate.model")
        if not any(item is not None for item in teachers) and not annotate.recorded:
            raise SettingsError("annotate needs a teacher section, or one of its fields endpoint, model and recorded")
    for stage in ("assistant", "student", "teacher"):
        learner: TrainSettings | None = getattr(recipe, stage)
        allowed = {"classify", "review"} if stage == "teacher" else {"classify"}
        if annotate is None and learner is not None and not {"classify"} <= set(learner.tasks) <= allowed:
            tasks = " and ".join(sorted(allowed))
            raise SettingsError(f"{stage}.tasks takes only {tasks} without an annotate section")
    if annotate is not None and recipe.task.scale is not None:
        raise SettingsError("annotate does not support task.scale: rationales need label names; remove one of the two")
    if recipe.augment is not None and (recipe.assistant is None or "reason" not in recipe.assistant.tasks):
        raise SettingsError("augment needs an assistant section that trains the reason task")
    if student is not None:
        options = student.distillation
        if options.weight > 0 and recipe.assistant is None:
            raise SettingsError("student.distillation.weight must be 0 without an assistant section")
        attention = recipe.assistant.model.attention if recipe.assistant is not None and options.weight > 0 else None
        if attention == "flash_attention_2" and student.packing and options.positions == "response":
            raise SettingsError("student.packing must be false if assistant.model.attention is flash_attention_2")
        if options.weight > 0 and recipe.task.scale is not None and recipe.task.scale.spread > 0:
            raise SettingsError("student.distillation.weight must be 0 if task.scale.spread is above 0")
        if options.weight > 0 and recipe.data.drop_modality and options.soft_targets == "cached":
            raise SettingsError("student.distillation.soft_targets must be online with data.drop_modality")
        check_label_teacher(options, recipe.assistant, recipe.annotating_teacher)
    if recipe.refine is not None:
        check_refine(
            recipe.refine, student, recipe.assistant, recipe.annotating_teacher, annotated=annotate is not None
        )
    for stage in ("evaluate", "calibrate", "cascade", "export"):
        if getattr(recipe, stage) is not None and student is None:
            raise SettingsError(f"{stage} needs a student section")
    _check_teachers(recipe)
    if recipe.cascade is not None and recipe.calibrate is None:
        raise SettingsError("cascade needs a calibrate section, which fits its thresholds")


def _check_teachers(recipe: Recipe) -> None:
    """Validate the teachers that are not trained by the chain; log a notice for fields that have a new place."""
    asks = isinstance(recipe.annotating_teacher, EndpointSettings)
    if recipe.annotate is not None and recipe.annotate.batch is not None and not asks:
        raise SettingsError("annotate.batch needs annotate.endpoint: only an endpoint is asked in batches")
    if recipe.evaluate is not None and recipe.evaluate.batch is not None and not (asks and recipe.evaluate.teacher):
        raise SettingsError("evaluate.batch needs annotate.endpoint, and evaluate.teacher to be true")
    asks = isinstance(recipe.cascade_teacher, EndpointSettings)
    if recipe.calibrate is not None and recipe.calibrate.batch is not None and not asks:
        raise SettingsError("calibrate.batch needs an endpoint of annotate or cascade.teacher")
    cascade, calibrate = recipe.cascade and recipe.cascade.teacher, recipe.calibrate
    given = {}
    for name, section in {"annotate": recipe.annotate, "calibrate": calibrate, "cascade.teacher": cascade}.items():
        chosen = [kind for kind in ("endpoint", "model") if section and getattr(section, kind) is not None]
        given[name] = [f"{name}.{kind}" for kind in chosen]
        if len(chosen) > 1:
            raise SettingsError(f"{name} takes one teacher: {' or '.join(given[name])}")
        if section and section.model is not None and not section.model.path:
            raise SettingsError(f"{name}.model.path is required: an untrained tiny model cannot be the teacher")
    if old := given["calibrate"]:
        if given["cascade.teacher"]:
            raise SettingsError(f"the cascade takes one teacher: {given['cascade.teacher'][0]} or {old[0]}")
        log.warning("%s is read as %s, its new place", old[0], old[0].replace("calibrate", "cascade.teacher"))
    if calibrate is not None and recipe.cascade_teacher is None:
        raise SettingsError(
            "calibrate needs a teacher: a teacher section, or the endpoint or model of annotate or cascade.teacher"
        )


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML, which `load` can read, with passwords masked."""
    return yaml.safe_dump(masked(recipe), sort_keys=False, allow_unicode=True)


def masked(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as a dictionary with passwords masked, for everything that leaves the process."""
    return {name: mask(value) for name, value in dataclasses.asdict(recipe).items()}
