"""Metrics of selective prediction and of deferral to a teacher: risk-coverage, reliability and deferral curves."""

from collections.abc import Callable
from typing import Any

import numpy as np


def risk_coverage(errors: np.ndarray, confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Risk-coverage curve of B samples, most confident first (Geifman & El-Yaniv, arXiv 1705.08500).

    Samples of equal confidence count with the mean error of their tie. This is the expected curve over all orders of
    the tie, so that the result does not depend on the order of the input.

    Args:
        errors: [B], loss of each sample, 0 or 1 for classification.
        confidence: [B], higher is more confident, on any scale.

    Returns:
        coverage [B], k / B for k = 1..B, and risk [B], the mean error of the k most confident samples.

    Raises:
        ValueError: no samples, different shapes, or a value that is not finite.
    """
    errors, confidence = _columns(errors=errors, confidence=confidence)
    _, tie, size = np.unique(-confidence, return_inverse=True, return_counts=True)
    mean = np.bincount(tie, weights=errors) / size
    taken = np.arange(1, len(errors) + 1)
    return taken / len(errors), np.cumsum(np.repeat(mean, size)) / taken


def aurc(errors: np.ndarray, confidence: np.ndarray) -> float:
    """Area under the risk-coverage curve: the mean risk over the B coverages (Geifman et al., arXiv 1805.08206).

    Arguments and exceptions as for `risk_coverage`. 0 is perfect; an uninformative confidence gives the error rate.
    """
    return float(risk_coverage(errors, confidence)[1].mean())


def augrc(errors: np.ndarray, confidence: np.ndarray) -> float:
    """Area under the generalised risk-coverage curve (Traub et al., arXiv 2407.01032): the mean, over all coverages, of
    the probability that a sample is both answered and wrong.

    Arguments and exceptions as for `risk_coverage`; the curve is interpolated linearly. 0 is perfect; an uninformative
    confidence gives half the error rate. For errors of 0 and 1 it is (1 - AUROC) acc (1 - acc) + (1 - acc)^2 / 2.
    """
    coverage, risk = risk_coverage(errors, confidence)
    return float(np.trapezoid(np.append(0.0, risk * coverage), dx=1 / len(risk)))


def reliability(probabilities: np.ndarray, gold: np.ndarray, bins: int = 15) -> dict[str, list[Any]]:
    """Reliability diagram of B predictions over equal bins of the highest probability (Guo et al., arXiv 1706.04599).

    Args:
        probabilities: [B, K], rows sum to 1.
        gold: [B], indices of the gold labels.
        bins: number of bins.

    Returns:
        For each bin, from low to high: `confidence` and `accuracy`, the means of its predictions, None for empty bins,
        and `count`. The ECE is the sum over bins of count / B times |accuracy - confidence|.

    Raises:
        ValueError: no samples, different shapes, or a value that is not finite.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if probabilities.ndim != 2 or not probabilities.size:
        raise ValueError(f"probabilities {probabilities.shape} must have one row for each sample")
    highest, truth = _columns(confidence=probabilities.max(axis=1), gold=gold)
    bin_index = np.searchsorted(np.linspace(0, 1, bins + 1), highest, side="right").clip(1, bins) - 1
    count = np.bincount(bin_index, minlength=bins)
    sums = [
        np.bincount(bin_index, weights=values, minlength=bins) for values in (highest, probabilities.argmax(1) == truth)
    ]
    confidence, accuracy = (
        [s / n if n else None for s, n in zip(total.tolist(), count, strict=True)] for total in sums
    )
    return {"confidence": confidence, "accuracy": accuracy, "count": count.tolist()}


def deferral_curve(
    score: np.ndarray, student: np.ndarray, teacher: np.ndarray, *, fractions: np.ndarray | None = None
) -> np.ndarray:
    """Mean quality or cost of n samples as a function of the fraction deferred to the teacher, highest scores first.

    Samples of equal score count with the mean of their tie, the expectation over all orders. A constant score therefore
    gives random deferral, a straight line. The function applies to quality (correctness, or minus the absolute error)
    and to cost (of the student; of student plus teacher if deferred).

    Args:
        score: [n], samples of higher score are deferred first; any scale.
        student: [n], value of each sample if the student answers it.
        teacher: [n], value of each sample if it is deferred.
        fractions: [F], deferred fractions at which to evaluate the curve, in [0, 1]; None: 0, 1/n, ..., 1.

    Returns:
        The curve, [F] or [n + 1].

    Raises:
        ValueError: no samples, different shapes, or a value that is not finite.
    """
    score, student, teacher = _columns(score=score, student=student, teacher=teacher)
    _, tie, size = np.unique(-score, return_inverse=True, return_counts=True)
    # within a tie the expected curve is linear, so its end points define it
    deferred = np.append(0, np.cumsum(size)) / len(score)
    gain = np.append(0.0, np.cumsum(np.bincount(tie, weights=teacher - student))) / len(score)
    if fractions is None:
        fractions = np.linspace(0, 1, len(score) + 1)
    return student.mean() + np.interp(fractions, deferred, gain)


def oracle_scores(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Scores [n] of optimal deferral: the gain in quality of each sample if the teacher answers it."""
    return np.asarray(teacher, dtype=np.float64) - np.asarray(student, dtype=np.float64)


def gain_over_random(curve: np.ndarray) -> float:
    """Area between a deferral curve [F], at evenly spaced fractions from 0 to 1, and random deferral."""
    line = np.linspace(curve[0], curve[-1], len(curve))
    return float(np.trapezoid(curve - line, dx=1 / (len(curve) - 1)))


def bootstrap_interval(
    statistic: Callable[..., Any], *columns: np.ndarray, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of a statistic of n samples (Efron & Tibshirani, 1993, section 13.3).

    Args:
        statistic: called with the columns resampled with replacement; returns a number or an array.
        columns: arrays [n, ...] with aligned rows, which are resampled together.
        resamples: number of bootstrap samples.
        level: coverage of the interval.

    Returns:
        Lower and upper end of the interval, each with the shape of the statistic.

    Raises:
        ValueError: no samples, or columns of different lengths.
    """
    lengths = {len(column) for column in columns}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError("the columns of a bootstrap must have the same number of samples, one or more")
    random, n = np.random.default_rng(seed), lengths.pop()
    draws = (random.integers(n, size=n) for _ in range(resamples))
    values = np.stack([statistic(*(column[rows] for column in columns)) for rows in draws])
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def _columns(**named: np.ndarray) -> list[np.ndarray]:
    """Columns [n] as float64. Raises ValueError if they are empty, not finite, or differ in shape."""
    columns = [np.asarray(column, dtype=np.float64) for column in named.values()]
    shapes = " and ".join(f"{name} {column.shape}" for name, column in zip(named, columns, strict=True))
    if any(column.ndim != 1 or column.shape != columns[0].shape or not len(column) for column in columns):
        raise ValueError(f"{shapes} must have one value for each sample")
    if not all(np.isfinite(column).all() for column in columns):
        raise ValueError(f"{' and '.join(named)} must be finite")
    return columns
