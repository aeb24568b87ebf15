"""What thresholds promise, by simulation where the truth is known, and their bounds against scipy's exact test."""

import json
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pytest
from scipy.stats import binomtest

from distill.cascade.thresholds import GRID, Threshold, by_budget, by_risk, smallest_risk

DRAWS = 1000


def budgets(
    budget: float, n: int, draw: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
) -> list[Threshold]:
    """Thresholds of many validation sets of n samples."""
    random = np.random.default_rng(0)
    return [by_budget(*draw(random, n), budget) for _ in range(DRAWS)]


def ends(found: list[Threshold]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    taus, lows, highs = np.array([(each.tau, each.calls_low, each.calls_high) for each in found]).T
    return taus, lows, highs


def unbiased(realised: np.ndarray, budget: float) -> bool:
    return abs(realised.mean() - budget) < 4 * realised.std() / np.sqrt(len(realised))


def accepted(tau: float, uncertainty: np.ndarray) -> int:
    return int((uncertainty <= tau).sum())


@pytest.mark.parametrize("power", [1, 5])
@pytest.mark.parametrize("budget", [0.1, 0.37, 0.8])
@pytest.mark.parametrize("n", [25, 120])
def test_a_budget_is_met_on_average_and_its_interval_nineteen_times_in_twenty(
    n: int, budget: float, power: int
) -> None:
    found = budgets(budget, n, lambda random, n: (random.random(n) ** power, np.ones(n)))
    taus, lows, highs = ends(found)
    realised = 1 - taus ** (1 / power)  # the share of new samples above tau
    # joining two neighbours by a straight line is exact where they lie evenly, off by a part of 1 / n where they do not
    assert unbiased(realised, budget) if power == 1 else abs(realised.mean() - budget) < 0.3 / n
    assert ((lows <= realised) & (realised <= highs)).mean() > 0.945
    assert {each.calls for each in found} == {budget}


@pytest.mark.parametrize("budget", [0.2, 0.6, 1.1])
def test_a_budget_is_met_where_reviews_take_two_calls(budget: float) -> None:
    # a sample at uncertainty u is reviewed with probability u
    def draw(random: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        doubt = random.random(n)
        return doubt, 1 + (random.random(n) < doubt)

    taus, lows, highs = ends(budgets(budget, 150, draw))
    realised = (1 - taus) + (1 - taus**2) / 2
    assert abs(realised.mean() - budget) < 0.5 / 150 + 4 * realised.std() / np.sqrt(DRAWS)
    assert ((lows <= realised) & (realised <= highs)).mean() > 0.94


def test_two_calls_for_everyone_are_one_call_at_half_the_budget() -> None:
    doubt = np.random.default_rng(0).random(200)
    one, two = by_budget(doubt, np.ones(200), 0.3), by_budget(doubt, np.full(200, 2), 0.6)
    assert one.tau == pytest.approx(two.tau)
    for name in ("calls", "calls_low", "calls_high"):
        assert 2 * getattr(one, name) == pytest.approx(getattr(two, name))


@pytest.mark.parametrize("k", [1, 30, 79])
def test_the_interval_is_clopper_and_pearsons(k: int) -> None:
    n = 79
    doubt = np.random.default_rng(0).random(n)
    found = by_budget(doubt, np.ones(n), (n + 1 - k) / (n + 1))
    assert found.tau == pytest.approx(np.sort(doubt)[k - 1], abs=1e-12)
    above = int((doubt > found.tau).sum())
    expected = binomtest(above, n).proportion_ci(0.95, method="exact")
    assert (found.calls_low, found.calls_high) == pytest.approx((expected.low, expected.high))
    assert found.coverage == pytest.approx(1 - above / n)


@pytest.mark.parametrize("budget", [0.05, 0.2, 0.25, 0.5, 0.9])
def test_ties_never_cost_more_than_the_budget_and_the_interval_is_honest_about_them(budget: float) -> None:
    # six values, of which the highest, 1, is what an answer off the format gets
    values, weights = np.array([0, 0.2, 0.4, 0.6, 0.8, 0.9]), np.array([0.1, 0.2, 0.2, 0.1, 0.2, 0.2])

    def draw(random: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        return random.choice(values, n, p=weights), np.ones(n)

    found = budgets(budget, 100, draw)
    taus, lows, highs = ends(found)
    realised = (weights * (values > taus[:, None])).sum(1)
    assert realised.mean() <= budget + 4 * realised.std() / np.sqrt(DRAWS)
    assert ((lows <= realised + 1e-12) & (realised - 1e-12 <= highs)).mean() > 0.94
    assert all(each.calls <= budget for each in found)


def test_all_samples_tied_are_all_accepted_unless_the_budget_pays_for_all() -> None:
    doubt = np.full(50, 0.5)
    assert by_budget(doubt, np.ones(50), 0.9).coverage == 1
    assert by_budget(doubt, np.ones(50), 1.0).coverage == 0


def test_entirely_uncertain_answers_never_stand() -> None:
    """They are deferred whatever the budget, which `calls` then admits, and no risk is promised for them."""
    doubt = np.r_[np.linspace(0, 0.9, 60), np.ones(40)]
    found = by_budget(doubt, np.ones(100), 0.1)
    assert (found.coverage, found.calls) == (0.6, 0.4)
    assert found.calls_low is not None and found.calls_low < 0.4 < (found.calls_high or 0)
    assert by_budget(doubt, np.ones(100), 0.5).coverage == pytest.approx(0.5, abs=0.02)
    errors = np.r_[np.zeros(60), np.ones(40)]
    safe = by_risk(doubt, errors, 0.1)
    assert safe.coverage == 0.6
    with pytest.raises(ValueError, match="cannot support"):
        by_risk(np.ones(100), np.zeros(100), 0.5)


def test_no_budget_asks_for_no_one_and_a_full_budget_for_everyone() -> None:
    doubt, calls = np.linspace(0, 0.9, 11), np.array([1, 2] * 5 + [2])
    assert by_budget(doubt, calls, 0) == Threshold(1.0, 11, 1.0, 0.0, 0.0, 0.0)
    for budget in (2, 5):
        full = by_budget(doubt, calls, budget)
        assert full.tau < 0 and full.coverage == 0
        assert full.calls == pytest.approx(calls.mean())
        assert 1 <= full.calls_low <= calls.mean() <= full.calls_high <= 2
    ones = by_budget(doubt, np.ones(11), 1)
    assert (ones.tau < 0, ones.calls, ones.calls_low, ones.calls_high) == (True, 1, 1, 1)


def test_a_larger_budget_never_defers_less() -> None:
    random = np.random.default_rng(0)
    doubt, calls = random.integers(0, 30, 80) / 30, random.integers(1, 3, 80)
    found = [by_budget(doubt, calls, budget) for budget in np.linspace(0, 2, 201)]
    assert (np.diff([each.tau for each in found]) <= 0).all()
    assert all(0 <= each.calls_low <= each.calls <= each.calls_high <= 2 for each in found)


def test_the_order_of_the_samples_does_not_matter() -> None:
    random = np.random.default_rng(0)
    doubt, calls, errors = random.random(90), random.integers(1, 3, 90), random.random(90) < 0.1
    shuffled = random.permutation(90)
    assert by_budget(doubt, calls, 0.5) == by_budget(doubt[shuffled], calls[shuffled], 0.5)
    assert by_risk(doubt, errors, 0.4) == by_risk(doubt[shuffled], errors[shuffled], 0.4)


def test_one_sample_is_enough_for_a_budget() -> None:
    assert by_budget(np.array([0.4]), np.ones(1), 0.3).tau == 1
    assert by_budget(np.array([0.4]), np.ones(1), 0.6).tau == 0.4


ERROR_RATES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rising": lambda u: 0.02 + 0.5 * u,
    "useless": lambda u: np.full_like(u, 0.2),
    "falling": lambda u: 0.35 - 0.3 * u,
    "jumping": lambda u: np.where((u > 0.3) & (u < 0.45), 0.9, 0.1),
}


@pytest.mark.parametrize("levels", [None, 12])
@pytest.mark.parametrize("rate", ERROR_RATES)
def test_a_risk_target_is_kept_to_as_often_as_promised(rate: str, levels: int | None) -> None:
    """At every shape of risk, with ties and without; the empirical risk alone would break the promise."""
    random = np.random.default_rng(0)
    n, target, confidence = 150, 0.2, 0.8
    grid = (np.arange(200_000) + 0.5) / 200_000
    rounded = grid if levels is None else np.floor(grid * levels) / levels
    risks = np.cumsum(ERROR_RATES[rate](grid)) / np.arange(1, len(grid) + 1)
    broken = naive = 0
    for _ in range(DRAWS):
        latent = random.random(n)
        doubt = latent if levels is None else np.floor(latent * levels) / levels
        errors = random.random(n) < ERROR_RATES[rate](latent)
        try:
            tau = by_risk(doubt, errors, target, confidence).tau
            broken += risks[np.searchsorted(rounded, tau, side="right") - 1] > target + 1e-4
        except ValueError:
            pass  # nothing promised, nothing broken
        order = np.argsort(doubt)
        empirical = np.cumsum(errors[order]) / np.arange(1, n + 1)
        allowed = doubt[order][empirical <= target]
        if len(allowed):
            naive += risks[np.searchsorted(rounded, allowed[-1], side="right") - 1] > target + 1e-4
    assert broken / DRAWS <= 1 - confidence
    assert rate == "useless" or naive / DRAWS > 1 - confidence


@pytest.mark.parametrize("seed", range(5))
def test_the_loosest_size_is_chosen_whose_exact_bound_meets_the_target(seed: int) -> None:
    random = np.random.default_rng(seed)
    n, target, confidence = 233, 0.25, 0.95
    doubt = random.random(n)
    errors = random.random(n) < 0.5 * doubt
    ranked = errors[np.argsort(doubt)]
    sizes = [step * n // GRID for step in range(1, GRID + 1)]
    bounds = [
        binomtest(int(ranked[:size].sum()), size, alternative="less").proportion_ci(1 - 0.05 / GRID).high
        for size in sizes
    ]
    expected = max(size for size, bound in zip(sizes, bounds, strict=True) if bound <= target)
    found = by_risk(doubt, errors, target, confidence)
    assert accepted(found.tau, doubt) == expected
    assert found.coverage == expected / n
    assert (found.risk, found.confidence) == (target, confidence)


@pytest.mark.parametrize("n", [1, 5, 30, 400])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_the_smallest_risk_is_supported_and_a_smaller_one_refused_by_its_name(n: int, confidence: float) -> None:
    random = np.random.default_rng(n)
    doubt = random.random(n)
    errors = random.random(n) < 0.3 * doubt
    smallest = smallest_risk(doubt, errors, confidence)
    assert by_risk(doubt, errors, smallest, confidence).risk == smallest
    with pytest.raises(ValueError, match=rf"{n} validation samples .* smallest that they support is {smallest:g}$"):
        by_risk(doubt, errors, smallest - 0.0011, confidence)


def test_a_student_that_is_never_wrong_answers_everything() -> None:
    found = by_risk(np.random.default_rng(0).random(300), np.zeros(300), 0.05)
    assert (found.tau, found.coverage) == (1.0, 1.0)


def test_a_student_that_is_always_wrong_supports_no_target() -> None:
    assert smallest_risk(np.linspace(0, 1, 50), np.ones(50)) == 1
    with pytest.raises(ValueError, match="smallest that they support is 1"):
        by_risk(np.linspace(0, 1, 50), np.ones(50), 0.5)


def test_a_tie_is_accepted_whole_or_not_at_all() -> None:
    doubt = np.array([0.1] * 60 + [0.5] * 60 + [0.9] * 80)
    errors = np.array([0] * 60 + [0] * 60 + [1] * 80)
    found = by_risk(doubt, errors, 0.1)
    assert accepted(found.tau, doubt) == 120
    assert found.tau < 0.9 and np.isclose(found.tau, 0.9)


def test_a_threshold_survives_json() -> None:
    doubt = np.random.default_rng(0).random(100)
    for found in (by_budget(doubt, np.ones(100), 0.3), by_risk(doubt, np.zeros(100), 0.2)):
        assert Threshold(**json.loads(json.dumps(asdict(found)))) == found


HOSTILE = [
    ([], []),
    ([0.1, 0.2], [1]),
    ([[0.1]], [[1]]),
    ([0.1, float("nan")], [1, 1]),
    ([0.1, 1.2], [1, 1]),
    ([-0.1, 0.2], [1, 1]),
]


@pytest.mark.parametrize(("doubt", "other"), HOSTILE)
def test_refuses_uncertainties_that_are_none(doubt: list, other: list) -> None:
    for call in (lambda: by_budget(doubt, other, 0.5), lambda: by_risk(doubt, other, 0.5)):
        with pytest.raises(ValueError, match="uncertainty"):
            call()


@pytest.mark.parametrize("value", [0.5, -1, 3, float("nan")])
def test_refuses_calls_and_errors_that_are_none(value: float) -> None:
    with pytest.raises(ValueError, match="calls"):
        by_budget(np.array([0.1, 0.2]), np.array([1, value]), 0.5)
    with pytest.raises(ValueError, match="errors"):
        by_risk(np.array([0.1, 0.2]), np.array([1, value]), 0.5)


@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_refuses_targets_that_are_none(value: float) -> None:
    doubt = np.array([0.1, 0.2])
    with pytest.raises(ValueError, match="budget"):
        by_budget(doubt, np.ones(2), value)
    with pytest.raises(ValueError, match="risk"):
        by_risk(doubt, np.ones(2), value)
    with pytest.raises(ValueError, match="confidence"):
        by_risk(doubt, np.ones(2), 0.5, value)
