"""Label spaces: order, polarity, labels in answers, and scales."""

import math
from typing import Any

import numpy as np
import pytest

from distill.task.labels import LabelSpace, Scale, TaskSettings


def test_names_keep_their_order_and_find_their_index() -> None:
    labels = LabelSpace.from_names(["bad", "mixed", "fair", "good"])
    assert [labels.index(name) for name in labels.names] == [0, 1, 2, 3]
    assert len(labels) == 4
    with pytest.raises(ValueError, match=r"unknown label 'great'; the labels are bad, mixed, fair, good"):
        labels.index("great")
    with pytest.raises(ValueError, match="unknown label None"):
        labels.index(None)
    with pytest.raises(ValueError, match=r"unknown label 1\.0"):
        labels.index(1.0)


@pytest.mark.parametrize(
    ("names", "polarity"),
    [
        (["a", "b"], (-1, 1)),
        (["a", "b", "c"], (-1, 0, 1)),
        (["a", "b", "c", "d"], (-1, -1, 1, 1)),
        (["a", "b", "c", "d", "e"], (-1, -1, 0, 1, 1)),
    ],
)
def test_default_polarities_are_symmetric(names: list[str], polarity: tuple[int, ...]) -> None:
    assert LabelSpace.from_names(names).polarity == polarity
    assert LabelSpace.from_names(names, [0] * len(names)).polarity == (0,) * len(names)


@pytest.mark.parametrize(
    "text", ["positive", "Positive", ' "positive".', "**POSITIVE**", "`positive`,", "{positive}", "'positive'\n"]
)
def test_a_label_is_found_despite_case_quotes_and_punctuation(text: str) -> None:
    assert LabelSpace().find(text) == "positive"


@pytest.mark.parametrize("text", ["", "positively", "positive or negative", "not positive", "pos itive", "positive!?"])
def test_other_text_is_not_a_label(text: str) -> None:
    assert LabelSpace().find(text) is None


def test_labels_of_several_words_and_with_punctuation_are_found() -> None:
    labels = LabelSpace(("very good", "n.a.", "C++"), (1, 0, -1))
    assert [labels.find(text) for text in ("Very good.", '"n.a."', "**c++**", "very")] == [
        "very good",
        "n.a.",
        "C++",
        None,
    ]


