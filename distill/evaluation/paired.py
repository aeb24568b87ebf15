"""Paired comparison of two models on the same posts: bootstrap intervals of the difference, and McNemar's test."""

import numpy as np
from scipy import stats

from distill.evaluation.selective import bootstrap_interval


def paired_differences(first: np.ndarray, other: np.ndarray, *, paired_runs: bool) -> np.ndarray:
    """Differences `other` - `first` for each post.

    Args:
        first, other: a quality, such as 1 for a correct label, of n posts in one or more runs: [n, R] and [n, R'].
        paired_runs: whether the columns belong together, such as runs of the same seed; then R = R'.

    Returns:
        [n, R] for paired runs, otherwise the differences of the means over the runs, [n, 1].
    """
    if paired_runs:
        return other - first
    return (other.mean(1) - first.mean(1))[:, None]


def difference_interval(
    differences: np.ndarray, *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of the mean of `paired_differences` [n, R].

    Posts are resampled, and with several columns the columns as well, independently of the posts (pigeonhole bootstrap;
    Owen, 2007, The pigeonhole bootstrap, Annals of Applied Statistics 1(2)). The interval then covers other posts and
    other seeds, and is somewhat too wide.

    Raises:
        ValueError: no posts.
    """
    runs = differences.shape[1]
    columns = np.random.default_rng(seed + 1)

    def mean(rows: np.ndarray) -> float:
        kept = columns.integers(runs, size=runs) if runs > 1 else np.zeros(1, int)
        return float(rows[:, kept].mean())

    low, high = bootstrap_interval(mean, differences, resamples=resamples, level=level, seed=seed)
    return float(low), float(high)


def mcnemar(differences: np.ndarray) -> float:
    """Two-sided p-value of the hypothesis that two models are correct equally often (McNemar, 1947).

    With one column, the exact binomial test of the posts on which only one model is correct. With several, the runs on
    one post are a cluster, and the statistic of Durkalski et al. (2003, Statistics in Medicine 22) is used,
    (Σ d)² / Σ d² over the posts' sums d, which has a chi-squared distribution with one degree of freedom.

    Args:
        differences: `paired_differences` [n, R] of correctness, 1 or 0.
    """
    sums = differences.sum(1)
    if not sums.any():
        return 1.0
    if differences.shape[1] == 1 and set(np.unique(sums)) <= {-1.0, 0.0, 1.0}:
        better, worse = int((sums > 0).sum()), int((sums < 0).sum())
        return float(stats.binomtest(better, better + worse).pvalue)
    return float(stats.chi2.sf(sums.sum() ** 2 / (sums**2).sum(), 1))
