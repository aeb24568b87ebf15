"""Metrics of the cascade on the test split: `metrics.json`, and the deferral curve with its baselines."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, get_args

import numpy as np

from distill.cascade.calibration import errors, stack_probabilities
from distill.cascade.cascade import Decision, Prediction
from distill.cascade.uncertainty import Measure, uncertainty
from distill.evaluation.classification import classification_metrics
from distill.evaluation.regression import regression_metrics
from distill.evaluation.selective import (
    augrc,
    aurc,
    bootstrap_interval,
    deferral_curve,
    oracle_scores,
    reliability,
    risk_coverage,
)
from distill.models.reasoner import Cost
from distill.task.labels import LabelSpace

Price = Callable[[Cost], float | None]
Gold = Sequence[str | float]

FRACTIONS = np.linspace(0, 1, 101)
"""Fractions of deferred posts at which the curves are evaluated."""

STAGES = ("student", "teacher_first", "teacher_review")


def cascade_metrics(
    decisions: Sequence[Decision],
    gold: Gold,
    labels: LabelSpace,
    teacher: Sequence[Prediction] | None,
    price: Price,
) -> dict[str, Any]:
    """Compute `cascade/metrics.json` from B decisions.

    Args:
        teacher: the teacher's first predictions on the B samples, if it classified all of them. If None,
            `teacher_accuracy` is left out and the teacher's cost is estimated from the predictions on deferred samples.
            `teacher_accuracy` covers the samples that the teacher answered.
        price: maps a cost to currency; returns None without prices.
    """
    probabilities = np.stack([decision.probabilities for decision in decisions])
    students = [decision.student for decision in decisions]
    teacher_firsts = teacher or [decision.teacher for decision in decisions if decision.teacher is not None]
    metrics: dict[str, Any] = prediction_metrics(probabilities, gold, labels)
    student_metrics = prediction_metrics(stack_probabilities(students), gold, labels)
    metrics |= {
        "stage_fractions": {stage: float(np.mean([d.stage == stage for d in decisions])) for stage in STAGES},
        "teacher_calls_per_sample": float(np.mean([decision.teacher_calls for decision in decisions])),
        "cost_ratio": _cost_ratio(decisions, teacher_firsts, price),
        "student_accuracy": student_metrics["accuracy"],
        "degraded": sum(decision.degraded for decision in decisions),
        "review_flips": _review_flips(decisions, gold, labels),
        "stages": {stage: _stage_metrics(stage, decisions, gold, labels, price) for stage in STAGES},
    }
    if teacher is not None:
        answered = [(prediction, label) for prediction, label in zip(teacher, gold, strict=True) if prediction.answered]
        metrics["teacher_unanswered"] = len(teacher) - len(answered)
        if answered:
            rows = stack_probabilities([prediction for prediction, _ in answered])
            teacher_metrics = prediction_metrics(rows, [label for _, label in answered], labels)
            metrics |= {
                f"teacher_{name}": teacher_metrics[name] for name in ("accuracy", "mae") if name in teacher_metrics
            }
    if labels.scale is not None:
        metrics["student_mae"] = student_metrics["mae"]
    return metrics


def prediction_metrics(probabilities: np.ndarray, gold: Gold, labels: LabelSpace) -> dict[str, Any]:
    """Classification metrics of probabilities [B, K]; on a scale also the regression metrics of the expected values."""
    metrics = classification_metrics([labels.name(label) for label in gold], probabilities, labels)
    if labels.scale is not None:
        values = np.array(gold, dtype=np.float64)
        metrics |= regression_metrics(values, labels.scale.expectation(probabilities), labels.scale)
    return metrics


def selective_metrics(
    before: Sequence[Prediction], after: Sequence[Prediction], gold: Gold, labels: LabelSpace
) -> dict[str, dict[str, Any]]:
    """ECE, AURC, AUGRC, reliability and risk-coverage curve of one model before and after calibration.

    AURC and AUGRC rank by the uncertainty that the cascade defers by. Posts without an answer are left out.
    """
    answered = [index for index, prediction in enumerate(after) if prediction.answered]
    before, after = [before[index] for index in answered], [after[index] for index in answered]
    gold = [gold[index] for index in answered]
    truth = np.array([labels.index(label) for label in gold])
    metrics = {}
    for when, predictions in (("before", before), ("after", after)):
        probabilities = stack_probabilities(predictions)
        wrong = errors(predictions, gold, labels).astype(float)
        confidence = -np.array([prediction.uncertainty for prediction in predictions])
        coverage, risk = risk_coverage(wrong, confidence)
        metrics[when] = {
            "ece": prediction_metrics(probabilities, gold, labels)["ece"],
            "aurc": aurc(wrong, confidence),
            "augrc": augrc(wrong, confidence),
            "reliability": reliability(probabilities, truth),
            "risk_coverage": {"coverage": coverage.tolist(), "risk": risk.tolist()},
        }
    return metrics


def deferral_rows(
    student: Sequence[Prediction],
    teacher: Sequence[Prediction],
    gold: Gold,
    labels: LabelSpace,
    price: Price,
    resamples: int,
    error: np.ndarray,
) -> list[dict[str, Any]]:
    """Compute `deferral_curve.csv`: quality and cost of deferring a fraction of posts to the teacher's first answer.

    `error` [B] are the student's estimated error probabilities.


    A row has the policy, the fraction of deferred posts, the mean quality with its bootstrap 95% interval, and the mean
    seconds and currency per post, None if unknown. Quality is the accuracy, or on a scale the negative absolute error.
    The policies are random deferral, the three uncertainty measures, the error probability, and the oracle. At fraction
    0 the student answers alone, at 1 the teacher.
    """
    quality = [_quality(predictions, gold, labels) for predictions in (student, teacher)]
    answered = np.array([prediction.answered for prediction in teacher])
    quality[1] = np.where(answered, quality[1], quality[0])  # without a teacher's answer the student's is final
    seconds = [np.array([prediction.cost.seconds for prediction in predictions]) for predictions in (student, teacher)]
    currency = [price(prediction.cost) for prediction in teacher]
    scores: dict[str, np.ndarray] = {
        name: uncertainty(stack_probabilities(student), name) for name in get_args(Measure)
    } | {"error": error}
    # as in the cascade, answers off the format and missing answers are deferred first
    for name, score in scores.items():
        scores[name] = np.where([prediction.uncertainty == 1 for prediction in student], 1.0, score)
    scores |= {"random": np.zeros(len(gold)), "oracle": oracle_scores(*quality)}
    rows = []
    for policy, score in scores.items():

        def curve(*columns: np.ndarray) -> np.ndarray:
            return deferral_curve(*columns, fractions=FRACTIONS)

        low, high = bootstrap_interval(curve, score, *quality, resamples=resamples)
        mean_seconds = mean_currency = None
        if np.isfinite(seconds[1]).all():  # those of an answer from a batch are unknown
            mean_seconds = curve(score, seconds[0], seconds[0] + seconds[1])
        if None not in currency:
            mean_currency = curve(score, np.zeros(len(gold)), np.array(currency, dtype=np.float64))
        columns = zip(FRACTIONS, curve(score, *quality), low, high, strict=True)
        for index, values in enumerate(columns):
            row = dict(zip(("deferred", "quality", "low", "high"), map(float, values), strict=True))
            means = {"seconds": mean_seconds, "currency": mean_currency}
            costs = {name: None if mean is None else float(mean[index]) for name, mean in means.items()}
            rows.append({"policy": policy, **row, **costs})
    return rows


def _quality(predictions: Sequence[Prediction], gold: Gold, labels: LabelSpace) -> np.ndarray:
    """[B] quality of each answer: 1 or 0, or on a scale the negative absolute error."""
    if labels.scale is None:
        return 1.0 - errors(predictions, gold, labels)
    return -np.abs(labels.scale.expectation(stack_probabilities(predictions)) - np.array(gold, dtype=np.float64))


def _review_flips(decisions: Sequence[Decision], gold: Gold, labels: LabelSpace) -> dict[str, int]:
    """Counts of reviews that corrected, broke or kept the teacher's first answer."""
    reviewed = [
        (d.teacher, d.review, label)
        for d, label in zip(decisions, gold, strict=True)
        if d.teacher is not None and d.review is not None and d.review.answered
    ]
    reviewed_gold = [label for _, _, label in reviewed]
    before = errors([teacher for teacher, _, _ in reviewed], reviewed_gold, labels)
    after = errors([review for _, review, _ in reviewed], reviewed_gold, labels)
    return {
        "reviewed": len(reviewed),
        "wrong_to_right": int((before & ~after).sum()),
        "right_to_wrong": int((~before & after).sum()),
        "still_right": int((~before & ~after).sum()),
        "still_wrong": int((before & after).sum()),
    }