@pytest.mark.parametrize(
    ("names", "polarity", "message"),
    [
        (("one",), (0,), "at least two"),
        (("Good", "good"), (0, 1), "a label twice"),
        (("good", "good."), (0, 1), "a label twice"),
        (("good", " "), (0, 1), "letter or digit"),
        (("good", "b\nad"), (0, 1), "no line break"),
        (("good", "bad"), (1,), "for each label"),
        (("good", "bad"), (1, 2), "one of -1, 0 and 1"),
    ],
)
def test_an_invalid_label_space_raises(names: tuple[str, ...], polarity: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelSpace(names, polarity)


# ---- scales ----


def test_a_value_belongs_to_the_bin_with_the_nearest_centre_or_the_lower_one_on_a_tie() -> None:
    labels = LabelSpace.from_scale(Scale())
    assert labels.names == ("-3", "-2", "-1", "0", "1", "2", "3")
    assert labels.polarity == (-1, -1, -1, 0, 1, 1, 1)
    values = [-3.0, -2.51, -2.5, 0.0, 0.49, 0.5, 0.51, 3.0]
    assert [labels.name(value) for value in values] == ["-3", "-3", "-3", "0", "0", "0", "1", "3"]
    assert labels.name("2") == "2" and labels.index(np.float64(1.9)) == 5
    for value in (3.01, -4.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"is outside the scale from -3 to 3"):
            labels.index(value)
    with pytest.raises(ValueError, match="unknown label 2;"):
        labels.index(2)  # values on the scale are floats


def test_bins_are_named_after_their_centres() -> None:
    assert LabelSpace.from_scale(Scale(low=-1, high=1, bins=5)).names == ("-1", "-0.5", "0", "0.5", "1")
    assert LabelSpace.from_scale(Scale(low=0, high=1, bins=4)).names == ("0", "0.333333", "0.666667", "1")


def test_targets_are_a_gaussian_over_the_bins() -> None:
    scale = Scale(low=-1, high=1, bins=5, spread=0.75)  # bins 0.5 wide, so σ = 0.375
    values = [-1.0, 0.1, 0.25]
    for row, value in zip(scale.targets(values), values, strict=True):
        weights = [math.exp(-(((centre - value) / 0.375) ** 2) / 2) for centre in (-1, -0.5, 0, 0.5, 1)]
        np.testing.assert_allclose(row, [weight / sum(weights) for weight in weights])
    np.testing.assert_array_equal(Scale(spread=0).targets([-2.4, 2.6]), np.eye(7)[[1, 6]])
    narrow = Scale(spread=0.01).targets([0.4])
    np.testing.assert_allclose(narrow, np.eye(7)[[3]], atol=1e-12)  # no division by zero


def test_the_expectation_is_the_mean_over_the_bins() -> None:
    scale = Scale()
    np.testing.assert_allclose(
        scale.expectation(np.array([[0, 0, 0, 0.5, 0.5, 0, 0], [1, 0, 0, 0, 0, 0, 0]])), [0.5, -3]
    )
    inside = np.linspace(-1.5, 1.5, 7)  # away from the ends, the mean of the targets is the value
    np.testing.assert_allclose(scale.expectation(scale.targets(inside.tolist())), inside, atol=0.05)


def test_polarity_is_the_sign_outside_the_dead_zone() -> None:
    values = np.array([-3, -0.5, -0.51, 0, 0.2, 0.5, 0.6])
    assert Scale(dead_zone=0.5).polarity(values).tolist() == [-1, 0, -1, 0, 0, 0, 1]
    assert Scale().polarity(values).tolist() == [-1, -1, -1, 0, 1, 1, 1]
    bins = np.eye(7)[[2, 4]] * 0.4 + np.eye(7)[3] * 0.6
    assert LabelSpace.from_scale(Scale(dead_zone=0.5)).polarities(bins).tolist() == [0, 0]
    assert LabelSpace.from_scale(Scale()).polarities(bins).tolist() == [-1, 1]
    assert LabelSpace().polarities(np.eye(3)).tolist() == [-1, 0, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low": 1.0, "high": 1.0}, "low is 1; it takes a number below high, 1"),
        ({"bins": 1}, "bins is 1; it takes 2 to 100"),
        ({"dead_zone": -0.1}, "dead_zone is -0.1; it takes 0 or more"),
        ({"spread": math.nan}, "spread is nan; it takes 0 to 1000"),
    ],
)
def test_an_invalid_scale_raises(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scale(**settings)


def test_a_label_next_to_the_end_of_a_scale_is_shown_with_all_digits() -> None:
    for value, shown in ((3.0000001, "3.0000001"), (math.nextafter(3, 4), "3.0000000000000004"), (7.0, "7")):
        with pytest.raises(ValueError, match=rf"^label {shown} is outside the scale from -3 to 3$"):
            Scale().bin(value)


def test_bins_can_be_named_with_one_name_each() -> None:
    assert LabelSpace.from_scale(Scale(bins=3), ["bad", "fair", "good"]).name(-2.0) == "bad"
    with pytest.raises(ValueError, match=r"one name for each of the 7 bins of task\.scale"):
        LabelSpace.from_scale(Scale(), ["bad", "fair", "good"])


def test_an_empty_list_of_labels_is_not_the_default() -> None:
    assert TaskSettings().label_space == LabelSpace()
    with pytest.raises(ValueError, match=r"task\.labels needs at least two names"):
        TaskSettings(labels=[]).label_space  # noqa: B018


def test_a_decision_is_the_most_probable_label_or_the_bin_of_the_expected_value() -> None:
    assert LabelSpace().decide(np.array([0.2, 0.5, 0.3])) == ("neutral", None)
    scale = LabelSpace.from_scale(Scale(-1, 1, 3))
    name, value = scale.decide(np.array([0.45, 0.0, 0.55]))
    assert name == "0" and value == pytest.approx(0.1)
    assert scale.decide(np.array([0.0, 0.0, 1.0 + 1e-9])) == ("1", 1.0)
