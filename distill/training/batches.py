"""From samples to the batches of multitask training: one sequence per sample and task, with the same picture."""

from collections.abc import Mapping, Sequence
from typing import get_args

from distill.errors import SettingsError
from distill.models.backbone import Backbone, Features
from distill.task.prompts import CLASSIFY_PREFIX, Template
from distill.task.sample import Sample

Batch = dict[str, Features]


def answer(template: Template, sample: Sample) -> str | None:
    """What the model should answer: the rationale, or for *classify* the label alone; None where nobody knows."""
    if template == "classify":
        return None if sample.label is None else f"{CLASSIFY_PREFIX} {sample.label}"
    return sample.rationale


def encode_tasks(samples: Sequence[Sample], backbone: Backbone, tasks: Mapping[Template, float]) -> Batch:
    """The features of B samples for each task; a task takes the samples whose answer is known."""
    batch: Batch = {}
    for template in tasks:
        pairs = [(sample, text) for sample in samples if (text := answer(template, sample)) is not None]
        if pairs:
            answered, answers = zip(*pairs, strict=True)
            batch[template] = backbone.encode(answered, template, answers)
    return batch


def check_tasks(tasks: Mapping[str, float], field: str) -> None:
    """Raises SettingsError for an unknown task or a weight that is not positive."""
    for name, weight in tasks.items():
        if name not in get_args(Template) or weight <= 0:
            known = ", ".join(get_args(Template))
            raise SettingsError(f"{field}.{name}: {weight} is not a task with a positive weight; the tasks are {known}")
    if not tasks:
        raise SettingsError(f"{field}: at least one task is needed")
