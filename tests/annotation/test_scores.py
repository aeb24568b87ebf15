"""Classifications as text in the ledger."""

import json
import math

import numpy as np

from distill.annotation.scores import read_reply, read_scores, scores_text
from distill.models.reasoner import Answer


def test_scores_are_read_back_and_an_unknown_mass_is_null() -> None:
    row = np.array([0.25, 0.5, 0.25])
    assert read_scores(Answer(scores_text(row, 0.75), True)) == ([0.25, 0.5, 0.25], 0.75)
    text = scores_text(row, math.nan)
    assert json.loads(text)[:2] == [[0.25, 0.5, 0.25], None]
    assert math.isnan(read_scores(Answer(text, True))[1])


def test_a_reply_without_a_label_is_kept_for_messages() -> None:
    uniform = np.full(3, 1 / 3)
    assert read_reply(Answer(scores_text(uniform, 0.0, "I cannot say"), True)) == "I cannot say"
    assert read_scores(Answer("[[0.5, 0.5], 0.0]", True)) == ([0.5, 0.5], 0.0), "an entry of an earlier version"
