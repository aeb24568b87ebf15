"""Uncertainty measures, temperature scaling and error maps, against their definitions and scikit-learn."""

import json
import math
from typing import get_args

import numpy as np
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.isotonic import IsotonicRegression

from distill.cascade.uncertainty import (
    TEMPERATURES,
    Measure,
    error_probability,
    fit_error_map,
    fit_temperature,
    temper,
    uncertainty,
)

MEASURES = get_args(Measure)


def sampled(labels: int, n: int = 500, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [n, labels], and gold labels sampled from them."""
    random = np.random.default_rng(seed)
    probabilities = random.dirichlet(np.full(labels, 0.7), n)
    return probabilities, np.array([random.choice(labels, p=row) for row in probabilities])


def by_definition(row: list[float], measure: str) -> float:
    first, second = sorted(row, reverse=True)[:2]
    return {
        "entropy": -sum(p * math.log(p) for p in row if p > 0) / math.log(len(row)),
        "max_probability": (1 - first) / (1 - 1 / len(row)),
        "margin": 1 - (first - second),
    }[measure]


@pytest.mark.parametrize("labels", [2, 5])
@pytest.mark.parametrize("measure", MEASURES)
def test_each_measure_equals_its_definition_and_spans_zero_to_one(labels: int, measure: Measure) -> None:
    probabilities = np.vstack([sampled(labels)[0], np.eye(labels), np.full((1, labels), 1 / labels)])
    found = uncertainty(probabilities, measure)
    np.testing.assert_allclose(found, [by_definition(row, measure) for row in probabilities.tolist()], atol=1e-12)
    assert found.min() == 0 and found.max() == pytest.approx(1) and found.max() <= 1


def test_with_two_labels_margin_and_max_probability_are_the_same() -> None:
    probabilities, _ = sampled(2)
    np.testing.assert_allclose(uncertainty(probabilities, "margin"), uncertainty(probabilities, "max_probability"))


def test_the_order_of_the_labels_does_not_matter() -> None:
    probabilities, _ = sampled(5)
    for measure in MEASURES:
        np.testing.assert_allclose(
            uncertainty(probabilities, measure), uncertainty(probabilities[:, ::-1], measure), atol=1e-12
        )


def test_no_samples_have_no_uncertainties() -> None:
    assert uncertainty(np.zeros((0, 3))).shape == (0,)


def test_tempering_is_a_softmax_of_scaled_logits_and_keeps_the_label() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 4)) * 3

    def softmax(values: np.ndarray) -> np.ndarray:
        return np.exp(values) / np.exp(values).sum(axis=1, keepdims=True)

    for temperature in (0.3, 1.0, 4.0):
        np.testing.assert_allclose(temper(softmax(logits), temperature), softmax(logits / temperature), atol=1e-12)
    assert (temper(softmax(logits), 7.0).argmax(1) == logits.argmax(1)).all()


@pytest.mark.parametrize("temperature", [1e-3, 0.05, 1.0, 20.0, 1e6])
def test_probability_zero_stays_zero_at_any_temperature(temperature: float) -> None:
    tempered = temper(np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1e-300, 1 - 1e-300, 0.0]]), temperature)
    assert np.isfinite(tempered).all()
    np.testing.assert_allclose(tempered.sum(axis=1), 1)
    assert (tempered[:, 2] == 0).all()


@pytest.mark.parametrize("temperature", [0, -1, float("nan"), float("inf")])
def test_temperatures_must_be_positive_numbers(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        temper(np.array([[0.5, 0.5]]), temperature)


class Logits(ClassifierMixin, BaseEstimator):
    """A classifier whose logits are its input, for scikit-learn's own temperature scaling."""

    def __init__(self, labels: int = 2) -> None:
        self.labels = labels
        self.classes_ = np.arange(labels)

    def fit(self, *_: np.ndarray) -> "Logits":
        return self

    def decision_function(self, logits: np.ndarray) -> np.ndarray:
        return logits

    def predict(self, logits: np.ndarray) -> np.ndarray:
        return logits.argmax(axis=1)


@pytest.mark.parametrize("distortion", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("labels", [3, 5])
def test_the_fitted_temperature_equals_scikit_learns(labels: int, distortion: float) -> None:
    probabilities, gold = sampled(labels)
    distorted = temper(probabilities, distortion)
    reference = CalibratedClassifierCV(FrozenEstimator(Logits(labels)), method="temperature", ensemble=False)
    reference.fit(np.log(distorted.clip(1e-12)), gold)
    expected = 1 / reference.calibrated_classifiers_[0].calibrators[0].beta_
    assert fit_temperature(distorted, gold) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("labels", [2, 5])
def test_the_fit_inverts_a_distortion_of_calibrated_probabilities(labels: int) -> None:
    probabilities, gold = sampled(labels, n=8000)
    assert fit_temperature(temper(probabilities, 0.5), gold) == pytest.approx(2.0, rel=0.1)


def test_degenerate_fits_end_at_the_limits() -> None:
    gold = np.array([0, 1, 2] * 20)
    nearly = np.eye(3)[gold] * 0.4 + 0.2
    assert fit_temperature(np.eye(3)[gold], gold) == 1  # always right, always certain
    assert fit_temperature(nearly, gold) == 1  # always right, never certain
    assert fit_temperature(nearly, np.append(gold[:-1], 0)) < 1  # right but once
    assert fit_temperature(np.eye(3)[(gold + 1) % 3], gold) == TEMPERATURES[1]  # always wrong, always certain
    assert fit_temperature(np.full((60, 3), 1 / 3), gold) == 1  # no temperature changes anything
    assert fit_temperature(np.array([[0.3, 0.7]]), np.array([0])) == TEMPERATURES[1]
    assert TEMPERATURES[0] <= fit_temperature(sampled(3, 60)[0], np.zeros(60, dtype=int)) <= TEMPERATURES[1]


def test_one_gold_label_with_probability_0_does_not_dominate_the_fit() -> None:
    probabilities, gold = sampled(3)
    clean = fit_temperature(probabilities, gold)
    probabilities[0], gold[0] = [1, 0, 0], 2
    assert clean <= fit_temperature(probabilities, gold) < 2 * clean


def test_the_error_map_is_isotonic_regression_and_round_trips_through_json() -> None:
    random = np.random.default_rng(0)
    uncertainties = random.integers(0, 40, 300) / 40
    errors = random.random(300) < uncertainties**2
    knots = json.loads(json.dumps(fit_error_map(uncertainties, errors)))
    points = np.linspace(-0.5, 1.5, 101)
    reference = IsotonicRegression(out_of_bounds="clip").fit(uncertainties, errors)
    np.testing.assert_allclose(error_probability(points, knots), reference.predict(points), atol=1e-12)
    assert (np.diff(error_probability(points, knots)) >= -1e-12).all()


def test_an_error_map_of_one_uncertainty_is_the_error_rate() -> None:
    knots = fit_error_map(np.full(4, 0.3), np.array([0, 1, 0, 0]))
    np.testing.assert_allclose(error_probability(np.array([0.0, 0.3, 1.0]), knots), 0.25)


NOT_PROBABILITIES = [
    np.array([[0.5, float("nan")]]),
    np.array([[0.5, 0.6]]),
    np.array([[1.5, -0.5]]),
    np.array([0.5, 0.5]),
    np.array([[1.0]]),
    np.array([[0.0, 0.0]]),
]


@pytest.mark.parametrize("rows", NOT_PROBABILITIES)
def test_rows_that_are_not_probabilities_are_refused(rows: np.ndarray) -> None:
    for call in (uncertainty, lambda p: temper(p, 1.0), lambda p: fit_temperature(p, np.zeros(1, dtype=int))):
        with pytest.raises(ValueError, match="probabilities"):
            call(rows)


def test_an_unknown_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="entropy, max_probability or margin"):
        uncertainty(np.array([[0.5, 0.5]]), "variance")  # type: ignore[arg-type]


@pytest.mark.parametrize("gold", [[], [0], [0, 2], [0, -1], [0.0, 1.0], [[0, 1]]])
def test_gold_must_be_one_label_index_per_row(gold: list) -> None:
    with pytest.raises(ValueError, match="gold"):
        fit_temperature(np.array([[0.5, 0.5], [0.1, 0.9]]), np.array(gold))
    with pytest.raises(ValueError, match="gold"):
        fit_temperature(np.zeros((0, 2)), np.zeros(0, dtype=int))


@pytest.mark.parametrize(
    ("uncertainties", "errors"), [([], []), ([0.1], [0, 1]), ([0.1, float("nan")], [0, 1]), ([0.1, 0.2], [0, 0.5])]
)
def test_invalid_inputs_of_an_error_map_are_refused(uncertainties: list, errors: list) -> None:
    with pytest.raises(ValueError, match="uncertainty"):
        fit_error_map(np.array(uncertainties), np.array(errors))
