"""Evaluation of one role on the test split: label scoring, generation of rationales, and the metrics of both."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill.evaluation.classification import classification_metrics
from distill.evaluation.reasoning import published_metrics, reasoning_metrics
from distill.evaluation.regression import regression_metrics
from distill.models.reasoner import ClassScores, Reasoner, Sampling, classify_and_reason
from distill.task.labels import LabelSpace
from distill.task.prompts import Template
from distill.task.rationale import InvalidRationale, Rationale, check
from distill.task.sample import Sample


@dataclass
class EvaluateSettings:
    """Evaluation of the roles on the test split."""

    teacher: bool = True
    """Evaluate the teacher, too, if it can be called; an endpoint receives two requests per test post."""
    max_new_tokens: int = 512
    """Maximum number of tokens of a rationale."""
    similarity_model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Folder or hub name of the sentence embedding model for the metric `similarity`."""


@dataclass(frozen=True)
class RoleOutputs:
    """Outputs of one role on N samples.

    Attributes:
        scores: label scores of the N samples.
        texts: N generated answers; None if the role does not reason.
        rationales: N parsed rationales, None for texts that do not parse; None if the role does not reason.
    """

    scores: ClassScores
    texts: list[str] | None
    rationales: list[Rationale | None] | None

    def label(self, index: int, labels: LabelSpace) -> str:
        """The most probable label of a sample."""
        return labels.names[int(self.scores.probabilities[index].argmax())]

    def value(self, index: int, labels: LabelSpace) -> float | None:
        """The expected value on the labels' scale; None without a scale."""
        return float(labels.scale.expectation(self.scores.probabilities[index])) if labels.scale else None


def evaluate_role(
    reasoner: Reasoner,
    samples: Sequence[Sample],
    labels: LabelSpace,
    settings: EvaluateSettings,
    template: Template | None = "reason",
    progress: Callable[[int, int], None] | None = None,
) -> RoleOutputs:
    """Classify N samples and generate a rationale for each with greedy decoding.

    Args:
        template: prompt of the rationales; None: classify only.
        progress: called with the number of finished samples and N.
    """
    if template is None:
        return RoleOutputs(reasoner.classify(samples), None, None)
    scores: dict[int, ClassScores] = {}
    texts = [""] * len(samples)
    rationales: list[Rationale | None] = [None] * len(samples)
    answers = classify_and_reason(reasoner, samples, template, Sampling(max_new_tokens=settings.max_new_tokens))
    for index, sample_scores, answer in answers:
        scores[index], texts[index] = sample_scores, answer.text
        rationales[index] = parse_or_none(answer.text, labels, finished=answer.finished)
        if progress is not None:
            progress(len(scores), len(samples))
    return RoleOutputs(ClassScores.concatenate([scores[index] for index in range(len(samples))]), texts, rationales)


def gold_values(samples: Sequence[Sample]) -> list[float]:
    """The values of the samples that are labelled on a scale."""
    return [sample.label for sample in samples if isinstance(sample.label, float)]


def parse_or_none(text: str | None, labels: LabelSpace, *, finished: bool = True) -> Rationale | None:
    """Parse a rationale; None if there is no text or it is not a valid rationale."""
    try:
        return None if text is None else check(text, labels, finished=finished)
    except InvalidRationale:
        return None


def role_metrics(
    outputs: RoleOutputs,
    samples: Sequence[Sample],
    references: Sequence[Rationale | None],
    labels: LabelSpace,
    settings: EvaluateSettings,
    reference_texts: Sequence[str | None] | None = None,
) -> dict[str, Any]:
    """The metrics of one role on N samples, as written to `metrics.json`.

    On a scale, the classification metrics are those of its bins, and the regression metrics of the expected values are
    added. If samples have gold attributes, `grounded` is the share of all their attributes that the rationales name as
    a word in the text or image analysis.

    Args:
        references: N reference rationales; None for samples without one.
        reference_texts: N reference rationales as generated, for the published metrics; None: there are none.
    """
    gold = [labels.name(sample.label) for sample in samples]
    metrics = classification_metrics(gold, outputs.scores.probabilities, labels)
    if labels.scale is not None:
        predicted = labels.scale.expectation(outputs.scores.probabilities)
        metrics |= regression_metrics(gold_values(samples), predicted, labels.scale)
    metrics["label_mass"] = float(np.mean(outputs.scores.label_mass))
    if outputs.rationales is None:
        return metrics
    classified = [outputs.label(index, labels) for index in range(len(samples))]
    metrics |= reasoning_metrics(
        outputs.rationales, references, gold, classified, labels, similarity_model=settings.similarity_model
    )
    if outputs.texts is not None:
        others = reference_texts if reference_texts is not None else [None] * len(samples)
        metrics |= published_metrics(outputs.texts, others, settings.similarity_model)
    named = [
        rationale is not None and value in re.findall(r"\w+", f"{rationale.text_analysis} {rationale.image_analysis}")
        for sample, rationale in zip(samples, outputs.rationales, strict=True)
        for value in sample.attributes.values()
    ]
    return metrics | ({"grounded": float(np.mean(named))} if named else {})
