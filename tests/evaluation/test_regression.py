"""Regression metrics compared with scikit-learn, torchmetrics and cases computed by hand."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, mean_absolute_error
from torchmetrics.functional import pearson_corrcoef

from distill.evaluation.regression import regression_metrics, trivial_baseline
from distill.task.labels import Scale

SCALE = Scale()


def test_metrics_equal_those_of_the_libraries() -> None:
    random = np.random.default_rng(5)
    gold = random.integers(-15, 16, 300) / 5
    predicted = (gold + random.normal(0, 1.2, 300)).clip(-3, 3)
    found = regression_metrics(gold, predicted, SCALE)
    assert found["mae"] == pytest.approx(mean_absolute_error(gold, predicted))
    assert found["correlation"] == pytest.approx(float(pearson_corrcoef(torch.tensor(predicted), torch.tensor(gold))))
    kept = [(g, p) for g, p in zip(gold, predicted, strict=True) if g != 0]
    assert 0 < len(kept) < 300
    conventions = {
        "with_zero": ([g >= 0 for g in gold], [p >= 0 for p in predicted]),
        "without_zero": ([g > 0 for g, _ in kept], [p > 0 for _, p in kept]),
    }
    for name, (truth, answer) in conventions.items():
        assert found[f"acc2_{name}"] == pytest.approx(np.mean([t == a for t, a in zip(truth, answer, strict=True)]))
        assert found[f"f1_{name}"] == pytest.approx(f1_score(truth, answer, average="weighted"))
    assert found["acc2_with_zero"] != found["acc2_without_zero"]


def test_a_case_computed_by_hand() -> None:
    gold, predicted = [0.0, 0.5, -2.6, 2.4, -0.2], [-0.1, 1.4, -2.9, 1.6, 0.3]
    found = regression_metrics(gold, predicted, SCALE)
    assert found["mae"] == pytest.approx((0.1 + 0.9 + 0.3 + 0.8 + 0.5) / 5)
    # rounded: gold 0 0 -3 2 0, predicted 0 1 -3 2 0; both clipped to [-2, 2] first: -2.6 and -2.9 become -2
    assert found["acc7"] == pytest.approx(4 / 5)
    assert found["acc5"] == pytest.approx(4 / 5)
    assert found["acc3"] == pytest.approx(4 / 5)
    assert found["acc2_with_zero"] == pytest.approx(3 / 5)  # gold + + - + -, predicted - + - + +
    assert found["acc2_without_zero"] == pytest.approx(3 / 4)  # gold + - + -, predicted + - + +
    assert found["f1_without_zero"] == pytest.approx((2 * (4 / 5) + 2 * (2 / 3)) / 4)


def test_halves_round_to_even_on_both_sides() -> None:
    found = regression_metrics([0.5, 1.5, 2.5, -0.5], [0.0, 2.0, 2.0, 0.0], SCALE)
    assert found["acc7"] == 1.0
    assert regression_metrics([2.5], [3.0], SCALE)["acc7"] == 0.0  # 2.5 rounds to 2
    assert regression_metrics([2.5], [3.0], SCALE)["acc5"] == 1.0


def test_constant_predictions_have_no_correlation_and_cause_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for gold, predicted in [([1.0, -2.0, 0.2], [0.2] * 3), ([1.0, 1.0], [0.3, 0.4]), ([1.0], [2.0])]:
            found = regression_metrics(gold, predicted, SCALE)
            assert found["correlation"] is None
            assert json.loads(json.dumps(found, allow_nan=False)) == found
        found = regression_metrics([1.0, 2.0], [0.5, np.nextafter(0.5, 1)], SCALE)
        assert found["correlation"] is None or math.isfinite(found["correlation"])


def test_metrics_without_zero_are_none_if_all_gold_values_are_zero() -> None:
    found = regression_metrics([0.0, 0.0], [0.5, -0.5], SCALE)
    assert (found["acc2_without_zero"], found["f1_without_zero"]) == (None, None)
    assert found["acc2_with_zero"] == 0.5


def test_other_scales_have_fewer_metrics() -> None:
    assert set(regression_metrics([0.2], [0.4], Scale(low=0, high=1))) == {"mae", "correlation"}
    polarity = {"mae", "correlation", "acc2_with_zero", "f1_with_zero", "acc2_without_zero", "f1_without_zero"}
    assert set(regression_metrics([0.2], [0.4], Scale(low=-2, high=2))) == polarity
    assert set(regression_metrics([0.2], [0.4], Scale(bins=13))) == {*polarity, "acc7", "acc5", "acc3"}
    small = set(regression_metrics([0.2], [0.4], Scale(low=-1, high=1)))
    assert small == {*polarity, "acc5", "acc3", "acc2_positive", "f1_positive"}


def test_the_classes_of_mosi_equal_those_of_integer_rounding() -> None:
    """Acc-3, Acc-5 and Acc-7 of MMSA for CMU-MOSI: the rounded value, cut to the classes."""
    random = np.random.default_rng(2)
    gold, predicted = random.integers(-15, 16, 400) / 5, random.normal(0, 2, 400)
    found = regression_metrics(gold, predicted, SCALE)
    for name, end in (("acc7", 3), ("acc5", 2), ("acc3", 1)):
        # Python's round is to even, too, and cutting after rounding is the same for whole ends
        classes = [[max(-end, min(end, round(float(v)))) for v in values] for values in (gold, predicted)]
        assert found[name] == pytest.approx(np.mean([a == b for a, b in zip(*classes, strict=True)]))


def test_the_classes_of_ch_sims_contain_their_upper_ends() -> None:
    """MMSA for CH-SIMS: [-1, -0.7], (-0.7, -0.1], (-0.1, 0.1], (0.1, 0.7], (0.7, 1], and two or three of them."""
    random = np.random.default_rng(3)
    gold, predicted = random.integers(-10, 11, 500) / 10, random.integers(-12, 13, 500) / 10
    found = regression_metrics(gold, predicted, Scale(low=-1, high=1, bins=5))
    for name, uppers in (("acc5", (-0.7, -0.1, 0.1, 0.7)), ("acc3", (-0.1, 0.1)), ("acc2_positive", (0.0,))):
        classes = [[sum(v > upper for upper in uppers) for v in values] for values in (gold, predicted)]
        assert found[name] == pytest.approx(np.mean([a == b for a, b in zip(*classes, strict=True)]))
    assert found["f1_positive"] == pytest.approx(f1_score(gold > 0, predicted > 0, average="weighted"))
    edge = regression_metrics([-0.7, 0.1, 0.0], [-0.8, 0.0, -0.3], Scale(low=-1, high=1))
    assert (edge["acc5"], edge["acc3"], edge["acc2_positive"]) == (2 / 3, 2 / 3, 2 / 3)
    trivial = trivial_baseline([0.2, 0.4, -0.6], [0.5, -0.5], Scale(low=-1, high=1))
    assert trivial["acc2_positive"] == 0.5, "the most frequent polarity of the training values"


def test_the_dead_zone_of_the_scale_does_not_change_the_metrics() -> None:
    gold, predicted = [0.2, -0.4, 2.0], [0.1, -0.1, 0.3]
    assert regression_metrics(gold, predicted, Scale(dead_zone=0.5)) == regression_metrics(gold, predicted, SCALE)


@pytest.mark.parametrize(
    ("gold", "predicted", "message"),
    [
        ([], [], "one value for each sample"),
        ([1.0], [1.0, 2.0], "one value for each sample"),
        ([1.0], [math.nan], "finite"),
        ([math.inf], [1.0], "finite"),
    ],
)
def test_invalid_inputs_are_rejected(gold: list[float], predicted: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        regression_metrics(gold, predicted, SCALE)


def test_the_trivial_baseline_predicts_the_training_mean_and_the_training_polarity() -> None:
    """The mean is positive but most training rows are not, so that the two baselines differ."""
    train, test = [-0.2, -0.4, -0.2, 3.0, 0.0], [1.0, -1.0, -0.6, 0.0]
    found = trivial_baseline(train, test, SCALE)
    assert found["value"] == pytest.approx(0.44)
    assert found["mae"] == pytest.approx((0.56 + 1.44 + 1.04 + 0.44) / 4)
    assert found["correlation"] is None
    assert found["acc7"] == 0.25  # every prediction rounds to 0
    assert found["acc2_with_zero"] == 0.5  # three of five training rows are negative: negative
    assert found["acc2_without_zero"] == pytest.approx(2 / 3)
    assert found["f1_without_zero"] == pytest.approx(f1_score([1, 0, 0], [0, 0, 0], average="weighted"))
    tied = trivial_baseline([1.0, -1.0], [1.0, 1.0, -1.0], SCALE)
    assert tied["acc2_with_zero"] == tied["acc2_without_zero"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no training values"):
        trivial_baseline([], [1.0], SCALE)
