"""How good a model is that answers only what it is surest of, alone and with a teacher who gets the rest."""

from collections.abc import Callable
from typing import Any

import numpy as np


def risk_coverage(errors: np.ndarray, confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The risk-coverage curve of B samples, the most confident first (Geifman & El-Yaniv, arXiv 1705.08500).

    Samples of equal confidence have no order of their own: each counts with the mean error of its tie, which is the
    expected curve over all orders, so the result does not depend on the order of the input.

    Args:
        errors: [B] the loss of each sample, 0 or 1 for classification.
        confidence: [B] higher is surer, on any scale.

    Returns:
        coverage [B], k / B for k = 1..B, and risk [B], the mean error of the k most confident samples.

    Raises:
        ValueError: no samples, shapes that differ, or a value that is not finite.
    """
    errors, confidence = _columns(errors=errors, confidence=confidence)
    _, tie, size = np.unique(-confidence, return_inverse=True, return_counts=True)
    mean = np.bincount(tie, weights=errors) / size
    taken = np.arange(1, len(errors) + 1)
    return taken / len(errors), np.cumsum(np.repeat(mean, size)) / taken


def aurc(errors: np.ndarray, confidence: np.ndarray) -> float:
    """Area under the risk-coverage curve: the mean risk over the B coverages (Geifman et al., arXiv 1805.08206).

    Args and errors as for `risk_coverage`. 0 is perfect; a useless confidence gives the error rate.
    """
    return float(risk_coverage(errors, confidence)[1].mean())


def augrc(errors: np.ndarray, confidence: np.ndarray) -> float:
    """Area under the generalised risk-coverage curve (Traub et al., arXiv 2407.01032): the mean, over all coverages, of
    the probability that a sample is both answered and wrong.

    Args and errors as for `risk_coverage`; the curve is joined linearly. 0 is perfect; a useless confidence gives half
    the error rate. For errors of 0 and 1 it is (1 - AUROC) acc (1 - acc) + (1 - acc)^2 / 2.
    """
    coverage, risk = risk_coverage(errors, confidence)
    return float(np.trapezoid(np.append(0.0, risk * coverage), dx=1 / len(risk)))


def reliability(probabilities: np.ndarray, gold: np.ndarray, bins: int = 15) -> dict[str, list[Any]]:
    """The reliability diagram of B answers, over equal bins of the highest probability (Guo et al., arXiv 1706.04599).

    Args:
        probabilities: [B, K], rows sum to 1.
        gold: [B] indices of the right labels.

    Returns:
        For each bin, from low to high: `confidence` and `accuracy`, the means of its answers, None where it is empty,
        and `count`. The ECE is the sum over bins of count / B times |accuracy - confidence|.

    Raises:
        ValueError: no samples, shapes that differ, or a value that is not finite.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if probabilities.ndim != 2 or not probabilities.size:
        raise ValueError(f"probabilities {probabilities.shape} need a row for each sample")
    highest, truth = _columns(confidence=probabilities.max(axis=1), gold=gold)
    place = np.searchsorted(np.linspace(0, 1, bins + 1), highest, side="right").clip(1, bins) - 1
    count = np.bincount(place, minlength=bins)
    sums = [
        np.bincount(place, weights=values, minlength=bins) for values in (highest, probabilities.argmax(1) == truth)
    ]
    confidence, accuracy = (
        [s / n if n else None for s, n in zip(total.tolist(), count, strict=True)] for total in sums
    )
    return {"confidence": confidence, "accuracy": accuracy, "count": count.tolist()}


def deferral_curve(
    score: np.ndarray, student: np.ndarray, teacher: np.ndarray, *, fractions: np.ndarray | None = None
) -> np.ndarray:
    """What n samples give on average when the teacher gets a fraction of them, the highest scores first.

    Samples of equal score count with the mean of their tie, the expectation over all orders; so a constant score is
    random deferral, a straight line. The same function serves quality (correctness, or minus the absolute error) and
    cost (the student's; the student's plus the teacher's, who is asked after it).

    Args:
        score: [n] higher is deferred sooner, on any scale.
        student: [n] what each sample gives where the student answers.
        teacher: [n] what it gives where it is deferred.
        fractions: [F] where to read the curve, in [0, 1]; None: at 0, 1/n, ..., 1.

    Returns:
        [F] or [n + 1].

    Raises:
        ValueError: no samples, shapes that differ, or a value that is not finite.
    """
    score, student, teacher = _columns(score=score, student=student, teacher=teacher)
    _, tie, size = np.unique(-score, return_inverse=True, return_counts=True)
    # within a tie the expected curve is straight, so its ends say it all
    deferred = np.append(0, np.cumsum(size)) / len(score)
    gained = np.append(0.0, np.cumsum(np.bincount(tie, weights=teacher - student))) / len(score)
    if fractions is None:
        fractions = np.linspace(0, 1, len(score) + 1)
    return student.mean() + np.interp(fractions, deferred, gained)


def oracle_scores(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Scores [n] of the best possible deferral: first where the teacher's quality is better by most, last where it is
    worse by most, and where both are equal in between."""
    return np.asarray(teacher, dtype=np.float64) - np.asarray(student, dtype=np.float64)


def gain_over_random(curve: np.ndarray) -> float:
    """Area between a deferral curve [F], read at even steps from 0 to 1, and random deferral between the same ends."""
    line = np.linspace(curve[0], curve[-1], len(curve))
    return float(np.trapezoid(curve - line, dx=1 / (len(curve) - 1)))


def bootstrap_interval(
    statistic: Callable[..., Any], *columns: np.ndarray, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of a statistic of n samples (Efron & Tibshirani, 1993, section 13.3).

    Args:
        statistic: called with the columns, their n rows drawn anew with replacement; gives a number or an array.
        columns: arrays [n, ...] that belong together row by row.

    Returns:
        The interval's two ends, each in the statistic's shape.

    Raises:
        ValueError: no samples, or columns of different length.
    """
    lengths = {len(column) for column in columns}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError("the columns of a bootstrap need equally many samples, one or more")
    random, n = np.random.default_rng(seed), lengths.pop()
    draws = (random.integers(n, size=n) for _ in range(resamples))
    values = np.stack([statistic(*(column[rows] for column in columns)) for rows in draws])
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def _columns(**named: np.ndarray) -> list[np.ndarray]:
    """Columns [n] in float64. Raises ValueError unless they are finite, of one length, and not empty."""
    columns = [np.asarray(column, dtype=np.float64) for column in named.values()]
    shapes = " and ".join(f"{name} {column.shape}" for name, column in zip(named, columns, strict=True))
    if any(column.ndim != 1 or column.shape != columns[0].shape or not len(column) for column in columns):
        raise ValueError(f"{shapes} need one value for each sample")
    if not all(np.isfinite(column).all() for column in columns):
        raise ValueError(f"{' and '.join(named)} must be finite")
    return columns
