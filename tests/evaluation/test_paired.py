"""Paired comparison against explicit sums, scipy, and simulated posts and seeds."""

from math import comb

import numpy as np
import pytest
from scipy.stats import bootstrap

from distill.evaluation.paired import difference_interval, mcnemar, paired_differences


def correct(rng: np.random.Generator, rate: np.ndarray, runs: int) -> np.ndarray:
    return (rng.random((len(rate), runs)) < rate[:, None]).astype(float)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (0, 6), (9, 3), (12, 12), (40, 61)])
def test_one_run_is_tested_exactly(better: int, worse: int) -> None:
    column = np.array([1.0] * better + [-1.0] * worse + [0.0] * 30)[:, None]
    n, k = better + worse, min(better, worse)
    tail = 2 * sum(comb(n, i) for i in range(k + 1)) / 2**n
    assert mcnemar(column) == pytest.approx(min(1.0, tail))
    assert mcnemar(-column) == mcnemar(column)


def test_runs_on_one_post_are_a_cluster() -> None:
    """Durkalski et al. (2003): identical runs add nothing, and the statistic is (Σ d)² / Σ d²."""
    rng = np.random.default_rng(0)
    one = rng.choice([-1.0, 0.0, 1.0], size=(400, 1), p=[0.05, 0.85, 0.10])
    better, worse = (one > 0).sum(), (one < 0).sum()
    asymptotic = (better - worse) ** 2 / (better + worse)
    from scipy.stats import chi2

    assert mcnemar(np.repeat(one, 3, axis=1)) == pytest.approx(chi2.sf(asymptotic, 1))
    assert mcnemar(np.zeros((10, 3))) == 1.0


def test_equal_models_are_rarely_called_different() -> None:
    """Under the hypothesis p is below .05 in about 5% of the cases, also if runs on one post depend on each other."""
    rng = np.random.default_rng(1)
    below = []
    for _ in range(300):
        rate = rng.beta(2, 1, size=200)  # posts differ in difficulty, for both models alike
        first, other = correct(rng, rate, 3), correct(rng, rate, 3)
        below.append(mcnemar(paired_differences(first, other, paired_runs=True)) < 0.05)
    assert np.mean(below) == pytest.approx(0.05, abs=0.03)


def test_the_interval_of_one_run_is_that_of_scipy() -> None:
    rng = np.random.default_rng(2)
    rate = rng.beta(2, 1, size=300)
    differences = paired_differences(correct(rng, rate, 1), correct(rng, rate, 1), paired_runs=True)
    expected = bootstrap((differences[:, 0],), np.mean, method="percentile", n_resamples=4000).confidence_interval
    low, high = difference_interval(differences, resamples=4000)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.006)
    assert difference_interval(differences) == difference_interval(differences)


def test_the_interval_covers_the_difference_of_other_posts_and_seeds() -> None:
    """A model with other seeds is better or worse by chance; an interval over posts alone leaves the truth out."""
    rng = np.random.default_rng(3)
    covered, posts_alone = [], []
    for repeat in range(120):
        rate, seeds = rng.beta(4, 2, size=250), rng.normal(0, 0.05, size=4)
        first = correct(rng, rate, 4)
        other = np.stack([correct(rng, np.clip(rate + shift, 0, 1), 1)[:, 0] for shift in seeds], axis=1)
        differences = paired_differences(first, other, paired_runs=True)
        truth = 0.0
        for found, data in ((covered, differences), (posts_alone, differences.mean(1, keepdims=True))):
            low, high = difference_interval(data, resamples=300, seed=repeat)
            found.append(low <= truth <= high)
    assert np.mean(covered) >= 0.88 > np.mean(posts_alone)


def test_runs_of_other_seeds_are_compared_by_their_means() -> None:
    first, other = np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert paired_differences(first, other, paired_runs=False).tolist() == [[2 / 3 - 0.5], [1 / 3]]
