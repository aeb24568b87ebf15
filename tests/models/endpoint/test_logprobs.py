"""Label probabilities: from log-probabilities, for labels with a common prefix, and from agreeing answers."""

import math
from typing import Any

import numpy as np
import pytest

from distill.models.endpoint.logprobs import agreement, continued_probabilities, label_probabilities
from distill.task.labels import LabelSpace, Scale
from tests.models.openai_server import LABELS, token


def tops(*tokens: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    return [(t["token"], {o["token"]: o["logprob"] for o in t["top_logprobs"]}) for t in tokens]


# ---- label probabilities ----


def test_label_probabilities() -> None:
    tokens = tops(
        token('"Prediction'),
        token('":'),
        token(" "),
        token("pos", pos=0.6, **{" positive": 0.1, "Neg": 0.08, "ne": 0.05, "neu": 0.04, "The": 0.03}),
        token("itive"),
    )
    probabilities, mass = label_probabilities(tokens, LABELS)
    # "pos" and " positive" are prefixes of positive, "Neg" of negative, "neu" of neutral, "ne" of two labels.
    assert mass == pytest.approx(0.6 + 0.1 + 0.08 + 0.05 + 0.04)
    assert probabilities == pytest.approx(np.array([0.105, 0.065, 0.7]) / 0.87)


def test_label_probabilities_after_the_forced_prefix() -> None:
    # "positive" without the space is another token, and " pos" is not the first token of " positive"
    first = {" positive": 0.5, "positive": 0.2, " pos": 0.1, "\u0120neutral": 0.06, "\u2581neg": 0.02, " ": 0.01}
    found = continued_probabilities(tops(token("positive", **first)), LABELS)
    assert found is not None
    probabilities, mass = found
    assert mass == pytest.approx(0.58)
    assert probabilities == pytest.approx(np.array([0.02, 0.06, 0.5]) / 0.58)


@pytest.mark.parametrize("first", [{" positive": 0.5, " neutral": 0.2}, {" positive": 0.5, " ne": 0.3}])
def test_first_tokens_that_do_not_separate_the_labels_are_left_to_the_tokens_of_the_answer(first: Any) -> None:
    assert continued_probabilities(tops(token(" positive", **first)), LABELS) is None
    assert continued_probabilities([], LABELS) is None


def test_a_label_outside_the_top_k_gets_a_positive_upper_bound() -> None:
    # The least likely top-k token has 0.02 and 0.03 is left: the smaller one is the bound for neutral.
    probabilities, mass = label_probabilities(tops(token("positive", positive=0.9, negative=0.05, So=0.02)), LABELS)
    assert probabilities == pytest.approx(np.array([0.05, 0.02, 0.9]) / 0.97) and mass == pytest.approx(0.97)
    # Only 0.001 is left.
    probabilities, _ = label_probabilities(tops(token("positive", positive=0.9, negative=0.099)), LABELS)
    assert probabilities[1] == pytest.approx(0.001 / 1.0)
    # Nothing is left, but no probability is 0.
    probabilities, mass = label_probabilities(tops(token("positive", positive=1.0)), LABELS)
    assert (probabilities > 0).all() and probabilities.sum() == pytest.approx(1) and mass == pytest.approx(1)


@pytest.mark.parametrize("value", [-9999.0, float("-inf"), -1e308])
def test_a_generated_label_without_a_log_probability_gets_what_the_others_leave(value: float) -> None:
    alternatives: list[dict[str, float]] = [{}, {"negative": value}, {"negative": math.log(0.3)}]
    for others in alternatives:
        probabilities, mass = label_probabilities([("positive", {"positive": value, **others})], LABELS)
        assert LABELS.names[probabilities.argmax()] == "positive" and mass == pytest.approx(1)


def test_an_answer_in_another_format_has_a_low_label_mass() -> None:
    tokens = tops(token("The", The=0.9, It=0.07, positive=0.01), token(" post"))
    probabilities, mass = label_probabilities(tokens, LABELS)
    assert mass == pytest.approx(0.03) and probabilities == pytest.approx([1 / 3] * 3)
    probabilities, mass = label_probabilities(tops(token('"Prediction":')), LABELS)
    assert mass == 0 and probabilities == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    "before",
    [
        (),
        ('"', "Prediction", '":', ' "'),
        ('{"Prediction": "',),
        ('"Text', '_analysis": "It says \\"Prediction\\": negative"\n', '"Prediction', '": "'),
        ("\u2581", "**Prediction**:", " "),
    ],
)
def test_label_offset(before: tuple[str, ...]) -> None:
    spread = {"positive": 0.7, "negative": 0.2, "neutral": 0.1}
    tokens = tops(*map(token, before), token("positive", **spread), token('"}'))
    probabilities, mass = label_probabilities(tokens, LABELS)
    assert probabilities == pytest.approx([0.2, 0.1, 0.7]) and mass == pytest.approx(1)


