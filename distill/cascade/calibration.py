"""From two models' answers on the validation split to what the stages go by: temperatures, thresholds, a promise."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from distill.cascade.cascade import Calibration, CascadePolicy, Prediction
from distill.cascade.thresholds import by_budget, by_risk
from distill.cascade.uncertainty import Measure, fit_error_map, fit_temperature
from distill.errors import RunError, SettingsError
from distill.evaluation.classification import calibration_error
from distill.models.reasoner import ClassScores
from distill.task.labels import LabelSpace

log = logging.getLogger(__name__)


@dataclass
class CalibrateSettings:
    """How the thresholds of the cascade are fitted, on the validation split alone."""

    by: Literal["budget", "risk", "fixed"] = "budget"
    """What the student's threshold keeps to: budget (teacher calls), risk (the student's errors), or fixed values."""
    budget: float = 0.3
    """Teacher calls per post, 0 to 2; a post that is reviewed costs two."""
    risk: float = 0.05
    """Highest error rate among the posts that the student answers alone, kept to with `confidence`."""
    confidence: float = 0.9
    """Probability, over validation sets, that the risk is kept to."""
    student_threshold: float | None = None
    """Highest uncertainty at which the student's answer stands, where `by` is fixed."""
    teacher_threshold: float | None = None
    """Highest uncertainty at which the teacher's answer stands; null: fitted so that `review` is kept to."""
    review: float = 0.1
    """The teacher's threshold leaves this share of its answers to all posts, the least certain ones, to be reviewed
    where the student's polarity is another; among deferred posts, which are harder, the share is larger."""
    measure: Measure = "entropy"
    """Uncertainty: entropy (of the paper, over ln K), max_probability or margin, each from 0 to 1."""
    min_label_mass: float = 0.5
    """An answer whose labels hold less of the probability than this counts as entirely uncertain."""

    def __post_init__(self) -> None:
        for name, valid, takes in (
            ("budget", 0 <= self.budget <= 2, "0 to 2"),
            ("risk", 0 < self.risk < 1, "above 0, below 1"),
            ("confidence", 0 < self.confidence < 1, "above 0, below 1"),
            ("review", 0 <= self.review <= 1, "0 to 1"),
            ("min_label_mass", 0 <= self.min_label_mass <= 1, "0 to 1"),
        ):
            if not valid:
                raise SettingsError(f"calibrate.{name} is {getattr(self, name)}; it takes {takes}")
        for name in ("student_threshold", "teacher_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise SettingsError(f"calibrate.{name} is {value}; it takes 0 to 1")
        if (self.by == "fixed") != (self.student_threshold is not None):
            raise SettingsError("calibrate.student_threshold goes with calibrate.by: fixed, and only with it")


def calibrate(
    gold: Sequence[str | float],
    student: ClassScores,
    teacher: ClassScores,
    names: tuple[str, str],
    labels: LabelSpace,
    settings: CalibrateSettings,
) -> dict[str, Any]:
    """The content of `calibration.json`, from both models' answers to the n posts of the validation split.

    Args:
        gold: n label names, or values on a scale. Posts that a model did not answer are left out, and counted.
        names: of the student and of the teacher.

    Raises:
        SettingsError: n posts cannot support the risk target; the message names the smallest that they can.
        RunError: no post was answered by both.
    """
    known = student.answered & teacher.answered
    if not known.any():
        raise RunError("calibrate: no validation post was answered by both student and teacher")
    gold = [label for label, kept in zip(gold, known, strict=True) if kept]
    student, teacher = student.only(known), teacher.only(known)
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
    policy = CascadePolicy(labels, calibration)
    firsts, seconds = policy.student(student), policy.teacher(teacher)
    doubts = [np.array([prediction.uncertainty for prediction in predictions]) for predictions in (firsts, seconds)]

    least = settings.teacher_threshold
    if least is None:
        least = by_budget(doubts[1], np.ones(len(truth)), settings.review).tau
    calibration = replace(calibration, teacher_threshold=least)
    policy = replace(policy, calibration=calibration)
    calls = np.array([1 + (policy.second(*pair) is None) for pair in zip(firsts, seconds, strict=True)])
    errors = [wrong(predictions, gold, labels) for predictions in (firsts, seconds)]

    promise: dict[str, Any] = {"by": settings.by}
    if settings.student_threshold is not None:
        calibration = replace(calibration, student_threshold=settings.student_threshold)
    else:
        try:
            if settings.by == "budget":
                found = by_budget(doubts[0], calls, settings.budget)
                if found.calls is not None and found.calls > settings.budget + 1e-9:
                    said = (
                        "calibrate.budget: on so many posts the student is entirely uncertain that they take %.3f calls"
                    )
                    log.warning(said + " a post, not %g", found.calls, settings.budget)
            else:
                found = by_risk(doubts[0], errors[0], settings.risk, settings.confidence)
        except ValueError as error:
            raise SettingsError(f"calibrate.{settings.by}: {error}") from None
        calibration = replace(calibration, student_threshold=found.tau)
        promise |= {name: value for name, value in asdict(found).items() if value is not None}
    promise["says"] = _says(promise, len(truth))
    deferred = (doubts[0] > calibration.student_threshold) | (doubts[0] >= 1)
    return asdict(calibration) | {
        "n": len(truth),
        "unanswered": int((~known).sum()),
        "promise": promise,
        "assumes": "posts to come are like those of the validation split, on which temperatures and best epochs were "
        "chosen as well",
        "validation": {
            "deferred": float(deferred.mean()),
            "teacher_calls_per_sample": float((deferred * calls).mean()),
            "student_risk": float(errors[0][~deferred].mean()) if not deferred.all() else None,
        },
        "models": {
            role: {
                "ece_before": calibration_error(scores.probabilities, truth),
                "ece_after": calibration_error(stacked(predictions), truth),
                "error_probability": dict(zip(("uncertainty", "error"), fit_error_map(doubt, error), strict=True)),
            }
            for role, scores, predictions, doubt, error in zip(
                ("student", "teacher"), (student, teacher), (firsts, seconds), doubts, errors, strict=True
            )
        },
    }


def stacked(predictions: Sequence[Prediction]) -> np.ndarray:
    """The tempered probabilities [B, K] of B predictions."""
    return np.stack([prediction.probabilities for prediction in predictions])


def wrong(predictions: Sequence[Prediction], gold: Sequence[str | float], labels: LabelSpace) -> np.ndarray:
    """[B] whether each answer is wrong; on a scale, whether its polarity is."""
    if labels.scale is None:
        return np.array(
            [prediction.label != label for prediction, label in zip(predictions, gold, strict=True)], dtype=bool
        )
    truth = labels.scale.polarity(np.array(gold, dtype=np.float64))
    return np.array([prediction.polarity for prediction in predictions]) != truth


def _says(promise: Mapping[str, Any], n: int) -> str:
    """The promise as a sentence."""
    if promise["by"] == "budget":
        return (
            f"From {n} validation posts: {promise['calls']:.3f} teacher calls a post expected, "
            f"95% interval {promise['calls_low']:.3f} to {promise['calls_high']:.3f}."
        )
    if promise["by"] == "risk":
        return (
            f"From {n} validation posts: of what the student answers alone at most {promise['risk']:.1%} is wrong, "
            f"at a confidence of {promise['confidence']:.0%}."
        )
    return "The thresholds were given; they promise nothing."
