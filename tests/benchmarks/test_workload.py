"""The benchmark models have the published architectures, and synthetic posts have the lengths of real ones."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from benchmarks import workload
from distill.models.backbone import LoraSettings


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return workload.train_tokenizer(1024)


@pytest.mark.parametrize(("name", "weights"), [("Qwen2.5-VL-3B", 3_754_622_976), ("Qwen2.5-VL-7B", 8_292_166_656)])
def test_published_sizes_have_the_published_number_of_weights(
    tokenizer: PreTrainedTokenizerFast, name: str, weights: int
) -> None:
    model = workload.build_model(name, tokenizer, "meta").model
    assert sum(parameter.numel() for parameter in model.parameters()) == weights


def test_with_lora_only_adapter_weights_train(tokenizer: PreTrainedTokenizerFast) -> None:
    model = workload.build_model("Qwen2.5-VL-3B", tokenizer, "meta", lora=LoraSettings()).model
    trained = {name for name, weights in model.named_parameters() if weights.requires_grad}
    assert len(trained) == 2 * 7 * 36 and all("lora_" in name and "language_model" in name for name in trained)


@pytest.mark.parametrize("length", [0.25, 2])
def test_synthetic_posts_have_the_requested_lengths(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, length: float
) -> None:
    rows = workload.synthetic_posts(tmp_path, 60, tokenizer, 28, length)
    sizes = sorted(len(tokenizer(row.rationale)["input_ids"]) / length for row in rows)
    assert sizes[0] == pytest.approx(workload.RATIONALE_TOKENS[0], rel=0.4)
    assert sizes[30] == pytest.approx(workload.RATIONALE_TOKENS[5], rel=0.1)
    assert sizes[-1] == pytest.approx(workload.RATIONALE_TOKENS[-1], rel=0.05)
    assert all(row.images[0].exists() and row.label and row.text for row in rows)
    assert rows == workload.synthetic_posts(tmp_path, 60, tokenizer, 28, length)
