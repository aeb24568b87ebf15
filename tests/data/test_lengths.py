"""Posts that are too long: cut or dropped, with their ids."""

import logging
from pathlib import Path

import pytest

from distill.data.corpus import Corpus, DataSettings, Dropped
from distill.data.lengths import limit_lengths, longest_text
from distill.errors import SettingsError
from distill.task.sample import Sample


def words(text: str, limit: int) -> str:
    return " ".join(text.split()[:limit])


def corpus() -> Corpus:
    train = [Sample("a", "one two"), Sample("b", "so " * 20_000)]
    validation, test = [Sample("v", "é")], [Sample("b", "x")]
    places = {("train", "a"): ("t.jsonl", 1), ("train", "b"): ("t.jsonl", 2)}
    return Corpus(train, validation, test, [], Path("."), places)


def test_long_texts_are_cut_at_their_end(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = limit_lengths(corpus(), DataSettings(), 10, words)
    assert [sample.text for sample in found.train] == ["one two", "so so so so so so so so so so"]
    assert (found.validation, found.test, found.dropped) == (corpus().validation, corpus().test, [])
    assert caplog.messages == ["data: 1 posts are cut to 10 tokens (data.max_tokens, data.too_long): b"]
    assert longest_text(corpus()) == 60_000


def test_long_posts_are_quarantined_with_file_row_and_id() -> None:
    settings = DataSettings(too_long="quarantine")
    found = limit_lengths(corpus(), settings, 10, words)
    assert [sample.id for sample in found.train] == ["a"] and [sample.id for sample in found.test] == ["b"]
    assert found.dropped == [Dropped("t.jsonl", 2, "b", "the text has more than 10 tokens")]
    drawn = corpus()
    drawn.train, drawn.test = drawn.train[:1], drawn.train[1:]
    drawn.test.append(Sample("c", "x"))
    assert limit_lengths(drawn, settings, 10, words).dropped == found.dropped
    drawn.test.pop()
    with pytest.raises(SettingsError, match=r"data\.max_tokens: every post of the test split has more than 10 tokens"):
        limit_lengths(drawn, settings, 10, words)
