"""Label spaces: order, polarity, and what counts as a label in an answer."""

import pytest

from distill.task.labels import LabelSpace


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
def test_polarity_spreads_evenly_unless_given(names: list[str], polarity: tuple[int, ...]) -> None:
    assert LabelSpace.from_names(names).polarity == polarity
    assert LabelSpace.from_names(names, [0] * len(names)).polarity == (0,) * len(names)


@pytest.mark.parametrize(
    "text", ["positive", "Positive", ' "positive".', "**POSITIVE**", "`positive`,", "{positive}", "'positive'\n"]
)
def test_a_label_is_found_whatever_its_wrapping(text: str) -> None:
    assert LabelSpace().find(text) == "positive"


@pytest.mark.parametrize("text", ["", "positively", "positive or negative", "not positive", "pos itive", "positive!?"])
def test_anything_else_is_no_label(text: str) -> None:
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
        (("Good", "good"), (0, 1), "one label twice"),
        (("good", "good."), (0, 1), "one label twice"),
        (("good", " "), (0, 1), "letter or digit"),
        (("good", "b\nad"), (0, 1), "one line"),
        (("good", "bad"), (1,), "for each label"),
        (("good", "bad"), (1, 2), "one of -1, 0, 1"),
    ],
)
def test_an_impossible_space_is_refused(names: tuple[str, ...], polarity: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelSpace(names, polarity)
