"""From samples to the batches of multitask training: one sequence per sample and task, with the same picture."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from random import Random
from typing import get_args

import torch

from distill.errors import SettingsError
from distill.models.backbone import Backbone, Features
from distill.task.labels import LabelSpace
from distill.task.prompts import CLASSIFY_PREFIX, SCORED, Earlier, Template
from distill.task.sample import Sample

Batch = dict[str, Features]

READER_ACCURACY = 0.6
"""How often each of the made-up earlier readers of a *review* is right."""


def answer(template: Template, sample: Sample, labels: LabelSpace) -> str | None:
    """What the model should answer: the rationale, or where a label alone is asked for its name; None: nobody knows."""
    if template in SCORED:
        return None if sample.label is None else f"{CLASSIFY_PREFIX} {labels.name(sample.label)}"
    return sample.rationale


def encode_tasks(samples: Sequence[Sample], backbone: Backbone, tasks: Mapping[Template, float]) -> Batch:
    """The features of B samples for each task; a task takes the samples whose answer is known.

    Where the labels' scale spreads its targets, *classify* and *review* are prompts closed with the forced prefix, with
    `targets` [B, K] in place of answers.
    """
    labels = backbone.labels
    batch: Batch = {}
    for template in tasks:
        pairs = [(sample, text) for sample in samples if (text := answer(template, sample, labels)) is not None]
        if not pairs:
            continue
        answered, answers = zip(*pairs, strict=True)
        earlier = [made_up_answers(sample, labels) for sample in answered] if template == "review" else None
        if template in SCORED and labels.scale is not None and labels.scale.spread > 0:
            targets = torch.tensor(labels.scale.targets([sample.label for sample in answered]), dtype=torch.float32)
            batch[template] = backbone.encode(answered, template, earlier=earlier) | {"targets": targets}
        else:
            batch[template] = backbone.encode(answered, template, answers, earlier=earlier)
    return batch


def made_up_answers(sample: Sample, labels: LabelSpace) -> Earlier:
    """Earlier answers for training on *review*, so that a teacher learns to weigh and not to trust them.

    Each of the two readers is right with probability READER_ACCURACY and else says any other label; confidences are
    uniform between chance and certainty. They follow from the sample's id alone.
    """
    draw = Random(sha256(sample.id.encode()).digest())
    gold = labels.name(sample.label)
    others = [name for name in labels.names if name != gold]

    def reader() -> tuple[str, float]:
        said = gold if draw.random() < READER_ACCURACY else draw.choice(others)
        return said, draw.uniform(1 / len(labels), 1)

    return Earlier(*reader(), *reader())


def check_tasks(tasks: Mapping[str, float], field: str) -> None:
    """Raises SettingsError for an unknown task or a weight that is not positive."""
    for name, weight in tasks.items():
        if name not in get_args(Template) or weight <= 0:
            known = ", ".join(get_args(Template))
            raise SettingsError(f"{field}.{name}: {weight} is not a task with a positive weight; the tasks are {known}")
    if not tasks:
        raise SettingsError(f"{field}: at least one task is needed")
