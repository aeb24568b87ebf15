"""Real posts, read whole."""

from pathlib import Path

import pytest

from distill.data.corpus import DataSettings, read_corpus
from distill.task.labels import LabelSpace, Scale

LABELS = LabelSpace()
BINS = LabelSpace.from_scale(Scale())
SHARED = Path(__file__).parents[2].parent / "shared" / "data"

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the real posts of ../shared/data are missing")


def test_real_posts_are_all_read() -> None:
    settings = DataSettings(root=str(SHARED / "twitter15"), validation=["dev.jsonl"])
    corpus = read_corpus(settings, LABELS)
    assert [len(part) for part in (corpus.train, corpus.validation, corpus.test)] == [3179, 1122, 1037]
    assert corpus.dropped == []
    assert all(sample.images and sample.aspect and sample.label for sample in corpus.train)
    assert all(sample.rationale for sample in corpus.validation + corpus.test)


def test_real_utterances_are_all_read() -> None:
    corpus = read_corpus(DataSettings("mosi", str(SHARED / "mosi"), validation=["dev.jsonl"]), BINS)
    assert [len(part) for part in (corpus.train, corpus.validation, corpus.test)] == [1281, 229, 685]
    assert corpus.dropped == []
    assert all(isinstance(sample.label, float) and not sample.images for sample in corpus.train)


def test_drawn_splits_of_real_posts_have_the_right_size_and_share_no_image() -> None:
    corpus = read_corpus(DataSettings(root=str(SHARED / "twitter15"), test=[]), LABELS)
    assert (len(corpus.validation), len(corpus.test)) == (318, 318)
    images = [{image for sample in part for image in sample.images} for part in (corpus.train, corpus.validation)]
    assert not images[0] & images[1]
