"""How well values on a scale are predicted: pure functions from gold and predicted values to the figures of a role.

Acc-2 and its F1 are published in two conventions for multimodal sentiment: with zero (non-negative against negative,
all rows) and without zero (positive against negative, rows whose gold value is 0 left out).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import f1_score

from distill.task.labels import Scale

Values = Sequence[float] | np.ndarray


def regression_metrics(gold: Values, predicted: Values, scale: Scale) -> dict[str, Any]:
    """The figures of one role on B values.

    Returns:
        `mae`; `correlation`, Pearson's, None where either side is constant. Where the scale has both signs also
        `acc2_with_zero`, `f1_with_zero`, `acc2_without_zero`, `f1_without_zero` (F1 weighted by the gold classes; by
        the sign of the value, whatever the scale's dead zone; None where no row is left), and on [-3, 3] also `acc7`
        and `acc5`: agreement of the values clipped to [-3, 3] and [-2, 2] and rounded, halves to even (as numpy does).

    Raises:
        ValueError: no values, lengths that differ, or a value that is not finite.
    """
    truth, answer = np.asarray(gold, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if truth.ndim != 1 or truth.shape != answer.shape or not len(truth):
        raise ValueError(f"gold {truth.shape} and predicted {answer.shape} values need one for each sample")
    if not (np.isfinite(truth).all() and np.isfinite(answer).all()):
        raise ValueError("gold and predicted values must be finite")
    metrics = {"mae": float(np.abs(truth - answer).mean()), "correlation": _correlation(truth, answer)}
    if (scale.low, scale.high) == (-3, 3):
        metrics |= {f"acc{2 * end + 1}": _rounded_accuracy(truth, answer, end) for end in (3, 2)}
    if scale.low < 0 < scale.high:
        kept = truth != 0
        metrics |= _polarity_metrics(truth >= 0, answer >= 0, "with_zero")
        metrics |= _polarity_metrics(truth[kept] > 0, answer[kept] > 0, "without_zero")
    return metrics


def trivial_baseline(train_gold: Values, test_gold: Values, scale: Scale) -> dict[str, Any]:
    """What answering without a look at the post gets on the test split.

    Returns:
        `value`, the mean of the training values, and the figures of answering it everywhere as in
        `regression_metrics`; but Acc-2 and its F1 are those of the polarity most frequent in training, in each
        convention (of equally frequent ones the positive).

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
    return metrics


def _correlation(truth: np.ndarray, answer: np.ndarray) -> float | None:
    if np.ptp(truth) == 0 or np.ptp(answer) == 0:
        return None
    with np.errstate(all="ignore"):  # values that differ by less than their squares can hold
        found = float(np.corrcoef(truth, answer)[0, 1])
    return found if np.isfinite(found) else None


def _rounded_accuracy(truth: np.ndarray, answer: np.ndarray, end: int) -> float:
    return float((np.round(truth.clip(-end, end)) == np.round(answer.clip(-end, end))).mean())


def _polarity_metrics(truth: np.ndarray, answer: np.ndarray, convention: str) -> dict[str, float | None]:
    if not len(truth):
        return {f"acc2_{convention}": None, f"f1_{convention}": None}
    return {
        f"acc2_{convention}": float((truth == answer).mean()),
        f"f1_{convention}": float(f1_score(truth, answer, average="weighted", zero_division=0.0)),
    }
