"""Risk-coverage and AURC against enumeration of every order that ties allow."""

from itertools import groupby, permutations, product

import numpy as np
import pytest

from distill.evaluation.selective import aurc, risk_coverage


def by_enumeration(errors: list[float], confidence: list[float]) -> tuple[list[float], float]:
    """Risk at each coverage, averaged over all orders of tied samples, and its mean; no shared code, no numpy."""
    ranked = sorted(zip(confidence, errors, strict=True), key=lambda pair: -pair[0])
    ties = [[error for _, error in group] for _, group in groupby(ranked, key=lambda pair: pair[0])]
    curves = []
    for orders in product(*(list(permutations(tie)) for tie in ties)):
        sequence = [error for order in orders for error in order]
        curves.append([sum(sequence[: k + 1]) / (k + 1) for k in range(len(sequence))])
    mean = [sum(column) / len(curves) for column in zip(*curves, strict=True)]
    return mean, sum(mean) / len(mean)


@pytest.mark.parametrize("seed", range(8))
def test_equals_the_average_over_all_orders_of_ties(seed: int) -> None:
    random = np.random.default_rng(seed)
    errors = random.integers(0, 2, 8).astype(float)
    confidence = random.choice([0.2, 0.5, 0.5, 0.9, random.random()], 8)
    risk, area = by_enumeration(errors.tolist(), confidence.tolist())
    coverage, measured = risk_coverage(errors, confidence)
    np.testing.assert_allclose(measured, risk, atol=1e-12)
    np.testing.assert_allclose(coverage, np.arange(1, 9) / 8)
    assert aurc(errors, confidence) == pytest.approx(area, abs=1e-12)


def test_worked_by_hand() -> None:
    # By confidence: right, wrong, right, wrong. Risks: 0, 1/2, 1/3, 2/4.
    assert aurc(np.array([1, 0, 0, 1]), np.array([0.8, 0.7, 0.9, 0.1])) == pytest.approx(
        (0 + 1 / 2 + 1 / 3 + 1 / 2) / 4
    )


def test_the_order_of_the_input_does_not_matter() -> None:
    random = np.random.default_rng(0)
    errors, confidence = random.integers(0, 2, 300), random.integers(0, 5, 300) / 5
    shuffled = random.permutation(300)
    assert aurc(errors, confidence) == pytest.approx(aurc(errors[shuffled], confidence[shuffled]), abs=1e-12)


def test_extremes() -> None:
    errors = np.array([0, 0, 0, 1, 1])
    assert aurc(errors, np.zeros(5)) == pytest.approx(0.4)  # a constant confidence: the error rate
    assert aurc(np.zeros(5), np.arange(5)) == 0
    assert aurc(errors, -errors) < aurc(errors, np.zeros(5)) < aurc(errors, errors)


@pytest.mark.parametrize(
    ("errors", "confidence"), [([], []), ([0, 1], [0.5]), ([0, 1], [0.5, float("nan")]), ([[0]], [[1]])]
)
def test_refuses_what_has_no_curve(errors: list, confidence: list) -> None:
    with pytest.raises(ValueError, match="confidence"):
        risk_coverage(np.array(errors), np.array(confidence))
