"""Guarantees of the thresholds in simulations with a known truth, and their bounds against scipy's exact test."""

import json
from collections.abc import Callable
from dataclasses import asdict
from math import comb

import numpy as np
import pytest
from scipy.stats import binomtest

from distill.cascade.thresholds import (
    GRID,
    Threshold,
    largest_quality,
    smallest_risk,
    threshold_for_budget,
    threshold_for_quality,
    threshold_for_risk,
)

DRAWS = 1000


def budgets(
    budget: float, n: int, draw: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
) -> list[Threshold]:
    """Thresholds fitted on `DRAWS` validation sets of n samples."""
    random = np.random.default_rng(0)
    return [threshold_for_budget(*draw(random, n), budget) for _ in range(DRAWS)]


def columns(found: list[Threshold]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    taus, lows, highs = np.array([(threshold.tau, threshold.calls_low, threshold.calls_high) for threshold in found]).T
    return taus, lows, highs


def unbiased(realised: np.ndarray, budget: float) -> bool:
    return abs(realised.mean() - budget) < 4 * realised.std() / np.sqrt(len(realised))


def accepted(tau: float, uncertainty: np.ndarray) -> int:
    return int((uncertainty <= tau).sum())


@pytest.mark.parametrize("power", [1, 5])
@pytest.mark.parametrize("budget", [0.1, 0.37, 0.8])
@pytest.mark.parametrize("n", [25, 120])
def test_a_budget_is_met_on_average_and_its_interval_has_95_percent_coverage(n: int, budget: float, power: int) -> None:
    found = budgets(budget, n, lambda random, n: (random.random(n) ** power, np.ones(n)))
    taus, lows, highs = columns(found)
    realised = 1 - taus ** (1 / power)  # share of new samples above tau
    # linear interpolation is exact for uniform uncertainties, and off by a fraction of 1 / n otherwise
    assert unbiased(realised, budget) if power == 1 else abs(realised.mean() - budget) < 0.3 / n
    assert ((lows <= realised) & (realised <= highs)).mean() > 0.945
    assert {threshold.calls for threshold in found} == {budget}


@pytest.mark.parametrize("budget", [0.2, 0.6, 1.1])
def test_a_budget_is_met_where_reviews_take_two_calls(budget: float) -> None:
    # a sample at uncertainty u is reviewed with probability u
    def draw(random: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        uncertainty = random.random(n)
        return uncertainty, 1 + (random.random(n) < uncertainty)

    taus, lows, highs = columns(budgets(budget, 150, draw))
    realised = (1 - taus) + (1 - taus**2) / 2
    assert abs(realised.mean() - budget) < 0.5 / 150 + 4 * realised.std() / np.sqrt(DRAWS)
    assert ((lows <= realised) & (realised <= highs)).mean() > 0.94


def test_two_calls_per_sample_equal_one_call_at_half_the_budget() -> None:
    uncertainty = np.random.default_rng(0).random(200)
    one = threshold_for_budget(uncertainty, np.ones(200), 0.3)
    two = threshold_for_budget(uncertainty, np.full(200, 2), 0.6)
    assert one.tau == pytest.approx(two.tau)
    for name in ("calls", "calls_low", "calls_high"):
        assert 2 * getattr(one, name) == pytest.approx(getattr(two, name))


@pytest.mark.parametrize("k", [1, 30, 79])
def test_the_interval_is_that_of_clopper_and_pearson(k: int) -> None:
    n = 79
    uncertainty = np.random.default_rng(0).random(n)
    found = threshold_for_budget(uncertainty, np.ones(n), (n + 1 - k) / (n + 1))
    assert found.tau == pytest.approx(np.sort(uncertainty)[k - 1], abs=1e-12)
    above = int((uncertainty > found.tau).sum())
    expected = binomtest(above, n).proportion_ci(0.95, method="exact")
    assert (found.calls_low, found.calls_high) == pytest.approx((expected.low, expected.high))
    assert found.coverage == pytest.approx(1 - above / n)


@pytest.mark.parametrize("budget", [0.05, 0.2, 0.25, 0.5, 0.9])
def test_ties_never_cost_more_than_the_budget_and_the_interval_covers_them(budget: float) -> None:
    # six values, of which the highest, 1, is what an answer off the format gets
    values, weights = np.array([0, 0.2, 0.4, 0.6, 0.8, 0.9]), np.array([0.1, 0.2, 0.2, 0.1, 0.2, 0.2])

    def draw(random: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        return random.choice(values, n, p=weights), np.ones(n)

    found = budgets(budget, 100, draw)
    taus, lows, highs = columns(found)
    realised = (weights * (values > taus[:, None])).sum(1)
    assert realised.mean() <= budget + 4 * realised.std() / np.sqrt(DRAWS)
    assert ((lows <= realised + 1e-12) & (realised - 1e-12 <= highs)).mean() > 0.94
    assert all(threshold.calls <= budget for threshold in found)


def test_tied_samples_are_all_accepted_unless_the_budget_covers_all() -> None:
    uncertainty = np.full(50, 0.5)
    assert threshold_for_budget(uncertainty, np.ones(50), 0.9).coverage == 1
    assert threshold_for_budget(uncertainty, np.ones(50), 1.0).coverage == 0


def test_answers_with_uncertainty_1_are_always_deferred() -> None:
    """`calls` then exceeds a small budget, and the risk bound does not include them."""
    uncertainty = np.r_[np.linspace(0, 0.9, 60), np.ones(40)]
    found = threshold_for_budget(uncertainty, np.ones(100), 0.1)
    assert (found.coverage, found.calls) == (0.6, 0.4)
    assert found.calls_low is not None and found.calls_low < 0.4 < (found.calls_high or 0)
    assert threshold_for_budget(uncertainty, np.ones(100), 0.5).coverage == pytest.approx(0.5, abs=0.02)
    errors = np.r_[np.zeros(60), np.ones(40)]
    safe = threshold_for_risk(uncertainty, errors, 0.1)
    assert safe.coverage == 0.6
    with pytest.raises(ValueError, match="cannot support"):
        threshold_for_risk(np.ones(100), np.zeros(100), 0.5)


def test_budget_zero_defers_nothing_and_a_full_budget_everything() -> None:
    uncertainty, calls = np.linspace(0, 0.9, 11), np.array([1, 2] * 5 + [2])
    assert threshold_for_budget(uncertainty, calls, 0) == Threshold(1.0, 11, 1.0, 0.0, 0.0, 0.0)
    for budget in (2, 5):
        full = threshold_for_budget(uncertainty, calls, budget)
        assert full.tau < 0 and full.coverage == 0
        assert full.calls == pytest.approx(calls.mean())
        assert 1 <= full.calls_low <= calls.mean() <= full.calls_high <= 2
    ones = threshold_for_budget(uncertainty, np.ones(11), 1)
    assert (ones.tau < 0, ones.calls, ones.calls_low, ones.calls_high) == (True, 1, 1, 1)


def test_a_larger_budget_never_defers_less() -> None:
    random = np.random.default_rng(0)
    uncertainty, calls = random.integers(0, 30, 80) / 30, random.integers(1, 3, 80)
    found = [threshold_for_budget(uncertainty, calls, budget) for budget in np.linspace(0, 2, 201)]
    assert (np.diff([threshold.tau for threshold in found]) <= 0).all()
    assert all(0 <= threshold.calls_low <= threshold.calls <= threshold.calls_high <= 2 for threshold in found)


def test_the_order_of_the_samples_does_not_matter() -> None:
    random = np.random.default_rng(0)
    uncertainty, calls, errors = random.random(90), random.integers(1, 3, 90), random.random(90) < 0.1
    order = random.permutation(90)
    assert threshold_for_budget(uncertainty, calls, 0.5) == threshold_for_budget(uncertainty[order], calls[order], 0.5)
    assert threshold_for_risk(uncertainty, errors, 0.4) == threshold_for_risk(uncertainty[order], errors[order], 0.4)


def test_a_budget_works_with_one_sample() -> None:
    assert threshold_for_budget(np.array([0.4]), np.ones(1), 0.3).tau == 1
    assert threshold_for_budget(np.array([0.4]), np.ones(1), 0.6).tau == 0.4


ERROR_RATES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rising": lambda u: 0.02 + 0.5 * u,
    "useless": lambda u: np.full_like(u, 0.2),
    "falling": lambda u: 0.35 - 0.3 * u,
    "jumping": lambda u: np.where((u > 0.3) & (u < 0.45), 0.9, 0.1),
}


@pytest.mark.parametrize("levels", [None, 12])
@pytest.mark.parametrize("rate", ERROR_RATES)
def test_a_risk_target_is_kept_with_the_given_confidence(rate: str, levels: int | None) -> None:
    """For several shapes of the risk, with and without ties. A threshold on the empirical risk violates the target."""
    random = np.random.default_rng(0)
    n, target, confidence = 150, 0.2, 0.8
    grid = (np.arange(200_000) + 0.5) / 200_000
    rounded = grid if levels is None else np.floor(grid * levels) / levels
    risks = np.cumsum(ERROR_RATES[rate](grid)) / np.arange(1, len(grid) + 1)
    violations = naive_violations = 0
    for _ in range(DRAWS):
        latent = random.random(n)
        uncertainty = latent if levels is None else np.floor(latent * levels) / levels
        errors = random.random(n) < ERROR_RATES[rate](latent)
        try:
            tau = threshold_for_risk(uncertainty, errors, target, confidence).tau
            violations += risks[np.searchsorted(rounded, tau, side="right") - 1] > target + 1e-4
        except ValueError:
            pass  # refused: no guarantee, no violation
        order = np.argsort(uncertainty)
        empirical = np.cumsum(errors[order]) / np.arange(1, n + 1)
        allowed = uncertainty[order][empirical <= target]
        if len(allowed):
            naive_violations += risks[np.searchsorted(rounded, allowed[-1], side="right") - 1] > target + 1e-4
    assert violations / DRAWS <= 1 - confidence
    assert rate == "useless" or naive_violations / DRAWS > 1 - confidence


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_size_whose_exact_bound_meets_the_target_is_chosen(seed: int) -> None:
    random = np.random.default_rng(seed)
    n, target, confidence = 233, 0.25, 0.95
    uncertainty = random.random(n)
    errors = random.random(n) < 0.5 * uncertainty
    ranked = errors[np.argsort(uncertainty)]
    sizes = [step * n // GRID for step in range(1, GRID + 1)]
    bounds = [
        binomtest(int(ranked[:size].sum()), size, alternative="less").proportion_ci(1 - 0.05 / GRID).high
        for size in sizes
    ]
    expected = max(size for size, bound in zip(sizes, bounds, strict=True) if bound <= target)
    found = threshold_for_risk(uncertainty, errors, target, confidence)
    assert accepted(found.tau, uncertainty) == expected
    assert found.coverage == expected / n
    assert (found.risk, found.confidence) == (target, confidence)


@pytest.mark.parametrize("n", [1, 5, 30, 400])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_the_smallest_risk_is_supported_and_a_smaller_one_is_refused(n: int, confidence: float) -> None:
    random = np.random.default_rng(n)
    uncertainty = random.random(n)
    errors = random.random(n) < 0.3 * uncertainty
    smallest = smallest_risk(uncertainty, errors, confidence)
    assert threshold_for_risk(uncertainty, errors, smallest, confidence).risk == smallest
    with pytest.raises(ValueError, match=rf"{n} validation samples .* smallest that they support is {smallest:g}$"):
        threshold_for_risk(uncertainty, errors, smallest - 0.0011, confidence)


@pytest.mark.parametrize("binary", [True, False])
def test_a_quality_target_is_kept_with_the_given_confidence(binary: bool) -> None:
    """Over 300 validation sets, the cascade's true quality is below the target in at most one of ten."""
    random, target, kept, calls = np.random.default_rng(0), 0.8, [], []

    def draw(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        uncertainty = random.random(n)
        means = 1 - 0.6 * uncertainty, np.full(n, 0.9)
        if binary:
            student, teacher = ((random.random(n) < mean).astype(float) for mean in means)
        else:
            student, teacher = (random.beta(8 * mean, 8 * (1 - mean)) for mean in means)
        return uncertainty, student, teacher

    def truth(tau: float) -> float:
        tau = min(max(tau, 0.0), 1.0)
        return tau - 0.3 * tau**2 + 0.9 * (1 - tau)

    for _ in range(300):
        found = threshold_for_quality(*draw(500), np.ones(500), target, 0.9)
        kept.append(truth(found.tau) >= target)
        calls.append(found.calls)
        assert found.reached_low <= found.reached <= found.reached_high and found.reached > target
    assert np.mean(kept) >= 0.87
    assert np.mean(calls) < 0.6, "the teacher alone would cost one call"


def test_a_quality_that_the_samples_do_not_support_is_refused_with_the_largest() -> None:
    uncertainty, student, teacher = np.linspace(0, 1, 100), np.zeros(100), np.repeat([1.0, 0.0], [90, 10])
    with pytest.raises(ValueError, match=r"100 validation posts cannot support a quality of 0\.95") as refused:
        threshold_for_quality(uncertainty, student, teacher, np.ones(100), 0.95)
    largest = float(str(refused.value).rsplit(maxsplit=1)[-1])
    tail = sum(comb(100, k) * largest**k * (1 - largest) ** (100 - k) for k in range(90, 101))
    assert tail <= 0.1 and largest == largest_quality(teacher, 0.9)
    found = threshold_for_quality(uncertainty, student, teacher, np.ones(100), largest)
    assert found.tau < 0.1 and found.calls == pytest.approx(1.0, abs=0.1)
    for value in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="it takes a number above 0 and below 1"):
            threshold_for_quality(uncertainty, student, teacher, np.ones(100), value)
    with pytest.raises(ValueError, match="qualities must lie between 0 and 1"):
        threshold_for_quality(uncertainty, student - 1, teacher, np.ones(100), 0.5)


def test_a_student_as_good_as_its_teacher_answers_everything() -> None:
    right = np.repeat([1.0, 0.0], [95, 5])
    found = threshold_for_quality(np.linspace(0, 0.9, 100), right, right, np.ones(100), 0.85)
    assert (found.tau, found.coverage, found.calls) == (1.0, 1.0, 0.0)


def test_a_student_that_is_never_wrong_answers_everything() -> None:
    found = threshold_for_risk(np.random.default_rng(0).random(300), np.zeros(300), 0.05)
    assert (found.tau, found.coverage) == (1.0, 1.0)


def test_a_student_that_is_always_wrong_supports_no_target() -> None:
    assert smallest_risk(np.linspace(0, 1, 50), np.ones(50)) == 1
    with pytest.raises(ValueError, match="smallest that they support is 1"):
        threshold_for_risk(np.linspace(0, 1, 50), np.ones(50), 0.5)


def test_a_tie_is_accepted_completely_or_not_at_all() -> None:
    uncertainty = np.array([0.1] * 60 + [0.5] * 60 + [0.9] * 80)
    errors = np.array([0] * 60 + [0] * 60 + [1] * 80)
    found = threshold_for_risk(uncertainty, errors, 0.1)
    assert accepted(found.tau, uncertainty) == 120
    assert found.tau < 0.9 and np.isclose(found.tau, 0.9)


def test_a_threshold_round_trips_through_json() -> None:
    uncertainty = np.random.default_rng(0).random(100)
    for found in (
        threshold_for_budget(uncertainty, np.ones(100), 0.3),
        threshold_for_risk(uncertainty, np.zeros(100), 0.2),
    ):
        assert Threshold(**json.loads(json.dumps(asdict(found)))) == found


INVALID = [
    ([], []),
    ([0.1, 0.2], [1]),
    ([[0.1]], [[1]]),
    ([0.1, float("nan")], [1, 1]),
    ([0.1, 1.2], [1, 1]),
    ([-0.1, 0.2], [1, 1]),
]


@pytest.mark.parametrize(("uncertainty", "other"), INVALID)
def test_invalid_uncertainties_are_refused(uncertainty: list, other: list) -> None:
    for fit in (threshold_for_budget, threshold_for_risk):
        with pytest.raises(ValueError, match="uncertainty"):
            fit(uncertainty, other, 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.5, -1, 3, float("nan")])
def test_invalid_calls_and_errors_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="calls"):
        threshold_for_budget(np.array([0.1, 0.2]), np.array([1, value]), 0.5)
    with pytest.raises(ValueError, match="errors"):
        threshold_for_risk(np.array([0.1, 0.2]), np.array([1, value]), 0.5)


@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_invalid_targets_are_refused(value: float) -> None:
    uncertainty = np.array([0.1, 0.2])
    with pytest.raises(ValueError, match="budget"):
        threshold_for_budget(uncertainty, np.ones(2), value)
    with pytest.raises(ValueError, match="risk"):
        threshold_for_risk(uncertainty, np.ones(2), value)
    with pytest.raises(ValueError, match="confidence"):
        threshold_for_risk(uncertainty, np.ones(2), 0.5, value)
