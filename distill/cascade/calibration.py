"""Temperatures and thresholds of the cascade, fitted on the validation split: the content of `calibration.json`."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np

from distill.cascade.cascade import Calibration, CascadePolicy, Prediction
from distill.cascade.thresholds import (
    Threshold,
    largest_quality,
    threshold_for_budget,
    threshold_for_quality,
    threshold_for_risk,
)
from distill.cascade.uncertainty import Knots, Measure, Signal, fit_error_map, fit_temperature
from distill.errors import RunError, SettingsError
from distill.evaluation.classification import calibration_error
from distill.models.reasoner import ClassScores
from distill.settings import Fraction, InnerFraction, Range, Settings
from distill.task.labels import LabelSpace

log = logging.getLogger(__name__)

MIN_POSTS = 100
"""Validation posts with the same modalities from which a temperature of their own is fitted: that of fewer is less
certain than the temperatures of trained models differ."""


@dataclass
class CalibrateSettings(Settings):
    """How the thresholds of the cascade are fitted. Only the validation split is used."""

    by: Literal["budget", "risk", "quality", "fixed"] = "budget"
    """What the student's threshold is fitted to: budget (teacher calls), risk (the student's error rate), quality (of
    the cascade, with the fewest calls), or fixed (given thresholds)."""
    budget: Annotated[float, Range(0, 2)] = 0.3
    """Teacher calls per post; a reviewed post costs two."""
    risk: InnerFraction = 0.05
    """Highest error rate among the posts that the student answers alone, guaranteed with `confidence`."""
    quality: Annotated[float, Range(0, above=True)] | None = None
    """Accuracy of the cascade that is reached with `confidence`, or on a scale its mean absolute error; only with
    `by: quality`."""
    confidence: InnerFraction = 0.9
    """Probability, over validation sets, that the bound on risk or quality holds."""
    student_threshold: Fraction | None = None
    """Highest uncertainty at which the student's answer is accepted; only with `by: fixed`."""
    teacher_threshold: Fraction | None = None
    """Highest uncertainty at which the teacher's first answer is accepted; null: fitted from `review`."""
    review: Fraction = 0.1
    """Share of the teacher's answers to all validation posts that its threshold does not accept. They are reviewed if
    the student's polarity differs. Among deferred posts, which are harder, the share is larger."""
    signal: Signal | None = None
    """What answers are ranked by: entropy (of the paper, divided by ln K), max_probability, margin, or error, the
    probability of being wrong that isotonic regression estimates from the entropy; null: `measure`."""
    measure: Measure = "entropy"
    """The earlier name of `signal`."""
    min_label_mass: Fraction = 0.5
    """Least total probability of the label tokens; an answer below it has uncertainty 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.by == "fixed") != (self.student_threshold is not None):
            raise SettingsError("calibrate.student_threshold must be set if calibrate.by is fixed, and only then")
        if (self.by == "quality") != (self.quality is not None):
            raise SettingsError("calibrate.quality must be set if calibrate.by is quality, and only then")


def calibrate(
    gold: Sequence[str | float],
    student: ClassScores,
    teacher: ClassScores,
    names: tuple[str, str],
    labels: LabelSpace,
    settings: CalibrateSettings,
    *,
    modalities: Sequence[str] | None = None,
    reviews: bool = True,
) -> dict[str, Any]:
    """Fit both temperatures and both thresholds and return the content of `calibration.json`.

    Args:
        gold: label names or values on a scale, one for each validation post.
        student, teacher: scores of the same posts. Posts that a model did not answer are left out and counted.
        names: names of student and teacher.
        modalities: what each post has (`modalities_of`): a set of modalities that MIN_POSTS posts have, but not all of
            them, has temperatures of its own; None: all posts have the same.
        reviews: whether the cascade has its third stage, whose posts cost a second call.

    Raises:
        SettingsError: the posts do not support the target of risk or quality; the message gives one that they support.
        RunError: no post was answered by both models.
    """
    answered = student.answered & teacher.answered
    if not answered.any():
        raise RunError("calibrate: no validation post was answered by both student and teacher")
    gold = [label for label, keep in zip(gold, answered, strict=True) if keep]
    student, teacher = student.select(answered), teacher.select(answered)
    kinds = np.array(modalities if modalities is not None else [""] * len(answered))[answered]
    truth = np.array([labels.index(label) for label in gold])
    temperatures = [fit_temperature(scores.probabilities, truth) for scores in (student, teacher)]
    by_modalities = [_by_modalities(scores, truth, kinds) for scores in (student, teacher)]
    signal = settings.signal or settings.measure
    calibration = Calibration(
        student=names[0],
        teacher=names[1],
        measure="entropy" if signal == "error" else signal,
        student_temperature=temperatures[0],
        teacher_temperature=temperatures[1],
        student_threshold=0.0,
        teacher_threshold=0.0,
        min_label_mass=settings.min_label_mass,
        student_by_modalities=by_modalities[0],
        teacher_by_modalities=by_modalities[1],
    )
    policy = CascadePolicy(labels, calibration, reviews=reviews)
    predictions = (policy.student_predictions(student, kinds), policy.teacher_predictions(teacher, kinds))
    student_errors, teacher_errors = (errors(of_model, gold, labels) for of_model in predictions)
    knots = (
        fit_error_map(_uncertainty(predictions[0]), student_errors),
        fit_error_map(_uncertainty(predictions[1]), teacher_errors),
    )
    if signal == "error":
        calibration = replace(calibration, student_errors=knots[0], teacher_errors=knots[1])
        policy = replace(policy, calibration=calibration)
        predictions = (policy.student_predictions(student, kinds), policy.teacher_predictions(teacher, kinds))
    student_uncertainty, teacher_uncertainty = (_uncertainty(of_model) for of_model in predictions)

    teacher_threshold = settings.teacher_threshold
    if teacher_threshold is None:
        teacher_threshold = threshold_for_budget(teacher_uncertainty, np.ones(len(truth)), settings.review).tau
    calibration = replace(calibration, teacher_threshold=teacher_threshold)
    policy = replace(policy, calibration=calibration)
    # calls per post if it is deferred: a review costs a second one
    decisions = [policy.accept_teacher(*both) for both in zip(*predictions, strict=True)]
    calls = np.array([1 + (decision is None) for decision in decisions])

    promise: dict[str, Any] = {"by": settings.by}
    if settings.student_threshold is not None:
        calibration = replace(calibration, student_threshold=settings.student_threshold)
    else:
        try:
            if settings.by == "budget":
                threshold = threshold_for_budget(student_uncertainty, calls, settings.budget)
                if threshold.calls is not None and threshold.calls > settings.budget + 1e-9:
                    log.warning(
                        "calibrate.budget: posts with student uncertainty 1 alone need %.3f teacher calls per post, "
                        "more than the budget of %g",
                        threshold.calls,
                        settings.budget,
                    )
            elif settings.by == "risk":
                threshold = threshold_for_risk(student_uncertainty, student_errors, settings.risk, settings.confidence)
            else:
                final = np.stack([  # a review is not known here: the teacher's first answer counts
                    (decision or teacher_first).probabilities
                    for decision, teacher_first in zip(decisions, predictions[1], strict=True)
                ])  # fmt: skip
                own = stack_probabilities(predictions[0])
                threshold = _for_quality(student_uncertainty, own, final, calls, gold, labels, settings)
        except ValueError as error:
            raise SettingsError(f"calibrate.{settings.by}: {error}") from None
        calibration = replace(calibration, student_threshold=threshold.tau)
        promise |= {name: value for name, value in asdict(threshold).items() if value is not None}
    promise["says"] = _promise_text(promise, len(truth), labels)
    deferred = (student_uncertainty > calibration.student_threshold) | (student_uncertainty >= 1)
    return asdict(calibration) | {
        "n": len(truth),
        "unanswered": int((~answered).sum()),
        "reviews": reviews,
        "promise": promise,
        "assumes": "posts to come are like those of the validation split, on which temperatures and best epochs were "
        "chosen as well",
        "validation": {
            "deferred": float(deferred.mean()),
            "teacher_calls_per_sample": float((deferred * calls).mean()),
            "student_risk": float(student_errors[~deferred].mean()) if not deferred.all() else None,
        },
        "models": {
            "student": _model_metrics(student, predictions[0], knots[0], truth),
            "teacher": _model_metrics(teacher, predictions[1], knots[1], truth),
        },
    }


def _by_modalities(scores: ClassScores, truth: np.ndarray, kinds: np.ndarray) -> dict[str, float]:
    """The temperature of each set of modalities that MIN_POSTS posts have, but not all of them."""
    names, counts = np.unique(kinds, return_counts=True)
    enough = [str(name) for name, count in zip(names, counts, strict=True) if MIN_POSTS <= count < len(kinds)]
    return {name: fit_temperature(scores.probabilities[kinds == name], truth[kinds == name]) for name in enough}


def stack_probabilities(predictions: Sequence[Prediction]) -> np.ndarray:
    """The temperature-scaled probabilities [B, K] of B predictions."""
    return np.stack([prediction.probabilities for prediction in predictions])


def errors(predictions: Sequence[Prediction], gold: Sequence[str | float], labels: LabelSpace) -> np.ndarray:
    """[B] boolean: the label is wrong, or on a scale the polarity."""
    if labels.scale is None:
        return np.array(
            [prediction.label != label for prediction, label in zip(predictions, gold, strict=True)], dtype=bool
        )
    truth = labels.scale.polarity(np.array(gold, dtype=np.float64))
    return np.array([prediction.polarity for prediction in predictions]) != truth


def _model_metrics(
    scores: ClassScores, predictions: Sequence[Prediction], knots: Knots, truth: np.ndarray
) -> dict[str, Any]:
    """ECE of one model before and after temperature scaling, and the map from uncertainty to error probability.

    The ECE is None if the model does not return probabilities.
    """
    known = scores.are_probabilities
    return {
        "ece_before": calibration_error(scores.probabilities, truth) if known else None,
        "ece_after": calibration_error(stack_probabilities(predictions), truth) if known else None,
        "error_probability": dict(zip(("uncertainty", "error"), knots, strict=True)),
    }


def _uncertainty(predictions: Sequence[Prediction]) -> np.ndarray:
    return np.array([prediction.uncertainty for prediction in predictions])


def quality_target(settings: CalibrateSettings, labels: LabelSpace) -> float:
    """`calibrate.quality` as a mean quality in (0, 1): the accuracy, or on a scale 1 - MAE / width.

    Raises:
        SettingsError: it is not in this range.
    """
    assert settings.quality is not None
    top = 1.0 if labels.scale is None else labels.scale.high - labels.scale.low
    if not settings.quality < top:
        raise SettingsError(f"calibrate.quality is {settings.quality:g}; it takes a number above 0 and below {top:g}")
    return settings.quality if labels.scale is None else 1 - settings.quality / top


def _for_quality(
    uncertainty: np.ndarray,
    student: np.ndarray,
    final: np.ndarray,
    calls: np.ndarray,
    gold: Sequence[str | float],
    labels: LabelSpace,
    settings: CalibrateSettings,
) -> Threshold:
    """The threshold for `calibrate.quality`, with the quality and its interval as accuracy, or on a scale as MAE.

    Args:
        student, final: probabilities [n, K] of the student, and the final ones of posts that are deferred.

    Raises:
        ValueError: the posts do not support the target.
    """
    target, scale, confidence = quality_target(settings, labels), labels.scale, settings.confidence
    if scale is None:
        truth = np.array([labels.index(label) for label in gold])
        first, last = ((rows.argmax(1) == truth).astype(float) for rows in (student, final))
        return threshold_for_quality(uncertainty, first, last, calls, target, confidence)
    values, width = np.array(gold, dtype=np.float64), scale.high - scale.low
    first, last = ((1 - np.abs(scale.expectation(rows) - values) / width).clip(0, 1) for rows in (student, final))
    try:
        found = threshold_for_quality(uncertainty, first, last, calls, target, confidence)
    except ValueError:
        raise ValueError(
            f"{len(gold)} validation posts cannot support a mean absolute error of {settings.quality:g} at a "
            f"confidence of {confidence:g}; with the teacher's answers alone, "
            f"the smallest is {(1 - largest_quality(last, confidence)) * width:.6g}"
        ) from None
    mae = {name: (1 - getattr(found, name)) * width for name in ("quality", "reached", "reached_low", "reached_high")}
    mae["reached_low"], mae["reached_high"] = mae["reached_high"], mae["reached_low"]
    return replace(found, **mae | {"quality": settings.quality})


def _promise_text(promise: Mapping[str, Any], n: int, labels: LabelSpace) -> str:
    """The guarantee in words, for the report."""
    if promise["by"] == "budget":
        return (
            f"From {n} validation posts: {promise['calls']:.3f} teacher calls per post expected, "
            f"95% interval {promise['calls_low']:.3f} to {promise['calls_high']:.3f}."
        )
    if promise["by"] == "risk":
        return (
            f"From {n} validation posts: at most {promise['risk']:.1%} of the posts that the student answers alone are "
            f"wrong, at a confidence of {promise['confidence']:.0%}."
        )
    if promise["by"] == "quality":
        what = "an accuracy of at least" if labels.scale is None else "a mean absolute error of at most"
        return (
            f"From {n} validation posts: the cascade has {what} {promise['quality']:g} at a confidence of "
            f"{promise['confidence']:.0%}. On these posts it has {promise['reached']:.3f}, 95% interval "
            f"{promise['reached_low']:.3f} to {promise['reached_high']:.3f}, "
            f"with {promise['calls']:.3f} teacher calls per post."
        )
    return "The thresholds are set in the recipe; nothing is guaranteed."
