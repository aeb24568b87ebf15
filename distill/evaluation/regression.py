"""Regression metrics of a role, from gold and predicted values on a scale.

Acc-2 and its F1 are published in three conventions for multimodal sentiment: with zero (non-negative against negative,
all rows), without zero (positive against negative, rows with a gold value of 0 left out), and for CH-SIMS positive
against not positive. The accuracies of more classes are those of MMSA (https://github.com/thuiar/MMSA).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import f1_score

from distill.task.labels import Scale

Values = Sequence[float] | np.ndarray


def regression_metrics(gold: Values, predicted: Values, scale: Scale) -> dict[str, Any]:
    """Regression metrics of one role on B values.

    Returns:
        `mae`; `correlation` (Pearson), None if either side is constant. On scales with both signs also
        `acc2_with_zero`, `f1_with_zero`, `acc2_without_zero`, `f1_without_zero`: by the sign of the value, regardless
        of the scale's dead zone; F1 weighted by the gold classes; None if no row is left. On [-3, 3] also `acc7` and
        `acc5`: agreement of the values clipped to [-3, 3] and [-2, 2] and rounded, halves to even (as in numpy).

    Raises:
        ValueError: no values, different lengths, or a value that is not finite.
    """
    truth, answer = np.asarray(gold, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if truth.ndim != 1 or truth.shape != answer.shape or not len(truth):
        raise ValueError(f"gold {truth.shape} and predicted values {answer.shape} must have one value for each sample")
    if not (np.isfinite(truth).all() and np.isfinite(answer).all()):
        raise ValueError("gold and predicted values must be finite")
    metrics = {"mae": float(np.abs(truth - answer).mean()), "correlation": _correlation(truth, answer)}
    if (scale.low, scale.high) == (-3, 3):
        metrics |= {f"acc{2 * end + 1}": _rounded_accuracy(truth, answer, end) for end in (3, 2, 1)}
    if (scale.low, scale.high) == (-1, 1):
        ends = {"acc5": (-0.7, -0.1, 0.1, 0.7), "acc3": (-0.1, 0.1)}
        metrics |= {name: _interval_accuracy(truth, answer, inner) for name, inner in ends.items()}
        metrics |= _polarity_metrics(truth > 0, answer > 0, "positive")
    if scale.low < 0 < scale.high:
        kept = truth != 0
        metrics |= _polarity_metrics(truth >= 0, answer >= 0, "with_zero")
        metrics |= _polarity_metrics(truth[kept] > 0, answer[kept] > 0, "without_zero")
    return metrics


def trivial_baseline(train_gold: Values, test_gold: Values, scale: Scale) -> dict[str, Any]:
    """Test metrics of a baseline that always predicts the mean training value.

    Returns:
        `value`, the mean training value, and its metrics as in `regression_metrics`. Acc-2 and its F1 are those of
        always predicting the most frequent training polarity, in each convention (positive on ties).

    Raises:
        ValueError: an empty split or a value that is not finite.
    """
    train, truth = np.asarray(train_gold, dtype=np.float64), np.asarray(test_gold, dtype=np.float64)
    if not len(train):
        raise ValueError("there are no training values")
    mean = float(train.mean())
    metrics = {"value": mean, **regression_metrics(truth, np.full_like(truth, mean), scale)}
    if scale.low < 0 < scale.high:
        kept = truth != 0
        majority = 2 * (train >= 0).sum() >= len(train), (train > 0).sum() >= (train < 0).sum()
        metrics |= _polarity_metrics(truth >= 0, np.full(len(truth), majority[0]), "with_zero")
        metrics |= _polarity_metrics(truth[kept] > 0, np.full(kept.sum(), majority[1]), "without_zero")
    if "acc2_positive" in metrics:
        metrics |= _polarity_metrics(truth > 0, np.full(len(truth), 2 * (train > 0).sum() >= len(train)), "positive")
    return metrics


def _correlation(truth: np.ndarray, answer: np.ndarray) -> float | None:
    if np.ptp(truth) == 0 or np.ptp(answer) == 0:
        return None
    with np.errstate(all="ignore"):  # the variance can underflow to 0
        correlation = float(np.corrcoef(truth, answer)[0, 1])
    return correlation if np.isfinite(correlation) else None


def _rounded_accuracy(truth: np.ndarray, answer: np.ndarray, end: int) -> float:
    return float((np.round(truth.clip(-end, end)) == np.round(answer.clip(-end, end))).mean())


def _interval_accuracy(truth: np.ndarray, answer: np.ndarray, ends: Sequence[float]) -> float:
    return float((np.digitize(truth, ends, right=True) == np.digitize(answer, ends, right=True)).mean())


def _polarity_metrics(truth: np.ndarray, answer: np.ndarray, convention: str) -> dict[str, float | None]:
    if not len(truth):
        return {f"acc2_{convention}": None, f"f1_{convention}": None}
    return {
        f"acc2_{convention}": float((truth == answer).mean()),
        f"f1_{convention}": float(f1_score(truth, answer, average="weighted", zero_division=0.0)),
    }
