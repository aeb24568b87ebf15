"""Risk-coverage and deferral curves compared with enumeration of all orders of ties; AUGRC, reliability and the
bootstrap compared with other definitions and libraries."""

from collections.abc import Callable
from functools import partial
from itertools import groupby, permutations, product

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap
from sklearn.metrics import roc_auc_score
from torchmetrics.functional.classification import multiclass_calibration_error

from distill.evaluation.selective import (
    augrc,
    aurc,
    bootstrap_interval,
    deferral_curve,
    gain_over_random,
    oracle_scores,
    reliability,
    risk_coverage,
)


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
def test_risk_coverage_is_the_average_over_all_orders_of_ties(seed: int) -> None:
    random = np.random.default_rng(seed)
    errors = random.integers(0, 2, 8).astype(float)
    confidence = random.choice([0.2, 0.5, 0.5, 0.9, random.random()], 8)
    risk, area = by_enumeration(errors.tolist(), confidence.tolist())
    coverage, measured = risk_coverage(errors, confidence)
    np.testing.assert_allclose(measured, risk, atol=1e-12)
    np.testing.assert_allclose(coverage, np.arange(1, 9) / 8)
    assert aurc(errors, confidence) == pytest.approx(area, abs=1e-12)


def test_a_case_computed_by_hand() -> None:
    # by confidence: correct, wrong, correct, wrong. Risks: 0, 1/2, 1/3, 2/4.
    assert aurc(np.array([1, 0, 0, 1]), np.array([0.8, 0.7, 0.9, 0.1])) == pytest.approx(
        (0 + 1 / 2 + 1 / 3 + 1 / 2) / 4
    )


def test_the_order_of_the_input_does_not_matter() -> None:
    random = np.random.default_rng(0)
    errors, confidence = random.integers(0, 2, 300), random.integers(0, 5, 300) / 5
    shuffled = random.permutation(300)
    assert aurc(errors, confidence) == pytest.approx(aurc(errors[shuffled], confidence[shuffled]), abs=1e-12)


def test_aurc_at_its_extremes() -> None:
    errors = np.array([0, 0, 0, 1, 1])
    assert aurc(errors, np.zeros(5)) == pytest.approx(0.4)  # a constant confidence: the error rate
    assert aurc(np.zeros(5), np.arange(5)) == 0
    assert aurc(errors, -errors) < aurc(errors, np.zeros(5)) < aurc(errors, errors)


@pytest.mark.parametrize(
    ("errors", "confidence"), [([], []), ([0, 1], [0.5]), ([0, 1], [0.5, float("nan")]), ([[0]], [[1]])]
)
def test_invalid_inputs_of_risk_coverage_are_rejected(errors: list, confidence: list) -> None:
    for measure in (risk_coverage, aurc, augrc):
        with pytest.raises(ValueError, match="confidence"):
            measure(np.array(errors), np.array(confidence))


