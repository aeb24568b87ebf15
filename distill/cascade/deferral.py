"""What the cascade came to on the test split: `metrics.json`, and the deferral curve with its baselines."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, get_args

import numpy as np

from distill.cascade.calibration import stacked, wrong
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
"""Shares of deferred posts at which the curves are written."""

STAGES = ("student", "teacher_first", "teacher_review")


def cascade_metrics(
    decisions: Sequence[Decision],
    gold: Gold,
    labels: LabelSpace,
    teacher: Sequence[Prediction] | None,
    price: Price,
) -> dict[str, Any]:
    """`cascade/metrics.json` (DESIGN section 3) from B decisions.

    Args:
        teacher: the teacher's first prediction on each of the B samples, if it was asked about all of them. Otherwise
            `teacher_accuracy` is left out and the teacher's cost is estimated from the predictions there are. The
            accuracy counts the samples that the teacher answered.
        price: what a cost comes to in currency; None without prices.
    """
    probabilities = np.stack([decision.probabilities for decision in decisions])
    alone = [decision.student for decision in decisions]
    firsts = teacher or [decision.teacher for decision in decisions if decision.teacher is not None]
    metrics: dict[str, Any] = judged(probabilities, gold, labels)
    metrics |= {
        "stage_fractions": {stage: float(np.mean([d.stage == stage for d in decisions])) for stage in STAGES},
        "teacher_calls_per_sample": float(np.mean([decision.teacher_calls for decision in decisions])),
        "cost_ratio": _cost_ratio(decisions, firsts, price),
        "student_accuracy": judged(stacked(alone), gold, labels)["accuracy"],
        "degraded": sum(decision.degraded for decision in decisions),
        "review_flips": _flips(decisions, gold, labels),
        "stages": {stage: _stage(stage, decisions, gold, labels, price) for stage in STAGES},
    }
    if teacher is not None:
        said = [(prediction, label) for prediction, label in zip(teacher, gold, strict=True) if prediction.answered]
        metrics["teacher_unanswered"] = len(teacher) - len(said)
        if said:
            figures = judged(stacked([prediction for prediction, _ in said]), [label for _, label in said], labels)
            metrics |= {f"teacher_{name}": figures[name] for name in ("accuracy", "mae") if name in figures}
    if labels.scale is not None:
        metrics["student_mae"] = judged(stacked(alone), gold, labels)["mae"]
    return metrics


def judged(probabilities: np.ndarray, gold: Gold, labels: LabelSpace) -> dict[str, Any]:
    """The figures of answers [B, K], on a scale those of the recovered values too."""
    metrics = classification_metrics([labels.name(label) for label in gold], probabilities, labels)
    if labels.scale is not None:
        values = np.array(gold, dtype=np.float64)
        metrics |= regression_metrics(values, labels.scale.expectation(probabilities), labels.scale)
    return metrics


def selective_metrics(
    before: Sequence[Prediction], after: Sequence[Prediction], gold: Gold, labels: LabelSpace
) -> dict[str, dict[str, Any]]:
    """One model before and after calibration: ECE, AURC and AUGRC, its reliability and its risk-coverage curve.

    AURC and AUGRC rank by the uncertainty that routes.
    """
    truth = np.array([labels.index(label) for label in gold])
    found = {}
    for when, predictions in (("before", before), ("after", after)):
        probabilities, errors = stacked(predictions), wrong(predictions, gold, labels).astype(float)
        doubt = np.array([prediction.uncertainty for prediction in predictions])
        coverage, risk = risk_coverage(errors, -doubt)
        found[when] = {
            "ece": judged(probabilities, gold, labels)["ece"],
            "aurc": aurc(errors, -doubt),
            "augrc": augrc(errors, -doubt),
            "reliability": reliability(probabilities, truth),
            "risk_coverage": {"coverage": coverage.tolist(), "risk": risk.tolist()},
        }
    return found


def deferral_rows(
    student: Sequence[Prediction],
    teacher: Sequence[Prediction],
    gold: Gold,
    labels: LabelSpace,
    price: Price,
    resamples: int,
) -> list[dict[str, Any]]:
    """`deferral_curve.csv`: what each policy makes of deferring a share of the posts to the teacher's first answer.

    A row gives the policy, the share of posts deferred, mean quality with its bootstrap 95% interval, and mean seconds
    and currency a post. Quality is accuracy, or on a scale minus the absolute error. Policies are random deferral, the
    three measures of uncertainty, and the oracle; the student and the teacher alone are the ends of each curve.
    """
    quality = [_quality(predictions, gold, labels) for predictions in (student, teacher)]
    answered = np.array([prediction.answered for prediction in teacher])
    quality[1] = np.where(answered, quality[1], quality[0])  # a silent teacher leaves the student's answer
    seconds = [np.array([prediction.cost.seconds for prediction in predictions]) for predictions in (student, teacher)]
    currency = [price(prediction.cost) for prediction in teacher]
    scores: dict[str, np.ndarray] = {name: uncertainty(stacked(student), name) for name in get_args(Measure)}
    # as the stages see them: what is off the format or unanswered is deferred first
    for name, score in scores.items():
        scores[name] = np.where([prediction.uncertainty == 1 for prediction in student], 1.0, score)
    scores |= {"random": np.zeros(len(gold)), "oracle": oracle_scores(*quality)}
    rows = []
    for policy, score in scores.items():

        def curve(*columns: np.ndarray) -> np.ndarray:
            return deferral_curve(*columns, fractions=FRACTIONS)

        low, high = bootstrap_interval(curve, score, *quality, resamples=resamples)
        spent = curve(score, seconds[0], seconds[0] + seconds[1])
        paid = None
        if None not in currency:
            paid = curve(score, np.zeros(len(gold)), np.array(currency, dtype=np.float64))
        for index, values in enumerate(zip(FRACTIONS, curve(score, *quality), low, high, spent, strict=True)):
            row = dict(zip(("deferred", "quality", "low", "high", "seconds"), map(float, values), strict=True))
            rows.append({"policy": policy, **row, "currency": None if paid is None else float(paid[index])})
    return rows


def _quality(predictions: Sequence[Prediction], gold: Gold, labels: LabelSpace) -> np.ndarray:
    """[B] how good each answer is: 1 or 0, or on a scale minus the absolute error."""
    if labels.scale is None:
        return 1.0 - wrong(predictions, gold, labels)
    return -np.abs(labels.scale.expectation(stacked(predictions)) - np.array(gold, dtype=np.float64))


def _flips(decisions: Sequence[Decision], gold: Gold, labels: LabelSpace) -> dict[str, int]:
    """What the review made of the teacher's first answers."""
    reviewed = [
        (d.teacher, d.review, label)
        for d, label in zip(decisions, gold, strict=True)
        if d.teacher is not None and d.review is not None and d.review.answered
    ]
    asked = [label for _, _, label in reviewed]
    before = wrong([teacher for teacher, _, _ in reviewed], asked, labels)
    after = wrong([review for _, review, _ in reviewed], asked, labels)
    return {
        "reviewed": len(reviewed),
        "wrong_to_right": int((before & ~after).sum()),
        "right_to_wrong": int((~before & after).sum()),
        "still_right": int((~before & ~after).sum()),
        "still_wrong": int((before & after).sum()),
    }


