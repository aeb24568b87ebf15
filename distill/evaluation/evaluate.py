"""One role judged on the test split: label scoring, reasoning, and the metrics of both."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill.evaluation.classification import classification_metrics
from distill.evaluation.reasoning import reasoning_metrics
from distill.evaluation.regression import regression_metrics
from distill.models.reasoner import ClassScores, Reasoner, Sampling, classify_and_reason
from distill.task.labels import LabelSpace
from distill.task.prompts import Template
from distill.task.rationale import InvalidRationale, Rationale, check
from distill.task.sample import Sample


@dataclass
class EvaluateSettings:
    """How the roles are judged."""

    teacher: bool = True
    """Judge the teacher too, where it can be asked; behind an endpoint this pays for the test split."""
    max_new_tokens: int = 512
    """Token limit of a rationale."""
    similarity_model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Folder or hub name of the embeddings that judge the similarity of rationales."""


@dataclass(frozen=True)
class Judged:
    """The answers of one role to N test samples; `rationales` hold None where the text does not parse."""

    scores: ClassScores
    texts: list[str] | None
    rationales: list[Rationale | None] | None

    def label(self, index: int, labels: LabelSpace) -> str:
        return labels.names[int(self.scores.probabilities[index].argmax())]

    def value(self, index: int, labels: LabelSpace) -> float | None:
        """The value on the labels' scale, where they have one."""
        return float(labels.scale.expectation(self.scores.probabilities[index])) if labels.scale else None


def judge(
    reasoner: Reasoner,
    samples: Sequence[Sample],
    labels: LabelSpace,
    settings: EvaluateSettings,
    template: Template | None = "reason",
    progress: Callable[[int, int], None] | None = None,
) -> Judged:
    """Classify N samples, and reason about them greedily unless `template` is None."""
    if template is None:
        return Judged(reasoner.classify(samples), None, None)
    scores: dict[int, ClassScores] = {}
    texts = [""] * len(samples)
    rationales: list[Rationale | None] = [None] * len(samples)
    answers = classify_and_reason(reasoner, samples, template, Sampling(max_new_tokens=settings.max_new_tokens))
    for index, scored, answer in answers:
        scores[index], texts[index] = scored, answer.text
        rationales[index] = read(answer.text, labels, finished=answer.finished)
        if progress is not None:
            progress(len(scores), len(samples))
    return Judged(ClassScores.together([scores[index] for index in range(len(samples))]), texts, rationales)


def gold_values(samples: Sequence[Sample]) -> list[float]:
    """The values of samples that are labelled on a scale."""
    return [sample.label for sample in samples if isinstance(sample.label, float)]


def read(text: str | None, labels: LabelSpace, *, finished: bool = True) -> Rationale | None:
    """A rationale from text, None where it breaks the format."""
    try:
        return None if text is None else check(text, labels, finished=finished)
    except InvalidRationale:
        return None


def role_metrics(
    judged: Judged,
    samples: Sequence[Sample],
    references: Sequence[Rationale | None],
    labels: LabelSpace,
    settings: EvaluateSettings,
) -> dict[str, Any]:
    """One object of `metrics.json` (DESIGN section 3) for N samples.

    On a scale, the figures of classification are over its bins, and those of the recovered values stand beside them.
    Where the samples have gold attributes, `grounded` is the share of them that a rationale names, over all samples.
    """
    gold = [labels.name(sample.label) for sample in samples]
    metrics = classification_metrics(gold, judged.scores.probabilities, labels)
    if labels.scale is not None:
        predicted = labels.scale.expectation(judged.scores.probabilities)
        metrics |= regression_metrics(gold_values(samples), predicted, labels.scale)
    metrics["label_mass"] = float(np.mean(judged.scores.label_mass))
    if judged.rationales is None:
        return metrics
    classified = [judged.label(index, labels) for index in range(len(samples))]
    metrics |= reasoning_metrics(
        judged.rationales, references, gold, classified, labels, similarity_model=settings.similarity_model
    )
    named = [
        rationale is not None and value in re.findall(r"\w+", f"{rationale.text_analysis} {rationale.image_analysis}")
        for sample, rationale in zip(samples, judged.rationales, strict=True)
        for value in sample.attributes.values()
    ]
    return metrics | ({"grounded": float(np.mean(named))} if named else {})