@pytest.mark.parametrize("levels", [4, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_augrc_equals_its_expression_in_terms_of_auroc(seed: int, levels: int) -> None:
    random = np.random.default_rng(seed)
    confidence = random.integers(0, levels, 200) / levels
    errors = (random.random(200) < 0.5 - 0.4 * confidence).astype(float)
    accuracy = 1 - errors.mean()
    # Traub et al., arXiv 2407.01032: the probability that an error ranks above a correct answer, and half of the rest
    expected = (1 - roc_auc_score(1 - errors, confidence)) * accuracy * (1 - accuracy) + (1 - accuracy) ** 2 / 2
    assert augrc(errors, confidence) == pytest.approx(expected, abs=1e-12)


def test_augrc_at_its_extremes() -> None:
    errors = np.array([0, 0, 0, 1, 1])
    assert augrc(errors, -errors) == pytest.approx(0.4**2 / 2)  # all errors last
    assert augrc(errors, np.zeros(5)) == pytest.approx(0.4 / 2)  # a constant confidence: half the error rate
    assert augrc(errors, errors) == pytest.approx(0.4 - 0.4**2 / 2)  # all errors first
    assert augrc(np.zeros(5), np.arange(5)) == 0


@pytest.mark.parametrize("labels", [2, 5])
@pytest.mark.parametrize("bins", [10, 15])
def test_reliability_sums_to_the_ece_of_torchmetrics(labels: int, bins: int) -> None:
    random = np.random.default_rng(0)
    probabilities, gold = random.dirichlet(np.ones(labels), 400), random.integers(0, labels, 400)
    found = reliability(probabilities, gold, bins)
    assert sum(found["count"]) == 400 and {len(column) for column in found.values()} == {bins}
    full = [
        (n / 400) * abs(a - c)
        for c, a, n in zip(found["confidence"], found["accuracy"], found["count"], strict=True)
        if n
    ]
    expected = multiclass_calibration_error(
        torch.from_numpy(probabilities), torch.from_numpy(gold), num_classes=labels, n_bins=bins
    )
    assert sum(full) == pytest.approx(float(expected), abs=1e-6)
    empty = [n == 0 for n in found["count"]]
    assert empty == [value is None for value in found["confidence"]] == [value is None for value in found["accuracy"]]


def test_a_probability_of_one_is_in_the_last_bin() -> None:
    found = reliability(np.array([[1.0, 0.0], [0.55, 0.45], [0.0, 1.0]]), np.array([0, 0, 0]), bins=4)
    assert found == {"confidence": [None, None, 0.55, 1.0], "accuracy": [None, None, 1.0, 0.5], "count": [0, 0, 1, 2]}


@pytest.mark.parametrize(
    ("probabilities", "gold"),
    [(np.zeros((0, 2)), []), (np.array([0.5, 0.5]), [0, 1]), (np.eye(2), [0]), (np.full((1, 2), np.nan), [0])],
)
def test_invalid_inputs_of_reliability_are_rejected(probabilities: np.ndarray, gold: list) -> None:
    with pytest.raises(ValueError, match=r"probabilities|confidence"):
        reliability(probabilities, np.array(gold))


def deferred_by_enumeration(score: list[float], student: list[float], teacher: list[float]) -> list[float]:
    """The mean after each number of deferrals, averaged over all orders of tied samples; no shared code, no numpy."""
    ranked = sorted(zip(score, student, teacher, strict=True), key=lambda row: -row[0])
    ties = [list(group) for _, group in groupby(ranked, key=lambda row: row[0])]
    curves = []
    for orders in product(*(list(permutations(tie)) for tie in ties)):
        rows = [row for order in orders for row in order]
        curves.append([sum(r[2] for r in rows[:k]) + sum(r[1] for r in rows[k:]) for k in range(len(rows) + 1)])
    return [sum(column) / len(curves) / len(score) for column in zip(*curves, strict=True)]


@pytest.mark.parametrize("seed", range(6))
def test_the_deferral_curve_is_the_average_over_all_orders_of_ties(seed: int) -> None:
    random = np.random.default_rng(seed)
    score, student, teacher = random.choice([0.1, 0.4, 0.4, 0.8], 7), random.random(7), random.integers(0, 2, 7)
    expected = deferred_by_enumeration(score.tolist(), student.tolist(), teacher.tolist())
    np.testing.assert_allclose(deferral_curve(score, student, teacher), expected, atol=1e-12)


def student_and_teacher(n: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Uncertainty, quality of a student that errs on uncertain samples, and quality of a better teacher."""
    random = np.random.default_rng(0)
    uncertainty = random.random(n)
    return uncertainty, (random.random(n) > 0.8 * uncertainty).astype(float), (random.random(n) > 0.2).astype(float)


def test_a_deferral_curve_runs_from_student_to_teacher_and_is_interpolated() -> None:
    uncertainty, student, teacher = student_and_teacher()
    curve = deferral_curve(uncertainty, student, teacher)
    assert len(curve) == 301
    assert (curve[0], curve[-1]) == (pytest.approx(student.mean()), pytest.approx(teacher.mean()))
    values = deferral_curve(uncertainty, student, teacher, fractions=np.array([0, 0.25, 0.5, 1 / 600]))
    np.testing.assert_allclose(values, [curve[0], curve[75], curve[150], (curve[0] + curve[1]) / 2], atol=1e-12)


def test_a_constant_score_gives_random_deferral() -> None:
    uncertainty, student, teacher = student_and_teacher()
    line = deferral_curve(np.zeros(300), student, teacher)
    np.testing.assert_allclose(line, np.linspace(student.mean(), teacher.mean(), 301), atol=1e-12)
    assert gain_over_random(line) == pytest.approx(0, abs=1e-12)
    assert gain_over_random(deferral_curve(uncertainty, student, teacher)) > 0.02
    assert gain_over_random(deferral_curve(-uncertainty, student, teacher)) < -0.02


def test_the_gain_over_random_is_an_area() -> None:
    assert gain_over_random(np.array([0.0, 1.0, 1.0])) == pytest.approx(1 / 4)  # a triangle of base 1, height 1/2


def test_a_cost_curve_adds_the_teacher_to_the_student() -> None:
    random = np.random.default_rng(0)
    score, student, teacher = random.random(20), random.random(20), 10 * random.random(20)
    order = np.argsort(-score)
    expected = [(student.sum() + teacher[order[:k]].sum()) / 20 for k in range(21)]
    np.testing.assert_allclose(deferral_curve(score, student, student + teacher), expected)


@pytest.mark.parametrize("continuous", [False, True])
def test_no_order_beats_the_oracle(continuous: bool) -> None:
    random = np.random.default_rng(0)
    qualities = -random.random((2, 60)) if continuous else random.integers(0, 2, (2, 60)).astype(float)
    best = deferral_curve(oracle_scores(*qualities), *qualities)
    for _ in range(50):
        assert (deferral_curve(random.random(60), *qualities) <= best + 1e-12).all()
    assert best.max() == pytest.approx(qualities.max(axis=0).mean())


@pytest.mark.parametrize("wrong", [[], [0.5], [0.5, float("nan")], [[0.5, 0.5]]])
def test_invalid_inputs_of_deferral_curve_are_rejected(wrong: list) -> None:
    columns = [np.array([0.1, 0.2]), np.ones(2), np.ones(2)]
    for place in range(3):
        with pytest.raises(ValueError, match="score"):
            deferral_curve(*columns[:place], np.array(wrong), *columns[place + 1 :])


@pytest.mark.parametrize("statistic", [aurc, augrc, lambda errors, _: errors.mean()])
def test_the_bootstrap_agrees_with_scipy(statistic: Callable[..., float]) -> None:
    random = np.random.default_rng(0)
    confidence = random.random(200)
    columns = (random.random(200) > confidence).astype(float), confidence
    expected = bootstrap(
        columns, statistic, paired=True, vectorized=False, n_resamples=1000, method="percentile", rng=1
    ).confidence_interval
    assert bootstrap_interval(statistic, *columns) == pytest.approx((expected.low, expected.high), rel=0.05)


def test_the_bootstrap_interval_of_a_curve_covers_the_truth_at_each_point() -> None:
    random = np.random.default_rng(0)
    fractions = np.linspace(0, 1, 11)
    # the student is wrong with probability u / 2, the teacher never
    truth = 0.75 + (1 - (1 - fractions) ** 2) / 4
    covered = []
    for seed in range(120):
        uncertainty = random.random(150)
        student = (random.random(150) > uncertainty / 2).astype(float)
        curve = partial(deferral_curve, fractions=fractions)
        low, high = bootstrap_interval(curve, uncertainty, student, np.ones(150), resamples=200, seed=seed)
        covered.append((low <= truth) & (truth <= high))
    np.testing.assert_allclose(np.mean(covered, axis=0)[:8], 0.95, atol=0.06)  # few errors remain at higher fractions


def test_the_bootstrap_is_reproducible_and_rejects_columns_of_different_lengths() -> None:
    columns = student_and_teacher(50)
    for one, other in zip(
        bootstrap_interval(deferral_curve, *columns, resamples=20, seed=3),
        bootstrap_interval(deferral_curve, *columns, resamples=20, seed=3),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    for bad in ((np.zeros(0),), (np.zeros(2), np.zeros(3)), ()):
        with pytest.raises(ValueError, match="same number of samples"):
            bootstrap_interval(np.mean, *bad)