def _stage(stage: str, decisions: Sequence[Decision], gold: Gold, labels: LabelSpace, price: Price) -> dict[str, Any]:
    """One stage: the posts that it answered and how well, how many it was asked about, and what that took."""
    answered = [(decision, label) for decision, label in zip(decisions, gold, strict=True) if decision.stage == stage]
    asked: dict[str, list[Prediction | None]] = {
        "student": [decision.student for decision in decisions],
        "teacher_first": [decision.teacher for decision in decisions],
        "teacher_review": [decision.review for decision in decisions],
    }
    costs = [prediction.cost for prediction in asked[stage] if prediction is not None]
    cost = sum(costs, Cost())
    currency = None if stage == "student" else price(cost)
    found: dict[str, Any] = {"n": len(answered), "asked": len(costs), "cost": asdict(cost) | {"currency": currency}}
    if answered:
        figures = judged(np.stack([d.probabilities for d, _ in answered]), [label for _, label in answered], labels)
        found |= {name: figures[name] for name in ("accuracy", "mae", "correlation") if name in figures}
    return found


def _cost_ratio(decisions: Sequence[Decision], firsts: Sequence[Prediction], price: Price) -> dict[str, float | None]:
    """What the cascade took against the teacher alone on all posts: in seconds, and in currency where it has prices."""
    taught = [prediction for d in decisions for prediction in (d.teacher, d.review) if prediction is not None]
    teacher = sum((prediction.cost for prediction in taught), Cost())
    seconds = sum(decision.student.cost.seconds for decision in decisions) + teacher.seconds
    alone = sum((prediction.cost for prediction in firsts), Cost())
    share = len(firsts) / len(decisions)  # of the posts that the teacher was asked about
    currency, full = price(teacher), price(alone)
    return {
        "seconds": seconds * share / alone.seconds if alone.seconds else None,
        "currency": None if currency is None or not full else currency * share / full,
    }
