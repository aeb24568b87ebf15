"""Selective classification: what a model's risk becomes when it answers only what it is surest of. Pure functions."""

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
    errors, confidence = np.asarray(errors, dtype=np.float64), np.asarray(confidence, dtype=np.float64)
    if errors.ndim != 1 or errors.shape != confidence.shape or not len(errors):
        raise ValueError(f"errors {errors.shape} and confidence {confidence.shape} need one value for each sample")
    if not (np.isfinite(errors).all() and np.isfinite(confidence).all()):
        raise ValueError("errors and confidence must be finite")
    _, tie, size = np.unique(-confidence, return_inverse=True, return_counts=True)
    mean = np.bincount(tie, weights=errors) / size
    taken = np.arange(1, len(errors) + 1)
    return taken / len(errors), np.cumsum(np.repeat(mean, size)) / taken


def aurc(errors: np.ndarray, confidence: np.ndarray) -> float:
    """Area under the risk-coverage curve: the mean risk over the B coverages (Geifman et al., arXiv 1805.08206).

    Args and errors as for `risk_coverage`. 0 is perfect; a useless confidence gives the error rate.
    """
    return float(risk_coverage(errors, confidence)[1].mean())
