"""Settings of stages that several packages share: the teachers, and where each stage takes its teacher from."""

from dataclasses import dataclass, field
from typing import Any

from distill.annotation.annotate import AnnotateSettings
from distill.cascade.calibration import CalibrateSettings
from distill.cascade.cascade import CascadeSettings
from distill.errors import SettingsError
from distill.models.backbone import ModelSettings
from distill.models.endpoint import BatchSettings, EndpointSettings
from distill.settings import Settings
from distill.training.assistant import TrainSettings


@dataclass
class TeacherSettings(TrainSettings):
    """Training of a local teacher."""

    tasks: dict[str, float] = field(default_factory=lambda: {"predict": 1.0, "explain": 1.0, "classify": 1.0})
    """Training tasks and their weights in the loss: predict, explain and classify with an annotate section, otherwise
    classify only. review prepares the teacher for the third stage of the cascade, whose prompt contains both earlier
    predictions."""


@dataclass
class AnnotateStageSettings(AnnotateSettings):
    """The teacher that writes the reasoning data, and how its answers are requested and filtered."""

    endpoint: EndpointSettings | None = None
    """Use a model behind an OpenAI-compatible server as teacher."""
    model: ModelSettings | None = None
    """Use a pretrained model on this machine as teacher, without fine-tuning."""


@dataclass
class CalibrateStageSettings(CalibrateSettings):
    """Fitting of the cascade's temperatures and thresholds."""

    endpoint: EndpointSettings | None = None
    """Earlier place of cascade.teacher.endpoint; still read, with a notice."""
    model: ModelSettings | None = None
    """Earlier place of cascade.teacher.model; still read, with a notice."""
    batch: BatchSettings | None = None
    """Ask the endpoint of the cascade's teacher in batch files."""


@dataclass
class CascadeTeacherSettings(Settings):
    """The teacher of the cascade, for calibrate, cascade and serve. Empty: the teacher that annotates."""

    endpoint: EndpointSettings | None = None
    """Use a model behind an OpenAI-compatible server."""
    model: ModelSettings | None = None
    """Use a pretrained model on this machine, without fine-tuning."""


@dataclass
class CascadeStageSettings(CascadeSettings):
    """The cascade on the test split, and its teacher; its temperatures and thresholds come from `calibrate`."""

    teacher: CascadeTeacherSettings | None = None
    """The teacher of the cascade, if it is not the one that annotates."""


Teacher = TeacherSettings | EndpointSettings | ModelSettings
"""The settings of a teacher: trained by the chain, behind a server, or pretrained on this machine."""


def check_stream(recipe: Any) -> None:
    """Refuse what a streamed source does not take: it would hold all training posts in memory."""
    if recipe.data.source != "stream":
        return
    distillation = recipe.student and recipe.student.distillation
    refused = {
        "data.teacher": recipe.data.teacher,
        "task.examples": recipe.task.examples,
        "assistant.labelled_posts": recipe.assistant and recipe.annotate and recipe.assistant.labelled_posts,
        "student.labelled_posts": recipe.student and recipe.annotate and recipe.student.labelled_posts,
        "refine": recipe.refine is not None,
        "engine: ray": recipe.engine == "ray",
        "annotate.batch": recipe.annotate and recipe.annotate.batch,
        "student.distillation.label_weight": distillation and distillation.label_weight,
        "student.distillation.soft_targets: cached": distillation and distillation.soft_targets == "cached",
    }
    for name, given in refused.items():
        if given:
            raise SettingsError(f"{name} cannot be used with data.source stream; remove it")
