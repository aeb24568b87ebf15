"""Attention of long packed rows in blocks of queries, compared with one mask for the whole row."""

from pathlib import Path
from typing import Any

import pytest
import torch

from distill.data.corpus import Corpus
from distill.models import tree_attention
from distill.models.backbone import Backbone, ModelSettings, create
from distill.models.local import Local
from distill.models.packing import Packed
from distill.task.labels import LabelSpace
from distill.training.batches import encode


def packed(backbone: Backbone, postcards: Corpus) -> Packed:
    batch = encode(postcards.train[:3], backbone, {"reason": 1.0, "classify": 1.0}, True)
    assert "ends" in batch.inputs
    return batch


def gradients(backbone: Backbone, batch: Any) -> list[torch.Tensor]:
    backbone.model.zero_grad()
    backbone.hidden_states(batch.inputs).flatten(0, 1)[batch.positions].square().sum().backward()
    return [weights.grad.clone() for weights in backbone.model.parameters() if weights.grad is not None]


@pytest.mark.parametrize("block", [1, 50, 64])
def test_blocks_give_the_states_and_gradients_of_one_mask(
    make_backbone: Any, postcards: Corpus, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    backbone = make_backbone(seed=2)
    batch = packed(backbone, postcards)
    with torch.no_grad():
        whole = backbone.hidden_states(batch.inputs)
    expected = gradients(backbone, batch)
    monkeypatch.setattr(tree_attention, "BLOCK", block)
    assert batch.inputs["input_ids"].shape[1] > block
    with torch.no_grad():
        torch.testing.assert_close(backbone.hidden_states(batch.inputs), whole, atol=1e-5, rtol=1e-5)
    for found, gradient in zip(gradients(backbone, batch), expected, strict=True):
        torch.testing.assert_close(found, gradient, atol=1e-3, rtol=1e-3)


def test_no_mask_is_larger_than_a_block(make_backbone: Any, postcards: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = make_backbone()
    batch = packed(backbone, postcards)
    sizes = []
    original = tree_attention.sdpa_attention_forward

    def recording(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        if mask is not None and mask.dtype == torch.bool and mask.shape[-1] > 16:
            sizes.append(mask.shape[-2])
        return original(module, query, key, value, mask, **options)

    monkeypatch.setattr(tree_attention, "BLOCK", 32)
    monkeypatch.setattr(tree_attention, "sdpa_attention_forward", recording)
    monkeypatch.setattr(tree_attention, "tree_mask", None)  # would build the whole mask
    with torch.no_grad():
        backbone.hidden_states(batch.inputs)
    assert sizes and max(sizes) <= 32


def test_labels_and_rationales_of_long_rows_are_the_same(
    make_backbone: Any, postcards: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, posts = Local(make_backbone(), ""), postcards.test[:4]
    expected = [(scores.probabilities, answer.text) for _, scores, answer in local.classify_and_reason(posts)]
    monkeypatch.setattr(tree_attention, "BLOCK", 32)
    for (_, scores, answer), (probabilities, text) in zip(local.classify_and_reason(posts), expected, strict=True):
        assert abs(scores.probabilities - probabilities).max() < 1e-5 and answer.text == text


def test_eager_attention_takes_the_whole_mask(
    model_folder: Path, postcards: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    monkeypatch.setattr(tree_attention, "BLOCK", 32)
    for attention in ("eager", "sdpa"):
        settings = ModelSettings(path=str(model_folder), image_size=56, attention=attention)  # type: ignore[arg-type]
        backbone = create(settings, LabelSpace(), tmp_path, train=False)
        with torch.no_grad():
            states.append(backbone.hidden_states(packed(backbone, postcards).inputs))
    torch.testing.assert_close(*states, atol=1e-4, rtol=1e-4)
