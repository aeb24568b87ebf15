"""The decoding loop: its answers are those of `generate` of transformers, with its own cache and whole batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, DynamicLayer
from transformers.cache_utils import DynamicSlidingWindowLayer

from distill.errors import SettingsError
from distill.models.backbone import Backbone
from distill.models.generation import LogprobRecorder, draw, end_tokens, generate, write_in_place
from distill.models.packing import Features
from distill.models.reasoner import Sampling
from distill.task.sample import Sample
from tests.models import family_checks

LIMIT = 40


def plain(backbone: Backbone, features: Features) -> list[list[int]]:
    """The greedy answers of transformers, each up to its end token."""
    ends = end_tokens(backbone)
    with torch.inference_mode():
        output = backbone.model.generate(  # type: ignore[operator]
            **features, max_new_tokens=LIMIT, do_sample=False, eos_token_id=ends, pad_token_id=0
        )
    rows = output[:, features["input_ids"].shape[1] :].tolist()
    lengths = [next((place + 1 for place, token in enumerate(row) if token in ends), LIMIT) for row in rows]
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def end_apart(backbone: Backbone, features: Features) -> None:
    """Choose the end token with which the answers differ most in length."""
    rows = plain(backbone, features)
    lengths = {token: {row.index(token) if token in row else LIMIT for row in rows} for row in rows for token in row}
    backbone.model.generation_config.eos_token_id = max(lengths, key=lambda token: len(lengths[token]))  # type: ignore[union-attr]


def test_the_head_gets_contiguous_states_at_every_step(make_backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of a slice with weights in bfloat16 copies the weights for each row; the first step has a slice."""
    backbone: Backbone = make_backbone()
    plain_linear, contiguous = torch.nn.functional.linear, []

    def linear(hidden: torch.Tensor, weight: torch.Tensor, *bias: Any) -> torch.Tensor:
        if weight.data_ptr() == backbone.head.data_ptr():
            contiguous.append(hidden.is_contiguous())
        return plain_linear(hidden, weight, *bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    features = backbone.encode([Sample("a", "one"), Sample("b", "one two three")], "reason", padding_side="left")
    answers = generate(backbone, features, Sampling(0.0, 5), 0)
    assert contiguous == [True] * max(map(len, answers))


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gemma3", "gemma3_text", "qwen3_5", "mllama"])
def test_a_batch_whose_rows_end_apart_has_the_answers_of_transformers(kind: str, tmp_path: Path) -> None:
    """Pictures, sliding windows, linear attention and cross attention; the prompts have different lengths."""
    try:
        backbone = family_checks.load(kind, tmp_path / kind)
    except SettingsError as error:
        pytest.skip(str(error))
    features = backbone.encode(family_checks.posts(tmp_path / "posts", kind), "reason", padding_side="left")
    end_apart(backbone, features)
    expected = plain(backbone, features)
    rows_of_steps, recorder = [], LogprobRecorder(1, [], backbone.device)
    found = generate(
        backbone, features, Sampling(0.0, LIMIT), 0, lambda logits, rows: rows_of_steps.append(rows), recorder
    )
    assert found == expected
    assert len({len(answer) for answer in found}) > 1, "all rows end together"
    for row, answer in enumerate(found):  # a row takes part until it ends
        assert [row in rows for rows in rows_of_steps] == [step < len(answer) for step in range(len(rows_of_steps))]
        tokens = recorder.tokens(row, backbone.processor.tokenizer)
        assert [token.text for token in tokens] == [backbone.processor.tokenizer.decode([token]) for token in answer]


def test_the_same_seed_draws_the_same_answers(make_backbone: Any, posts: list[Any]) -> None:
    backbone = make_backbone()
    features = backbone.encode(posts, "reason", padding_side="left")
    state = torch.get_rng_state()
    first, again, other = (generate(backbone, features, Sampling(1.0, 12), seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("make", [DynamicLayer, lambda: DynamicSlidingWindowLayer(7)])
def test_a_layer_written_in_place_is_the_layer_of_transformers(make: Callable[[], DynamicLayer]) -> None:
    generator = torch.Generator().manual_seed(0)

    def states(rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.randn(rows, 2, tokens, 4, generator=generator) for _ in range(2))  # type: ignore[return-value]

    caches, rows = [DynamicCache(), DynamicCache()], 5
    prompt = states(rows, 11)
    for cache in caches:
        cache.layers.append(make())
        cache.update(*prompt, 0)
    write_in_place(caches[1])
    assert type(caches[1].layers[0]) is not type(caches[0].layers[0])
    places = set()
    for step in range(300):
        added = states(rows, 1 if step % 50 else 3)
        for expected, found in zip(*(cache.update(*added, 0) for cache in caches), strict=True):
            assert torch.equal(expected, found)
        sizes = [(cache.get_seq_length(), cache.get_mask_sizes(1, 0)) for cache in caches]
        assert sizes[0] == sizes[1]
        if step in (40, 41, 200):
            rows -= 1
            kept = torch.randperm(rows + 1, generator=generator)[:rows]
            for cache in caches:
                cache.reorder_cache(kept)
        places.add(caches[1].layers[0].keys.untyped_storage().data_ptr())  # type: ignore[union-attr]
    assert len(places) <= 7, "states are copied when a row leaves or the room is full, not at each step"


def test_a_token_is_drawn_from_the_softmax() -> None:
    scores = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)) * 2
    scores[:, 5:200] = -torch.inf
    torch.manual_seed(0)
    count = 20_000
    tokens = draw(scores.repeat_interleave(count, 0)).view(3, count)
    for row, expected in zip(tokens, scores.softmax(-1), strict=True):
        found = row.bincount(minlength=300) / count
        assert len(found) == 300 and not found[5:200].any()
        error = (expected * (1 - expected) / count).sqrt()
        assert ((found - expected).abs() <= 4.5 * error + 1 / count).all()
