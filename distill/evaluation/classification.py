"""Classification metrics of a role, from gold labels and label probabilities."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from distill.evaluation.selective import aurc, reliability
from distill.task.labels import LabelSpace

ECE_BINS = 15


def classification_metrics(gold: Sequence[str], probabilities: np.ndarray, labels: LabelSpace) -> dict[str, Any]:
    """Classification metrics of one role on B samples.

    Args:
        gold: B names of the label space.
        probabilities: [B, K], rows sum to 1.

    Returns:
        `n`; `accuracy`, `weighted_f1`, `macro_f1` in [0, 1], the macro mean over labels that occur as gold or as
        prediction; `confusion`, K rows of K counts, rows gold, columns predicted; `ece` over 15 equal bins (Guo et
        al., arXiv 1706.04599) and `aurc`, both of the highest probability.

    Raises:
        ValueError: no samples, an unknown gold label, a wrong shape, or rows that are not probabilities.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    truth = _indices(gold, labels)
    if probabilities.shape != (len(truth), len(labels)):
        raise ValueError(f"probabilities have shape {probabilities.shape}, expected {(len(truth), len(labels))}")
    sums = probabilities.sum(axis=1)
    if not (np.isfinite(sums).all() and (probabilities >= -1e-6).all() and (np.abs(sums - 1) < 1e-3).all()):
        raise ValueError("every row of probabilities must be non-negative and sum to 1")
    predicted = probabilities.argmax(axis=1)
    return {
        **_label_metrics(truth, predicted, len(labels)),
        "ece": calibration_error(probabilities, truth),
        "aurc": aurc(predicted != truth, probabilities.max(axis=1)),
    }


def calibration_error(probabilities: np.ndarray, truth: np.ndarray, bins: int = ECE_BINS) -> float:
    """Expected calibration error of the highest probability over equal bins (Guo et al., arXiv 1706.04599).

    Args:
        probabilities: [B, K], in [0, 1].
        truth: [B] indices of the gold labels.
        bins: number of bins; the last one contains a confidence of 1.
    """
    diagram = reliability(probabilities, truth, bins)
    rows = zip(diagram["count"], diagram["accuracy"], diagram["confidence"], strict=True)
    return sum(n * abs(accuracy - confidence) for n, accuracy, confidence in rows if n) / len(truth)


def majority_baseline(train_gold: Sequence[str], test_gold: Sequence[str], labels: LabelSpace) -> dict[str, Any]:
    """Test metrics of a baseline that always predicts the most frequent training label.

    Returns:
        `label` (on ties the first in the label space), `n`, `accuracy`, `weighted_f1`, `macro_f1` and `confusion` as
        in `classification_metrics`. There is no confidence and therefore neither `ece` nor `aurc`.

    Raises:
        ValueError: an empty split or an unknown label.
    """
    counts = Counter(_indices(train_gold, labels).tolist())
    majority = max(range(len(labels)), key=lambda index: counts[index])
    truth = _indices(test_gold, labels)
    return {"label": labels.names[majority], **_label_metrics(truth, np.full_like(truth, majority), len(labels))}


def _label_metrics(truth: np.ndarray, predicted: np.ndarray, size: int) -> dict[str, Any]:
    return {
        "n": len(truth),
        "accuracy": float(accuracy_score(truth, predicted)),
        "weighted_f1": float(f1_score(truth, predicted, average="weighted", zero_division=0.0)),
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0.0)),
        "confusion": confusion_matrix(truth, predicted, labels=range(size)).tolist(),
    }


def _indices(gold: Sequence[str], labels: LabelSpace) -> np.ndarray:
    """[B] indices into the label space."""
    if not len(gold):
        raise ValueError("there are no samples to evaluate")
    return np.array([labels.index(name) for name in gold], dtype=np.int64)
