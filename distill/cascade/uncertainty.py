"""How sure a model is, from its label probabilities, and how far that can be believed. Pure functions over arrays."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import entr, logsumexp, softmax
from sklearn.isotonic import IsotonicRegression

Measure = Literal["entropy", "max_probability", "margin"]
TEMPERATURES = (0.05, 20.0)


def uncertainty(probabilities: np.ndarray, measure: Measure = "entropy") -> np.ndarray:
    """How unsure B answers are, in [0, 1]: 0 where one label has everything, 1 where all are equally likely.

    Args:
        probabilities: [B, K], rows sum to 1.
        measure: entropy is H(p) / ln K (U-ACS, arXiv 2509.04459); max_probability is (1 - p1) K / (K - 1) and margin
            is 1 - (p1 - p2), with p1 and p2 the two highest probabilities.

    Returns:
        [B].

    Raises:
        ValueError: an unknown measure, or rows that are not probabilities.
    """
    probabilities = _checked(probabilities)
    labels = probabilities.shape[1]
    second, first = np.partition(probabilities, (-2, -1), axis=1)[:, -2:].T
    if measure == "entropy":
        doubt = entr(probabilities).sum(axis=1) / np.log(labels)
    elif measure == "max_probability":
        doubt = (1 - first) * labels / (labels - 1)
    elif measure == "margin":
        doubt = 1 - (first - second)
    else:
        raise ValueError(f"unknown measure {measure!r}; it takes entropy, max_probability or margin")
    return doubt.clip(0.0, 1.0)


def temper(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities [B, K] at another temperature: softmax(log p / T). What is impossible, p = 0, stays so.

    Raises:
        ValueError: a temperature that is not a positive number, or rows that are not probabilities.
    """
    if not 0 < temperature < np.inf:
        raise ValueError(f"temperature is {temperature}; it takes a positive number")
    with np.errstate(divide="ignore"):
        return softmax(np.log(_checked(probabilities)) / temperature, axis=1)


def fit_temperature(probabilities: np.ndarray, gold: np.ndarray) -> float:
    """The temperature that makes the gold labels likeliest (temperature scaling; Guo et al., arXiv 1706.04599).

    It stays within `TEMPERATURES`: where every answer is right the best temperature would be 0, and where answers are
    no better than chance it would be infinite. Where none is better than another it is 1. A probability below 1e-12
    counts as 1e-12, so that one gold label held impossible does not decide everything.

    Args:
        probabilities: [B, K], rows sum to 1.
        gold: [B] indices of the right labels.

    Raises:
        ValueError: no samples, indices that are not labels, or rows that are not probabilities.
    """
    probabilities, gold = _checked(probabilities), np.asarray(gold)
    if gold.shape != probabilities.shape[:1] or not len(gold):
        raise ValueError(f"gold {gold.shape} needs one label for each row of probabilities {probabilities.shape}")
    if not np.issubdtype(gold.dtype, np.integer) or not ((gold >= 0) & (gold < probabilities.shape[1])).all():
        raise ValueError(f"gold must be indices from 0 to {probabilities.shape[1] - 1}")
    logits = np.log(probabilities.clip(1e-12))
    right = logits[np.arange(len(gold)), gold]

    def loss(temperature: float) -> float:
        return float(np.mean(logsumexp(logits / temperature, axis=1) - right / temperature))

    # the loss is convex in 1 / T, so it has one valley in log T too
    bounds = tuple(np.log(TEMPERATURES))
    found = minimize_scalar(lambda log: loss(np.exp(log)), bounds=bounds, method="bounded", options={"xatol": 1e-6})
    # the search only approaches the limits; where all temperatures are as good, there is nothing to change
    return min((1.0, *TEMPERATURES, float(np.exp(found.x))), key=loss)


def fit_error_map(uncertainty: np.ndarray, errors: np.ndarray) -> tuple[list[float], list[float]]:
    """A map from uncertainty to the probability of an error: isotonic regression (Zadrozny & Elkan, KDD 2002).

    Args:
        uncertainty: [n], in any units.
        errors: [n] 0 or 1.

    Returns:
        The knots of a rising, piecewise linear function: uncertainties and error probabilities.

    Raises:
        ValueError: no samples, shapes that differ, errors that are not 0 or 1, or an uncertainty that is not finite.
    """
    uncertainty, errors = np.asarray(uncertainty, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    if uncertainty.ndim != 1 or uncertainty.shape != errors.shape or not len(errors):
        raise ValueError(f"uncertainty {uncertainty.shape} and errors {errors.shape} need one value for each sample")
    if not np.isfinite(uncertainty).all() or not np.isin(errors, (0, 1)).all():
        raise ValueError("uncertainty must be finite and errors 0 or 1")
    fitted = IsotonicRegression(y_min=0.0, y_max=1.0).fit(uncertainty, errors)
    return fitted.X_thresholds_.tolist(), fitted.y_thresholds_.tolist()


def error_probability(uncertainty: np.ndarray, knots: tuple[Sequence[float], Sequence[float]]) -> np.ndarray:
    """The probability of an error at each uncertainty [B], by the knots that `fit_error_map` found."""
    return np.interp(uncertainty, *knots)


def _checked(probabilities: np.ndarray) -> np.ndarray:
    """[B, K] in float64, each row scaled to sum to exactly 1."""
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if probabilities.ndim != 2 or probabilities.shape[1] < 2:
        raise ValueError(f"probabilities {probabilities.shape} need a row for each sample and two or more labels")
    sums = probabilities.sum(axis=1, keepdims=True)
    if not ((probabilities >= 0).all() and (np.abs(sums - 1) < 1e-3).all()):
        raise ValueError("every row of probabilities must be non-negative and sum to 1")
    return probabilities / sums