def test_a_bare_label_in_the_first_line_comes_before_a_later_header() -> None:
    spread = {"positive": 0.7, "negative": 0.2, "neutral": 0.1}
    tokens = tops(token("positive", **spread), token("\n"), token('"Prediction": '), token("negative"))
    assert label_probabilities(tokens, LABELS)[0] == pytest.approx([0.2, 0.1, 0.7])
    assert agreement(['positive\n"Prediction": negative'], LABELS).argmax() == 2


def test_quotes_that_were_not_generated_count_for_no_label() -> None:
    spread = {" positive": 0.6, ' "': 0.3, " negative": 0.06}
    probabilities, mass = label_probabilities(tops(token(" positive", **spread)), LABELS)
    assert mass == pytest.approx(0.7) and probabilities == pytest.approx(np.array([0.06, 0.04, 0.6]) / 0.7)


# ---- labels with a common prefix ----


SCALE = LabelSpace.from_scale(Scale())


def test_a_generated_prefix_of_several_labels_is_followed() -> None:
    first = token(" -", **{" -": 0.5, "2": 0.2, "0": 0.1, "+": 0.2})
    second = token("2", **{"2": 0.6, "1": 0.3, "3": 0.1})
    probabilities, mass = label_probabilities(tops(token('"Prediction":'), first, second, token("<|im_end|>")), SCALE)
    floor = 1e-12  # nothing is left for 1 and 3
    assert mass == pytest.approx(0.8)
    assert probabilities * 0.8 == pytest.approx([0.05, 0.3, 0.15, 0.1, floor, 0.2, floor], abs=1e-9)


def test_a_prefix_of_several_labels_that_was_not_generated_is_split_equally() -> None:
    probabilities, mass = label_probabilities(tops(token("2", **{"2": 0.6, "-": 0.3, "1": 0.05})), SCALE)
    bound = 0.05  # the probability of the least likely top-k token, and also what is left
    expected = np.array([0.1, 0.1, 0.1, bound, 0.05, 0.6, bound])
    assert mass == pytest.approx(1) and probabilities == pytest.approx(expected / expected.sum())


def test_a_generated_space_is_followed() -> None:
    """Tokenizers split " 3" into a space and "3", and " -3" into " -" and "3"."""
    first = token("\u0120", **{"\u0120": 0.6, "\u0120-": 0.3, "The": 0.1})
    second = token("3", **{"3": 0.5, "2": 0.25, "1": 0.15, "0": 0.1})
    probabilities, mass = label_probabilities(tops(first, second), SCALE)
    expected = np.array([0.1, 0.1, 0.1, 0.06, 0.09, 0.15, 0.3])
    assert mass == pytest.approx(0.9) and probabilities == pytest.approx(expected / 0.9, abs=1e-9)
    other = token("\u0120-", **{"\u0120-": 0.65, "\u0120": 0.35})
    probabilities, _ = label_probabilities(tops(other, token("1", **{"1": 0.8, "2": 0.1, "3": 0.1})), SCALE)
    assert probabilities == pytest.approx(np.array([0.115, 0.115, 0.57, 0.05, 0.05, 0.05, 0.05]), abs=1e-9)


@pytest.mark.parametrize("end", [[], [token("<|im_end|>")], [token("", **{"": 1.0})], [token('"')]])
def test_a_label_that_is_a_prefix_of_another_one_ends_with_the_answer(end: list[dict[str, Any]]) -> None:
    halves = LabelSpace(("0", "1", "1.5"), (0, 1, 1))
    spread = token("1", **{"1": 0.8, "0": 0.2})
    assert label_probabilities(tops(spread, *end), halves)[0] == pytest.approx([0.2, 0.8, 0], abs=1e-9)
    continued = [token(".", **{".": 0.75, "\n": 0.25}), token("5")]
    assert label_probabilities(tops(spread, *continued), halves)[0] == pytest.approx([0.2, 0.2, 0.6], abs=1e-9)


def test_an_answer_that_ends_in_a_common_prefix_is_split_equally() -> None:
    probabilities, mass = label_probabilities(tops(token("-", **{"-": 0.9, "0": 0.1})), SCALE)
    assert probabilities == pytest.approx([0.3, 0.3, 0.3, 0.1, 0, 0, 0], abs=1e-9) and mass == pytest.approx(1)


# ---- answers without log-probabilities ----


def test_agreement() -> None:
    found = agreement(['"Prediction": positive', "Positive.", '{"Prediction": "negative"}', "who knows"], LABELS)
    assert found == pytest.approx([(1 + 2 / 3) / 5, (2 / 3) / 5, (2 + 2 / 3) / 5])
    assert found.sum() == pytest.approx(1)
