"""Temperatures and thresholds of the cascade, fitted on the validation split: the content of `calibration.json`."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np

from distill.cascade.cascade import Calibration, CascadePolicy, Prediction
from distill.cascade.thresholds import threshold_for_budget, threshold_for_risk
from distill.cascade.uncertainty import Measure, fit_error_map, fit_temperature
from distill.errors import RunError, SettingsError
from distill.evaluation.classification import calibration_error
from distill.models.reasoner import ClassScores
from distill.settings import Fraction, InnerFraction, Range, Settings
from distill.task.labels import LabelSpace

log = logging.getLogger(__name__)


@dataclass
class CalibrateSettings(Settings):
    """How the thresholds of the cascade are fitted. Only the validation split is used."""

    by: Literal["budget", "risk", "fixed"] = "budget"
    """What the student's threshold is fitted to: budget (teacher calls), risk (the student's error rate), or fixed
    (given thresholds)."""
    budget: Annotated[float, Range(0, 2)] = 0.3
    """Teacher calls per post; a reviewed post costs two."""
    risk: InnerFraction = 0.05
    """Highest error rate among the posts that the student answers alone, guaranteed with `confidence`."""
    confidence: InnerFraction = 0.9
    """Probability, over validation sets, that the risk bound holds."""
    student_threshold: Fraction | None = None
    """Highest uncertainty at which the student's answer is accepted; only with `by: fixed`."""
    teacher_threshold: Fraction | None = None
    """Highest uncertainty at which the teacher's first answer is accepted; null: fitted from `review`."""
    review: Fraction = 0.1
    """Share of the teacher's answers to all validation posts that its threshold does not accept. They are reviewed if
    the student's polarity differs. Among deferred posts, which are harder, the share is larger."""
    measure: Measure = "entropy"
    """Uncertainty measure: entropy (of the paper, divided by ln K), max_probability or margin, each from 0 to 1."""
    min_label_mass: Fraction = 0.5
    """Least total probability of the label tokens; an answer below it has uncertainty 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.by == "fixed") != (self.student_threshold is not None):
            raise SettingsError("calibrate.student_threshold must be set if calibrate.by is fixed, and only then")


def calibrate(
    gold: Sequence[str | float],
    student: ClassScores,
    teacher: ClassScores,
    names: tuple[str, str],
    labels: LabelSpace,
    settings: CalibrateSettings,
    *,
    reviews: bool = True,
) -> dict[str, Any]:
    """Fit both temperatures and both thresholds and return the content of `calibration.json`.

    Args:
        gold: label names or values on a scale, one for each validation post.
        student, teacher: scores of the same posts. Posts that a model did not answer are left out and counted.
        names: names of student and teacher.
        reviews: whether the cascade has its third stage, whose posts cost a second call.

    Raises:
        SettingsError: the posts do not support the risk target; the message gives the smallest supported one.
        RunError: no post was answered by both models.
    """
    answered = student.answered & teacher.answered
    if not answered.any():
        raise RunError("calibrate: no validation post was answered by both student and teacher")
    gold = [label for label, keep in zip(gold, answered, strict=True) if keep]
    student, teacher = student.select(answered), teacher.select(answered)
    truth = np.array([labels.index(label) for label in gold])
    temperatures = [fit_temperature(scores.probabilities, truth) for scores in (student, teacher)]
    calibration = Calibration(
        student=names[0],
        teacher=names[1],
        measure=settings.measure,
        student_temperature=temperatures[0],
        teacher_temperature=temperatures[1],
        student_threshold=0.0,
        teacher_threshold=0.0,
        min_label_mass=settings.min_label_mass,
    )
    policy = CascadePolicy(labels, calibration, reviews=reviews)
    predictions = (policy.student_predictions(student), policy.teacher_predictions(teacher))
    student_uncertainty, teacher_uncertainty = (
        np.array([prediction.uncertainty for prediction in of_model]) for of_model in predictions
    )

    teacher_threshold = settings.teacher_threshold
    if teacher_threshold is None:
        teacher_threshold = threshold_for_budget(teacher_uncertainty, np.ones(len(truth)), settings.review).tau
    calibration = replace(calibration, teacher_threshold=teacher_threshold)
    policy = replace(policy, calibration=calibration)
    # calls per post if it is deferred: a review costs a second one
    calls = np.array([1 + (policy.accept_teacher(*both) is None) for both in zip(*predictions, strict=True)])
    student_errors, teacher_errors = (errors(of_model, gold, labels) for of_model in predictions)

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
            else:
                threshold = threshold_for_risk(student_uncertainty, student_errors, settings.risk, settings.confidence)
        except ValueError as error:
            raise SettingsError(f"calibrate.{settings.by}: {error}") from None
        calibration = replace(calibration, student_threshold=threshold.tau)
        promise |= {name: value for name, value in asdict(threshold).items() if value is not None}
    promise["says"] = _promise_text(promise, len(truth))
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
            "student": _model_metrics(student, predictions[0], student_uncertainty, student_errors, truth),
            "teacher": _model_metrics(teacher, predictions[1], teacher_uncertainty, teacher_errors, truth),
        },
    }


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
    scores: ClassScores,
    predictions: Sequence[Prediction],
    uncertainty: np.ndarray,
    wrong: np.ndarray,
    truth: np.ndarray,
) -> dict[str, Any]:
    """ECE of one model before and after temperature scaling, and the map from uncertainty to error probability.

    The ECE is None if the model does not return probabilities.
    """
    knots, known = fit_error_map(uncertainty, wrong), scores.are_probabilities
    return {
        "ece_before": calibration_error(scores.probabilities, truth) if known else None,
        "ece_after": calibration_error(stack_probabilities(predictions), truth) if known else None,
        "error_probability": dict(zip(("uncertainty", "error"), knots, strict=True)),
    }


def _promise_text(promise: Mapping[str, Any], n: int) -> str:
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
    return "The thresholds are set in the recipe; nothing is guaranteed."
