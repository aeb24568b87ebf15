"""Training posts that are longer than `max_length`."""

import logging
from dataclasses import replace

import pytest

from distill.data.corpus import Corpus
from distill.errors import SettingsError
from distill.models.backbone import Backbone
from distill.task.prompts import Template
from distill.training.batches import encode, encode_tasks, row_lengths
from distill.training.length_limit import limit_length

TASKS: dict[Template, float] = {"reason": 1.0, "classify": 1.0}


def longest(backbone: Backbone, corpus: Corpus, packing: bool) -> int:
    """Length of the longest sequence of eight posts, from the plain padded sequences and the packed rows."""
    posts = corpus.train[:8]
    if packing:
        return max(int(row_lengths(encode([post], backbone, TASKS, True)).max()) for post in posts)
    tasks = encode_tasks(posts, backbone, TASKS)
    return max(int(features["attention_mask"].sum(1).max()) for features in tasks.values())


def test_row_lengths_are_those_of_sequences_encoded_alone(backbone: Backbone, postcards: Corpus) -> None:
    posts = postcards.train[:5]
    for packing in (True, False):
        together = row_lengths(encode(posts, backbone, TASKS, packing)).tolist()
        alone = [encode([post], backbone, TASKS, packing).inputs["input_ids"].shape[1] for post in posts]
        assert (together == alone) if packing else (max(together) == max(alone) and len(together) == 10)


@pytest.mark.parametrize("packing", [True, False])
def test_longer_posts_are_left_out_and_named(
    backbone: Backbone, postcards: Corpus, packing: bool, caplog: pytest.LogCaptureFixture
) -> None:
    posts, limit = postcards.train[:8], longest(backbone, postcards, packing)
    long = replace(posts[3], id="long", text=posts[3].text + " and so on" * 40)
    posts = [*posts[:4], long, *posts[4:]]
    caplog.set_level(logging.WARNING)
    # an answer's last token is predicted but not read, so a packed row is shorter by one
    kept = limit_length(posts, backbone, TASKS, packing=packing, max_length=limit)
    assert [post.id for post in kept] == [post.id for post in posts if post.id != "long"]
    assert f"1 of 9 posts are left out of the training: their sequences have more than {limit} tokens" in caplog.text
    assert caplog.text.strip().endswith("(max_length): long")
    assert limit_length(posts, backbone, TASKS, packing=packing, max_length=0) == posts


def test_no_post_left_is_an_error_and_a_post_without_an_answer_is_kept(backbone: Backbone, postcards: Corpus) -> None:
    unanswered = replace(postcards.train[0], id="none", label=None, rationale=None)
    assert limit_length([unanswered], backbone, TASKS, packing=True, max_length=1) == [unanswered]
    with pytest.raises(SettingsError, match=r"^max_length: the sequences of all 2 training posts have more than 5 tok"):
        limit_length(postcards.train[:2], backbone, TASKS, packing=True, max_length=5)
