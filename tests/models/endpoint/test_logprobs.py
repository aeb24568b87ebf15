"""Label probabilities by hand: from log-probabilities, of labels that begin alike, and from answers that agree."""

from typing import Any

import numpy as np
import pytest

from distill.models.endpoint.logprobs import agreement, label_probabilities
from distill.task.labels import LabelSpace, Scale
from tests.models.openai_server import LABELS, token


def tops(*tokens: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    return [(t["token"], {o["token"]: o["logprob"] for o in t["top_logprobs"]}) for t in tokens]


# ---- label probabilities ----


def test_label_probabilities_by_hand() -> None:
    tokens = tops(
        token('"Prediction'),
        token('":'),
        token(" "),
        token("pos", pos=0.6, **{" positive": 0.1, "Neg": 0.08, "ne": 0.05, "neu": 0.04, "The": 0.03}),
        token("itive"),
    )
    probabilities, mass = label_probabilities(tokens, LABELS)
    # "pos" and " positive" begin positive, "Neg" negative, "neu" neutral; "ne" begins two labels, which share it.
    assert mass == pytest.approx(0.6 + 0.1 + 0.08 + 0.05 + 0.04)
    assert probabilities == pytest.approx(np.array([0.105, 0.065, 0.7]) / 0.87)


def test_a_label_outside_the_top_list_is_bounded_and_never_impossible() -> None:
    # The least likely of the list has 0.02, and 1 - 0.97 is left: the smaller of the two bounds neutral.
    probabilities, mass = label_probabilities(tops(token("positive", positive=0.9, negative=0.05, So=0.02)), LABELS)
    assert probabilities == pytest.approx(np.array([0.05, 0.02, 0.9]) / 0.97) and mass == pytest.approx(0.97)
    # Here only 0.001 is left.
    probabilities, _ = label_probabilities(tops(token("positive", positive=0.9, negative=0.099)), LABELS)
    assert probabilities[1] == pytest.approx(0.001 / 1.0)
    # Nothing is left, and yet no label is impossible.
    probabilities, mass = label_probabilities(tops(token("positive", positive=1.0)), LABELS)
    assert (probabilities > 0).all() and probabilities.sum() == pytest.approx(1) and mass == pytest.approx(1)


def test_an_answer_off_its_format_has_a_low_mass() -> None:
    tokens = tops(token("The", The=0.9, It=0.07, positive=0.01), token(" post"))
    probabilities, mass = label_probabilities(tokens, LABELS)
    assert mass == pytest.approx(0.03) and probabilities == pytest.approx([1 / 3] * 3)
    nothing, mass = label_probabilities(tops(token('"Prediction":')), LABELS)
    assert mass == 0 and nothing == pytest.approx([1 / 3] * 3)


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
def test_where_the_label_begins(before: tuple[str, ...]) -> None:
    spread = {"positive": 0.7, "negative": 0.2, "neutral": 0.1}
    tokens = tops(*map(token, before), token("positive", **spread), token('"}'))
    probabilities, mass = label_probabilities(tokens, LABELS)
    assert probabilities == pytest.approx([0.2, 0.1, 0.7]) and mass == pytest.approx(1)


def test_a_bare_label_is_not_overruled_by_what_is_quoted_after_it() -> None:
    spread = {"positive": 0.7, "negative": 0.2, "neutral": 0.1}
    tokens = tops(token("positive", **spread), token("\n"), token('"Prediction": '), token("negative"))
    assert label_probabilities(tokens, LABELS)[0] == pytest.approx([0.2, 0.1, 0.7])
    assert agreement(['positive\n"Prediction": negative'], LABELS).argmax() == 2


def test_quotes_that_were_not_taken_count_for_no_label() -> None:
    spread = {" positive": 0.6, ' "': 0.3, " negative": 0.06}
    probabilities, mass = label_probabilities(tops(token(" positive", **spread)), LABELS)
    assert mass == pytest.approx(0.7) and probabilities == pytest.approx(np.array([0.06, 0.04, 0.6]) / 0.7)


# ---- labels that begin alike ----


SCALE = LabelSpace.from_scale(Scale())


def test_a_token_that_begins_several_labels_is_followed_where_it_was_generated() -> None:
    first = token(" -", **{" -": 0.5, "2": 0.2, "0": 0.1, "+": 0.2})
    second = token("2", **{"2": 0.6, "1": 0.3, "3": 0.1})
    probabilities, mass = label_probabilities(tops(token('"Prediction":'), first, second, token("<|im_end|>")), SCALE)
    left = 1e-12  # nothing is left over for 1 and 3, and yet they are possible
    assert mass == pytest.approx(0.8)
    assert probabilities * 0.8 == pytest.approx([0.05, 0.3, 0.15, 0.1, left, 0.2, left], abs=1e-9)


def test_a_token_that_begins_several_labels_is_shared_where_it_was_not_generated() -> None:
    probabilities, mass = label_probabilities(tops(token("2", **{"2": 0.6, "-": 0.3, "1": 0.05})), SCALE)
    bound = 0.05  # the least likely of the list, and as much is left
    expected = np.array([0.1, 0.1, 0.1, bound, 0.05, 0.6, bound])
    assert mass == pytest.approx(1) and probabilities == pytest.approx(expected / expected.sum())


def test_a_space_before_a_number_may_precede_any_and_is_followed() -> None:
    """As tokenizers write " 3" in two tokens and " -3" in two others."""
    first = token("\u0120", **{"\u0120": 0.6, "\u0120-": 0.3, "The": 0.1})
    second = token("3", **{"3": 0.5, "2": 0.25, "1": 0.15, "0": 0.1})
    probabilities, mass = label_probabilities(tops(first, second), SCALE)
    expected = np.array([0.1, 0.1, 0.1, 0.06, 0.09, 0.15, 0.3])
    assert mass == pytest.approx(0.9) and probabilities == pytest.approx(expected / 0.9, abs=1e-9)
    other = token("\u0120-", **{"\u0120-": 0.65, "\u0120": 0.35})
    probabilities, _ = label_probabilities(tops(other, token("1", **{"1": 0.8, "2": 0.1, "3": 0.1})), SCALE)
    assert probabilities == pytest.approx(np.array([0.115, 0.115, 0.57, 0.05, 0.05, 0.05, 0.05]), abs=1e-9)


@pytest.mark.parametrize("end", [[], [token("<|im_end|>")], [token("", **{"": 1.0})], [token('"')]])
def test_a_label_that_begins_another_one_ends_where_the_answer_does(end: list[dict[str, Any]]) -> None:
    halves = LabelSpace(("0", "1", "1.5"), (0, 1, 1))
    spread = token("1", **{"1": 0.8, "0": 0.2})
    assert label_probabilities(tops(spread, *end), halves)[0] == pytest.approx([0.2, 0.8, 0], abs=1e-9)
    going_on = [token(".", **{".": 0.75, "\n": 0.25}), token("5")]
    assert label_probabilities(tops(spread, *going_on), halves)[0] == pytest.approx([0.2, 0.2, 0.6], abs=1e-9)


def test_the_end_of_an_answer_within_what_labels_share_is_all_of_theirs() -> None:
    probabilities, mass = label_probabilities(tops(token("-", **{"-": 0.9, "0": 0.1})), SCALE)
    assert probabilities == pytest.approx([0.3, 0.3, 0.3, 0.1, 0, 0, 0], abs=1e-9) and mass == pytest.approx(1)


# ---- answers without log-probabilities ----


def test_agreement_by_hand() -> None:
    found = agreement(['"Prediction": positive', "Positive.", '{"Prediction": "negative"}', "who knows"], LABELS)
    assert found == pytest.approx([(1 + 2 / 3) / 5, (2 / 3) / 5, (2 + 2 / 3) / 5])
    assert found.sum() == pytest.approx(1)