def _stage_metrics(
    stage: str, decisions: Sequence[Decision], gold: Gold, labels: LabelSpace, price: Price
) -> dict[str, Any]:
    """Metrics of one stage: quality on the posts it decided, and the number and cost of its predictions."""
    decided = [(decision, label) for decision, label in zip(decisions, gold, strict=True) if decision.stage == stage]
    predictions: dict[str, list[Prediction | None]] = {
        "student": [decision.student for decision in decisions],
        "teacher_first": [decision.teacher for decision in decisions],
        "teacher_review": [decision.review for decision in decisions],
    }
    costs = [prediction.cost for prediction in predictions[stage] if prediction is not None]
    cost = sum(costs, Cost())
    currency = None if stage == "student" else price(cost)
    metrics: dict[str, Any] = {"n": len(decided), "asked": len(costs), "cost": asdict(cost) | {"currency": currency}}
    if decided:
        probabilities = np.stack([decision.probabilities for decision, _ in decided])
        quality = prediction_metrics(probabilities, [label for _, label in decided], labels)
        metrics |= {name: quality[name] for name in ("accuracy", "mae", "correlation") if name in quality}
    return metrics


def _cost_ratio(
    decisions: Sequence[Decision], teacher_firsts: Sequence[Prediction], price: Price
) -> dict[str, float | None]:
    """Cost of the cascade relative to the teacher alone on all posts: in seconds, and in currency if it is known."""
    predictions = [prediction for d in decisions for prediction in (d.teacher, d.review) if prediction is not None]
    teacher = sum((prediction.cost for prediction in predictions), Cost())
    seconds = sum(decision.student.cost.seconds for decision in decisions) + teacher.seconds
    alone = sum((prediction.cost for prediction in teacher_firsts), Cost())
    share = len(teacher_firsts) / len(decisions)  # `alone` covers only this share of the posts
    currency, full = price(teacher), price(alone)
    return {
        "seconds": seconds * share / alone.seconds if alone.seconds else None,
        "currency": None if currency is None or not full else currency * share / full,
    }
