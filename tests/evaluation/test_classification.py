"""Classification metrics compared with scikit-learn, torchmetrics, a plain ECE and a case computed by hand."""

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torchmetrics.classification import MulticlassF1Score

from distill.evaluation.classification import classification_metrics, majority_baseline
from distill.task.labels import LabelSpace

LABELS = LabelSpace()


def random_case(seed: int, names: tuple[str, ...], size: int = 200) -> tuple[list[str], np.ndarray]:
    random = np.random.default_rng(seed)
    return random.choice(names, size).tolist(), random.dirichlet([0.7] * 3, size)


def plain_ece(correct: np.ndarray, confidence: np.ndarray, bins: int = 15) -> float:
    error = 0.0
    for i in range(bins):
        in_bin = (confidence > i / bins) & (confidence <= (i + 1) / bins)
        if in_bin.any():
            error += in_bin.mean() * abs(correct[in_bin].mean() - confidence[in_bin].mean())
    return error


@pytest.mark.parametrize("names", [LABELS.names, ("negative", "positive")])
def test_metrics_equal_those_of_the_libraries(names: tuple[str, ...]) -> None:
    gold, probabilities = random_case(3, names)
    if len(names) == 2:  # `neutral` never occurs, neither as gold nor as prediction
        probabilities[:, 1] = 0
        probabilities /= probabilities.sum(axis=1, keepdims=True)
    measured = classification_metrics(gold, probabilities, LABELS)
    predicted = [LABELS.names[i] for i in probabilities.argmax(axis=1)]
    correct = np.array(predicted) == np.array(gold)
    assert measured["n"] == 200
    assert measured["accuracy"] == pytest.approx(correct.mean())
    assert measured["weighted_f1"] == pytest.approx(sk.f1_score(gold, predicted, average="weighted"))
    index = {name: i for i, name in enumerate(LABELS.names)}
    macro = MulticlassF1Score(num_classes=3, average="macro")(
        torch.tensor([index[p] for p in predicted]), torch.tensor([index[g] for g in gold])
    )
    assert measured["macro_f1"] == pytest.approx(float(macro), abs=1e-6)
    assert measured["confusion"] == sk.confusion_matrix(gold, predicted, labels=list(LABELS.names)).tolist()
    assert np.shape(measured["confusion"]) == (3, 3)
    assert measured["ece"] == pytest.approx(plain_ece(correct, probabilities.max(axis=1)), abs=1e-6)


def test_a_case_computed_by_hand() -> None:
    probabilities = np.array([[0.8, 0.1, 0.1], [0.1, 0.6, 0.3], [0.0, 0.3, 0.7], [0.2, 0.5, 0.3]])
    measured = classification_metrics(["negative", "neutral", "negative", "neutral"], probabilities, LABELS)
    assert measured["confusion"] == [[1, 0, 1], [0, 2, 0], [0, 0, 0]]  # rows gold, columns predicted
    assert measured["accuracy"] == 0.75
    assert measured["macro_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert measured["weighted_f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert measured["ece"] == pytest.approx((0.2 + 0.4 + 0.7 + 0.5) / 4)  # each sample is in its own bin
    assert measured["aurc"] == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_probabilities_slightly_above_one_are_not_treated_as_logits() -> None:
    sure = np.array([[1.0 + 2e-16, 0.0, 0.0], [0.0, 1.0000001, 0.0]])
    measured = classification_metrics(["negative", "neutral"], sure, LABELS)
    assert measured["ece"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("gold", "probabilities", "message"),
    [
        ([], np.zeros((0, 3)), "no samples"),
        (["angry"], np.array([[1.0, 0, 0]]), "angry"),
        (["neutral"], np.array([[0.5, 0.5]]), r"\(1, 2\)"),
        (["neutral"], np.array([[2.0, 1.0, -3.0]]), "sum to 1"),
        (["neutral"], np.array([[np.nan, 0.5, 0.5]]), "sum to 1"),
    ],
)
def test_invalid_inputs_are_rejected(gold: list[str], probabilities: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classification_metrics(gold, probabilities, LABELS)


def test_the_majority_label_comes_from_train_and_is_evaluated_on_test() -> None:
    train = ["neutral"] * 3 + ["positive"] * 2
    measured = majority_baseline(train, ["positive", "positive", "neutral", "negative"], LABELS)
    assert measured["label"] == "neutral"
    assert (measured["n"], measured["accuracy"]) == (4, 0.25)
    assert measured["macro_f1"] == pytest.approx((2 / 5) / 3)
    assert measured["confusion"] == [[0, 1, 0], [0, 1, 0], [0, 2, 0]]
    assert not {"ece", "aurc"} & set(measured)
    tied = majority_baseline(["positive", "negative"], ["positive"], LABELS)
    assert tied["label"] == "negative"
    with pytest.raises(ValueError, match="no samples"):
        majority_baseline([], ["positive"], LABELS)
