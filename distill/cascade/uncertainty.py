"""Uncertainty measures, temperature scaling and error probabilities. Pure functions over arrays."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import entr, logsumexp, softmax
from sklearn.isotonic import IsotonicRegression

Measure = Literal["entropy", "max_probability", "margin"]
Signal = Literal["entropy", "max_probability", "margin", "error"]
"""What answers are ranked by: a measure, or the error probability that `fit_error_map` gives for the entropy."""
Knots = tuple[Sequence[float], Sequence[float]]
"""Uncertainties and error probabilities, the knots of `fit_error_map`."""
TEMPERATURES = (0.05, 20.0)
"""Smallest and largest temperature of `fit_temperature`."""


def uncertainty(probabilities: np.ndarray, measure: Measure = "entropy") -> np.ndarray:
    """Uncertainty of B answers in [0, 1]: 0 if one label has all the probability, 1 if all labels are equally likely.

    Args:
        probabilities: [B, K]; rows sum to 1.
        measure: entropy is H(p) / ln K (U-ACS, arXiv 2509.04459); max_probability is (1 - p1) K / (K - 1) and margin
            is 1 - (p1 - p2), with p1 and p2 the two highest probabilities.

    Returns:
        [B].

    Raises:
        ValueError: the measure is unknown, or a row is not a probability distribution.
    """
    probabilities = _checked(probabilities)
    labels = probabilities.shape[1]
    second, first = np.partition(probabilities, (-2, -1), axis=1)[:, -2:].T
    if measure == "entropy":
        found = entr(probabilities).sum(axis=1) / np.log(labels)
    elif measure == "max_probability":
        found = (1 - first) * labels / (labels - 1)
    elif measure == "margin":
        found = 1 - (first - second)
    else:
        raise ValueError(f"unknown measure {measure!r}; it takes entropy, max_probability or margin")
    return found.clip(0.0, 1.0)


def temper(probabilities: np.ndarray, temperature: float | np.ndarray) -> np.ndarray:
    """Probabilities [B, K] at another temperature: softmax(log p / T). Zeros stay zero.

    Args:
        temperature: of all rows, or [B].

    Raises:
        ValueError: a temperature is not a positive number, or a row is not a probability distribution.
    """
    temperatures = np.asarray(temperature, dtype=np.float64)
    if not ((temperatures > 0) & (temperatures < np.inf)).all():
        raise ValueError(f"temperature is {temperature}; it takes a positive number")
    with np.errstate(divide="ignore"):
        return softmax(np.log(_checked(probabilities)) / temperatures.reshape(-1, 1), axis=1)


def fit_temperature(probabilities: np.ndarray, gold: np.ndarray) -> float:
    """Return the temperature with the least negative log-likelihood of the gold labels (Guo et al., arXiv 1706.04599).

    The result lies within `TEMPERATURES`: the optimum is infinite if answers are no better than chance. If every answer
    is right, or all temperatures are equally good, the result is 1: without an error the likelihood grows up to a
    temperature of 0, at which every uncertainty is 0. Probabilities are clipped to at least 1e-12, so that one gold
    label with probability 0 does not dominate the loss.

    Args:
        probabilities: [B, K]; rows sum to 1.
        gold: [B] indices of the gold labels.

    Raises:
        ValueError: no samples, an index that is not a label, or a row that is not a probability distribution.
    """
    probabilities, gold = _checked(probabilities), np.asarray(gold)
    if gold.shape != probabilities.shape[:1] or not len(gold):
        raise ValueError(f"gold {gold.shape} needs one label per row of probabilities {probabilities.shape}")
    if not np.issubdtype(gold.dtype, np.integer) or not ((gold >= 0) & (gold < probabilities.shape[1])).all():
        raise ValueError(f"gold must be indices from 0 to {probabilities.shape[1] - 1}")
    logits = np.log(probabilities.clip(1e-12))
    right = logits[np.arange(len(gold)), gold]
    if (right == logits.max(axis=1)).all():
        return 1.0

    def loss(temperature: float) -> float:
        return float(np.mean(logsumexp(logits / temperature, axis=1) - right / temperature))

    # the loss is convex in 1 / T, so it is unimodal in log T
    bounds = tuple(np.log(TEMPERATURES))
    found = minimize_scalar(lambda log: loss(np.exp(log)), bounds=bounds, method="bounded", options={"xatol": 1e-6})
    # the bounded search never reaches the limits; 1 comes first, so it is chosen if all temperatures are equally good
    return min((1.0, *TEMPERATURES, float(np.exp(found.x))), key=loss)


def fit_error_map(uncertainty: np.ndarray, errors: np.ndarray) -> tuple[list[float], list[float]]:
    """Fit a map from uncertainty to error probability by isotonic regression (Zadrozny & Elkan, KDD 2002).

    Args:
        uncertainty: [n], on any scale.
        errors: [n] 0 or 1.

    Returns:
        The knots of a non-decreasing, piecewise linear function: uncertainties and error probabilities.

    Raises:
        ValueError: no samples, different shapes, an error that is not 0 or 1, or an uncertainty that is not finite.
    """
    uncertainty, errors = np.asarray(uncertainty, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    if uncertainty.ndim != 1 or uncertainty.shape != errors.shape or not len(errors):
        raise ValueError(f"uncertainty {uncertainty.shape} and errors {errors.shape} need one value per sample")
    if not np.isfinite(uncertainty).all() or not np.isin(errors, (0, 1)).all():
        raise ValueError("uncertainty must be finite and errors 0 or 1")
    fitted = IsotonicRegression(y_min=0.0, y_max=1.0).fit(uncertainty, errors)
    return fitted.X_thresholds_.tolist(), fitted.y_thresholds_.tolist()


def error_probability(uncertainty: np.ndarray, knots: Knots) -> np.ndarray:
    """Error probability at each uncertainty [B], interpolated between the knots of `fit_error_map`."""
    return np.interp(uncertainty, *knots)


def _checked(probabilities: np.ndarray) -> np.ndarray:
    """Validate probabilities [B, K] and return them in float64 with rows normalised to sum to 1."""
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if probabilities.ndim != 2 or probabilities.shape[1] < 2:
        raise ValueError(f"probabilities {probabilities.shape} need one row per sample and at least two labels")
    sums = probabilities.sum(axis=1, keepdims=True)
    if not ((probabilities >= 0).all() and (np.abs(sums - 1) < 1e-3).all()):
        raise ValueError("every row of probabilities must be non-negative and sum to 1")
    return probabilities / sums
