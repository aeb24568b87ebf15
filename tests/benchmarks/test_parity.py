"""The published parser and BLEU of the parity script, by hand."""

import pytest

from benchmarks.parity import bleu, our_label, published_label
from tests.models.openai_server import rationale


def test_the_published_parser_takes_the_first_label_after_the_first_prediction() -> None:
    assert published_label('neutral at first\n"Prediction": "Positive", not negative') == "positive"
    assert published_label("a neutral text, a positive image") == "positive", "the last one without the word"
    assert published_label("nothing") is None
    assert published_label(rationale("negative")) == our_label(rationale("negative")) == "negative"


def test_bleu_is_not_smoothed() -> None:
    pytest.importorskip("sacrebleu")
    assert bleu("one two three four five", "one two three four five") == pytest.approx(1)
    assert bleu("one two three", "one two three") == 0, "there is no 4-gram"
