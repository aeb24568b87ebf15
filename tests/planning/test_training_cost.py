"""Cost of a training, against encoded batches, counted weights and written soft targets."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.data.corpus import Corpus
from distill.models.backbone import Backbone, LoraSettings, ModelSettings, create
from distill.models.packing import tree_mask
from distill.planning.flops import flops
from distill.planning.training_cost import (
    count_tokens,
    soft_target_bytes,
    training_flops,
    training_memory,
    weight_bytes,
)
from distill.task.sample import Sample
from distill.training import soft_target_cache
from distill.training.assistant import TrainSettings
from distill.training.batches import encode, encode_tasks
from distill.training.soft_targets import OnlineTargets
from distill.training.student import DistillationSettings, StudentSettings

SETTINGS = StudentSettings(batch_size=4)
TASKS: Any = SETTINGS.tasks


@pytest.fixture
def rows(postcards: Corpus) -> list[Sample]:
    return [post for post in postcards.train if post.rationale][:6]


def test_token_counts_are_those_of_the_sequences(backbone: Backbone, rows: list[Sample]) -> None:
    published, ours = count_tokens(rows, backbone, SETTINGS)
    batch = encode(rows, backbone, TASKS, True)
    assert ours.logits == len(batch.tokens) / len(rows)
    separate = [encode([row], backbone, TASKS, True).inputs["input_ids"].numel() for row in rows]
    assert ours.tokens == sum(separate) / len(rows) and ours.longest == max(separate)
    padded = sum(features["input_ids"].shape[1] for features in encode_tasks(rows, backbone, TASKS).values())
    assert published.tokens == published.logits == published.longest == padded
    assert (published.patches, ours.patches) == (2 * 16, 16)  # 56 pixels are 4 x 4 patches
    assert ours.tokens < published.tokens


def test_attention_pairs_are_those_that_the_mask_allows(backbone: Backbone, rows: list[Sample]) -> None:
    for packing in (True, False):
        found = count_tokens(rows[:1], backbone, replace(SETTINGS, packing=packing))
        inputs = encode(rows[:1], backbone, TASKS, packing).inputs
        if packing:
            allowed = int(tree_mask(inputs["ends"]).sum())
        else:
            allowed = sum(n * (n + 1) // 2 for n in inputs["attention_mask"].sum(1).tolist())
        assert found[1].pairs == allowed
        lengths = [features["input_ids"].shape[1] for features in encode_tasks(rows[:1], backbone, TASKS).values()]
        assert found[0].pairs == sum(n * (n + 1) // 2 for n in lengths)


def test_with_positions_all_every_position_has_logits(backbone: Backbone, rows: list[Sample]) -> None:
    published, ours = count_tokens(
        rows, backbone, replace(SETTINGS, distillation=DistillationSettings(positions="all"))
    )
    assert ours.logits == ours.tokens <= published.tokens and ours.patches == published.patches


def test_a_post_without_a_rationale_has_one_task(backbone: Backbone, rows: list[Sample]) -> None:
    bare = [replace(row, rationale=None) for row in rows]
    published, ours = count_tokens(bare, backbone, SETTINGS)
    assert published == count_tokens(bare, backbone, replace(SETTINGS, tasks={"classify": 1.0}))[0]
    assert ours.patches == 16


def test_the_cost_of_cached_soft_targets_is_divided_by_the_epochs(
    make_backbone: Callable[..., Backbone], rows: list[Sample]
) -> None:
    student, assistant = make_backbone(1), make_backbone(2, hidden=128)
    published, ours = count_tokens(rows, student, SETTINGS)
    alone = training_flops(student.model, SETTINGS, published, ours)
    module: Any = assistant.model
    online = training_flops(student.model, SETTINGS, published, ours, assistant=module, source="online", epochs=5)
    hidden = training_flops(student.model, SETTINGS, published, ours, assistant=module, source="cached", epochs=5)
    few = replace(SETTINGS, distillation=DistillationSettings(top_k=8))
    top = training_flops(student.model, few, published, ours, assistant=module, source="cached", epochs=5)
    full, head = (flops(module, tokens=t, logits=ours.logits, patches=p, pairs=q) for t, p, q in (
        (ours.tokens, ours.patches, ours.pairs), (0, 0, 0)))  # fmt: skip
    assert online[0] == hidden[0] == top[0] > alone[0]
    assert online[1] - alone[1] == pytest.approx(full)
    assert hidden[1] - alone[1] == pytest.approx((full - head) / 5 + head)
    assert top[1] - alone[1] == pytest.approx(full / 5)


@pytest.mark.parametrize("top_k", [0, 16])
def test_soft_targets_have_the_forecast_size(
    make_backbone: Callable[..., Backbone], rows: list[Sample], tmp_path: Path, top_k: int
) -> None:
    student, assistant = make_backbone(1), make_backbone(2, hidden=128)
    key = soft_target_cache.key_function(student, list(TASKS), "a", top_k, 2.0)
    soft_target_cache.write(
        tmp_path, rows, key, lambda samples: encode(samples, student, TASKS, True),
        lambda: OnlineTargets(assistant, student), top_k=top_k, temperature=2.0,
    )  # fmt: skip
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    _, ours = count_tokens(rows, student, SETTINGS)
    forecast = soft_target_bytes(len(rows) * ours.logits, DistillationSettings(top_k=top_k), assistant)
    assert forecast <= written <= forecast + 2000  # file headers


def test_soft_targets_are_cached_for_several_epochs_and_enough_disk_space() -> None:
    options = DistillationSettings()
    assert options.use_cache(2, 10.0, 0.0, 20.0) and not options.use_cache(2, 10.0, 0.0, 19.0)
    assert not options.use_cache(1, 1.0, 0.0, 99.0)
    assert DistillationSettings(soft_targets="cached").use_cache(1, 10.0, 0.0, 0.0)
    assert not DistillationSettings(soft_targets="online").use_cache(9, 1.0, 0.0, 99.0)
    assert not DistillationSettings(positions="all").use_cache(9, 1.0, 0.0, 99.0)


def test_existing_soft_targets_are_used_on_a_full_disk() -> None:
    options = DistillationSettings()
    assert options.use_cache(2, 10.0, 10.0, 0.0) and options.use_cache(2, 10.0, 9.0, 2.0)
    assert not options.use_cache(2, 10.0, 9.0, 1.0)


def test_memory_includes_weights_optimizer_activations_and_logits(
    make_backbone: Callable[..., Backbone], rows: list[Sample]
) -> None:
    student, assistant = make_backbone(1), make_backbone(2, hidden=128)
    weights, other = (4 * sum(w.numel() for w in model.model.parameters()) for model in (student, assistant))
    assert weight_bytes(student) == (weights, weights)
    layouts = count_tokens(rows, student, SETTINGS)
    vocabulary = len(student.head)
    before, after = training_memory(student, SETTINGS, *layouts, assistant=assistant, source="online")
    assert (before.weights, before.optimizer, before.assistant) == (weights, 3 * weights, other)
    assert before.logits == 2 * 4 * 4 * layouts[0].longest * vocabulary  # two models, four posts, float32
    assert after.assistant == other and after.logits < before.logits and after.activations < before.activations
    assert after.total == weights * 4 + after.activations + after.logits + other
    _, kept = training_memory(student, SETTINGS, *layouts, assistant=assistant, source="cached")
    assert kept.assistant == assistant.head.numel() * 4
    few = replace(SETTINGS, distillation=DistillationSettings(top_k=8))
    assert training_memory(student, few, *layouts, assistant=assistant, source="cached")[1].assistant == 0


def test_sharded_weights_are_divided_and_a_part_of_them_is_gathered(
    make_backbone: Callable[..., Backbone], rows: list[Sample]
) -> None:
    """Embeddings (tied to the output head), norm and tower, and the two layers of the decoder, with their gradients."""
    student = make_backbone(1)
    layouts = count_tokens(rows, student, SETTINGS)
    _, whole = training_memory(student, SETTINGS, *layouts)
    before, divided = training_memory(student, SETTINGS, *layouts, shards=4, images=False)
    assert whole.gathered == before.gathered == 0 and before.weights == whole.weights
    assert (divided.weights, divided.optimizer) == (whole.weights / 4, whole.optimizer / 4)
    assert divided.gathered == 2 * whole.weights
    _, one_by_one = training_memory(student, SETTINGS, *layouts, shards=4, images=True)
    tower = sum(w.numel() for w in student.model.model.visual.blocks.parameters())  # type: ignore[union-attr]
    assert one_by_one.gathered == divided.gathered - 2 * 4 * tower
    assert divided.total == whole.total - 0.75 * (whole.weights + whole.optimizer) + divided.gathered


def test_with_an_adapter_only_the_adapter_has_gradients(
    model_folder: Path, tokenizer_folder: Path, backbone: Backbone
) -> None:
    settings = ModelSettings(path=str(model_folder), lora=LoraSettings(r=4), image_size=56, dtype="bfloat16")
    adapted = create(settings, backbone.labels, tokenizer_folder, weights=False)
    assert {weights.device.type for weights in adapted.model.parameters() if not weights.requires_grad} == {"meta"}
    base = sum(w.numel() for w in backbone.model.parameters())
    weights, trained = weight_bytes(adapted)
    # rank 4 on q, k, v, o (64 to 64), gate and up (64 to 128) and down (128 to 64) of two layers, in float32
    assert trained == 4 * 2 * 4 * (4 * 128 + 3 * 192)
    assert weights == 2 * base + trained
    quantized = replace(settings, lora=LoraSettings(r=4, quantize=True))
    adapted.settings = quantized
    # matrices have 4 bits; peft casts all other weights to float32, including the output head
    linear = [m for m in backbone.model.modules() if isinstance(m, torch.nn.Linear) and m.weight is not backbone.head]
    packed = sum(m.weight.numel() for m in linear)
    assert weight_bytes(adapted) == (packed / 2 + 4 * (base - packed) + trained, trained)
    learner = TrainSettings(model=settings)
    post = Sample("one", "a post", label="positive", rationale="because")
    layouts = count_tokens([post], adapted, learner)
    assert training_memory(adapted, learner, *layouts)[1].optimizer == 3 * trained
    assert (
        training_flops(adapted.model, learner, *layouts)[1]
        < training_flops(backbone.model, TrainSettings(), *layouts)[1]
    )
