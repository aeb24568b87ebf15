"""Evaluation of one role on the test split: label scoring, generation of rationales, and the metrics of both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill.evaluation.classification import classification_metrics
from distill.evaluation.reasoning import grounding, published_metrics, reasoning_metrics
from distill.evaluation.regression import regression_metrics
from distill.models.endpoint import BatchSettings
from distill.models.reasoner import ClassScores, Reasoner, Sampling, classify_and_reason
from distill.settings import Count, Settings
from distill.task.labels import LabelSpace
from distill.task.prompts import Template
from distill.task.rationale import InvalidRationale, Rationale, check
from distill.task.sample import Sample


@dataclass
class EvaluateSettings(Settings):
    """Evaluation of the roles on the test split."""

    teacher: bool = True
    """Evaluate the teacher, too, if it can be called; an endpoint receives two requests per test post."""
    modalities: bool = False
    """Also evaluate the student on posts without their text, images, video or sound, one at a time."""
    max_new_tokens: Count = 512
    """Maximum number of tokens of a rationale."""
    similarity_model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Folder or hub name of the sentence embedding model for the metric `similarity`."""
    batch: BatchSettings | None = None
    """Ask the teacher's endpoint in batch files."""


@dataclass(frozen=True)
class RoleOutputs:
    """Outputs of one role on N samples.

    Attributes:
        scores: label scores of the N samples.
        texts: N generated answers, None for a request without an answer; None if the role does not reason.
        rationales: N parsed rationales, None for texts that do not parse; None if the role does not reason.
    """

    scores: ClassScores
    texts: list[str | None] | None
    rationales: list[Rationale | None] | None

    def label(self, index: int, labels: LabelSpace) -> str | None:
        """The most probable label of a sample; None for a sample without an answer."""
        if not self.scores.answered[index]:
            return None
        return labels.names[int(self.scores.probabilities[index].argmax())]

    def value(self, index: int, labels: LabelSpace) -> float | None:
        """The expected value on the labels' scale; None without a scale or an answer."""
        if labels.scale is None or not self.scores.answered[index]:
            return None
        return float(labels.scale.expectation(self.scores.probabilities[index]))


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
    texts: list[str | None] = [None] * len(samples)
    rationales: list[Rationale | None] = [None] * len(samples)
    answers = classify_and_reason(reasoner, samples, template, Sampling(max_new_tokens=settings.max_new_tokens))
    for index, sample_scores, answer in answers:
        scores[index] = sample_scores
        if answer.error is None:
            texts[index] = answer.text
            rationales[index] = parse_or_none(answer.text, labels, finished=answer.finished, post=samples[index].text)
        if progress is not None:
            progress(len(scores), len(samples))
    return RoleOutputs(ClassScores.concatenate([scores[index] for index in range(len(samples))]), texts, rationales)


def gold_values(samples: Sequence[Sample]) -> list[float]:
    """The values of the samples that are labelled on a scale."""
    return [sample.label for sample in samples if isinstance(sample.label, float)]


def parse_or_none(text: str | None, labels: LabelSpace, *, finished: bool = True, post: str = "") -> Rationale | None:
    """Parse a rationale; None if there is no text or it is not a valid rationale."""
    try:
        return None if text is None else check(text, labels, finished=finished, post=post)
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
    added. Samples without an answer are counted as `unanswered` and are in no other metric. Metrics of the confidence
    are None if the model does not return probabilities. If samples have gold attributes, `grounded` is the share of all
    their attributes that the rationales name as a word in the text or image analysis.

    Args:
        references: N reference rationales; None for samples without one.
        reference_texts: N reference rationales as generated, for the published metrics; None: there are none.
    """
    gold = [labels.name(sample.label) for sample in samples]
    answered: list[int] = np.flatnonzero(outputs.scores.answered).tolist()
    metrics = _label_metrics(outputs.scores.select(outputs.scores.answered), [samples[i] for i in answered], labels)
    metrics["unanswered"] = len(samples) - len(answered)
    if outputs.rationales is None or outputs.texts is None:
        return metrics
    reasoned = [index for index in answered if outputs.texts[index] is not None]
    if reasoned:
        metrics |= reasoning_metrics(
            [outputs.rationales[index] for index in reasoned],
            [references[index] for index in reasoned],
            [gold[index] for index in reasoned],
            [outputs.label(index, labels) or "" for index in reasoned],
            labels,
            similarity_model=settings.similarity_model,
        )
        metrics |= published_metrics(
            [outputs.texts[index] for index in reasoned],
            [None if reference_texts is None else reference_texts[index] for index in reasoned],
            settings.similarity_model,
        )
    named = [
        value
        for sample, text, rationale in zip(samples, outputs.texts, outputs.rationales, strict=True)
        if text is not None
        for value in grounding(rationale, sample.attributes)
    ]
    return metrics | ({"grounded": float(np.mean(named))} if named else {})


def _label_metrics(scores: ClassScores, samples: Sequence[Sample], labels: LabelSpace) -> dict[str, Any]:
    """The metrics of label scoring on samples that have an answer; all are None without samples."""
    if not samples:
        size = len(labels)
        unknown = dict.fromkeys(("accuracy", "weighted_f1", "macro_f1", "ece", "aurc", "label_mass"))
        return {"n": 0, **unknown, "confusion": [[0] * size for _ in range(size)]}
    gold = [labels.name(sample.label) for sample in samples]
    metrics = classification_metrics(gold, scores.probabilities, labels)
    if labels.scale is not None:
        metrics |= regression_metrics(
            gold_values(samples), labels.scale.expectation(scores.probabilities), labels.scale
        )
    if not scores.are_probabilities:
        return metrics | {"ece": None, "aurc": None, "label_mass": None}
    return metrics | {"label_mass": float(np.mean(scores.label_mass))}
