"""What a training takes, against really encoded batches, counted weights and written soft targets."""

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
from distill.planning.training_cost import disk_bytes, flop, memory, sizes, work
from distill.task.sample import Sample
from distill.training import soft_target_cache
from distill.training.assistant import TrainSettings
from distill.training.batches import encode, encode_tasks
from distill.training.soft_targets import SoftTargets
from distill.training.student import DistillationSettings, StudentSettings

SETTINGS = StudentSettings(batch_size=4)
TASKS: Any = SETTINGS.tasks


@pytest.fixture
def rows(postcards: Corpus) -> list[Sample]:
    return [post for post in postcards.train if post.rationale][:6]


def test_tokens_are_those_of_the_sequences(backbone: Backbone, rows: list[Sample]) -> None:
    published, here = work(rows, backbone, SETTINGS)
    batch = encode(rows, backbone, TASKS, True)
    assert here.logits == len(batch.tokens) / len(rows)
    alone = [encode([row], backbone, TASKS, True).inputs["input_ids"].numel() for row in rows]
    assert here.tokens == sum(alone) / len(rows) and here.longest == max(alone)
    padded = sum(features["input_ids"].shape[1] for features in encode_tasks(rows, backbone, TASKS).values())
    assert published.tokens == published.logits == published.longest == padded
    assert (published.patches, here.patches) == (2 * 16, 16)  # 56 pixels are 4 x 4 patches
    assert here.tokens < published.tokens


def test_pairs_are_those_that_the_mask_allows(backbone: Backbone, rows: list[Sample]) -> None:
    for packing in (True, False):
        found = work(rows[:1], backbone, replace(SETTINGS, packing=packing))
        inputs = encode(rows[:1], backbone, TASKS, packing).inputs
        if packing:
            seen = int(tree_mask(inputs["ends"]).sum())
        else:
            seen = sum(n * (n + 1) // 2 for n in inputs["attention_mask"].sum(1).tolist())
        assert found[1].pairs == seen
        lengths = [features["input_ids"].shape[1] for features in encode_tasks(rows[:1], backbone, TASKS).values()]
        assert found[0].pairs == sum(n * (n + 1) // 2 for n in lengths)


def test_all_positions_have_logits_where_the_settings_follow_the_published_code(
    backbone: Backbone, rows: list[Sample]
) -> None:
    published, here = work(rows, backbone, replace(SETTINGS, distillation=DistillationSettings(positions="all")))
    assert here.logits == here.tokens <= published.tokens and here.patches == published.patches


def test_a_post_without_a_rationale_has_one_task(backbone: Backbone, rows: list[Sample]) -> None:
    bare = [replace(row, rationale=None) for row in rows]
    published, here = work(bare, backbone, SETTINGS)
    assert published == work(bare, backbone, replace(SETTINGS, tasks={"classify": 1.0}))[0]
    assert here.patches == 16


def test_soft_targets_that_are_computed_once_are_shared_out_among_the_epochs(
    make_backbone: Callable[..., Backbone], rows: list[Sample]
) -> None:
    student, assistant = make_backbone(1), make_backbone(2, hidden=128)
    published, here = work(rows, student, SETTINGS)
    alone = flop(student.model, SETTINGS, published, here)
    asked: Any = assistant.model
    online = flop(student.model, SETTINGS, published, here, assistant=asked, targets="online", epochs=5)
    hidden = flop(student.model, SETTINGS, published, here, assistant=asked, targets="cached", epochs=5)
    few = replace(SETTINGS, distillation=DistillationSettings(top_k=8))
    top = flop(student.model, few, published, here, assistant=asked, targets="cached", epochs=5)
    whole, head = (flops(asked, tokens=t, logits=here.logits, patches=p, pairs=q) for t, p, q in (
        (here.tokens, here.patches, here.pairs), (0, 0, 0)))  # fmt: skip
    assert online[0] == hidden[0] == top[0] > alone[0]
    assert online[1] - alone[1] == pytest.approx(whole)
    assert hidden[1] - alone[1] == pytest.approx((whole - head) / 5 + head)
    assert top[1] - alone[1] == pytest.approx(whole / 5)


@pytest.mark.parametrize("top_k", [0, 16])
def test_soft_targets_take_the_bytes_that_are_foretold(
    make_backbone: Callable[..., Backbone], rows: list[Sample], tmp_path: Path, top_k: int
) -> None:
    student, assistant = make_backbone(1), make_backbone(2, hidden=128)
    key = soft_target_cache.keys(student, list(TASKS), "a", top_k, 2.0)
    soft_target_cache.write(
        tmp_path, rows, key, lambda samples: encode(samples, student, TASKS, True),
        lambda: SoftTargets(assistant, student), top_k=top_k, temperature=2.0,
    )  # fmt: skip
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    _, here = work(rows, student, SETTINGS)
    told = disk_bytes(len(rows) * here.logits, DistillationSettings(top_k=top_k), assistant)
    assert told <= written <= told + 2000  # the headers


def test_soft_targets_are_cached_where_that_pays_and_there_is_room() -> None:
    options = DistillationSettings()
    assert options.use_cache(2, 10.0, 0.0, 20.0) and not options.use_cache(2, 10.0, 0.0, 19.0)
    assert not options.use_cache(1, 1.0, 0.0, 99.0)
    assert DistillationSettings(soft_targets="cached").use_cache(1, 10.0, 0.0, 0.0)
    assert not DistillationSettings(soft_targets="online").use_cache(9, 1.0, 0.0, 99.0)
    assert not DistillationSettings(positions="all").use_cache(9, 1.0, 0.0, 99.0)


def test_soft_targets_that_are_there_stay_in_use_on_a_full_disk() -> None:
    options = DistillationSettings()
    assert options.use_cache(2, 10.0, 10.0, 0.0) and options.use_cache(2, 10.0, 9.0, 2.0)
    assert not options.use_cache(2, 10.0, 9.0, 1.0)


def test_memory_is_that_of_the_weights_and_of_what_training_adds(
    make_backbone: Callable[..., Backbone], rows: list[Sample]
) -> None:
    student, assistant = make_backbone(1), make_backbone(2, hidden=128)
    weights, other = (4 * sum(w.numel() for w in model.model.parameters()) for model in (student, assistant))
    assert sizes(student) == (weights, weights)
    layouts = work(rows, student, SETTINGS)
    vocabulary = len(student.head)
    before, after = memory(student, SETTINGS, *layouts, assistant=assistant, targets="online")
    assert (before.weights, before.optimizer, before.assistant) == (weights, 3 * weights, other)
    assert before.logits == 2 * 4 * 4 * layouts[0].longest * vocabulary  # two models, four posts, float32
    assert after.assistant == other and after.logits < before.logits and after.activations < before.activations
    assert after.total == weights * 4 + after.activations + after.logits + other
    _, kept = memory(student, SETTINGS, *layouts, assistant=assistant, targets="cached")
    assert kept.assistant == assistant.head.numel() * 4
    few = replace(SETTINGS, distillation=DistillationSettings(top_k=8))
    assert memory(student, few, *layouts, assistant=assistant, targets="cached")[1].assistant == 0


def test_an_adapter_alone_has_gradients(model_folder: Path, tokenizer_folder: Path, backbone: Backbone) -> None:
    settings = ModelSettings(path=str(model_folder), lora=LoraSettings(r=4), image_size=56, dtype="bfloat16")
    adapted = create(settings, backbone.labels, tokenizer_folder, weights=False)
    assert {weights.device.type for weights in adapted.model.parameters() if not weights.requires_grad} == {"meta"}
    base = sum(w.numel() for w in backbone.model.parameters())
    weights, trained = sizes(adapted)
    # rank 4 on q, k, v, o (64 to 64), gate and up (64 to 128) and down (128 to 64) of two layers, in float32
    assert trained == 4 * 2 * 4 * (4 * 128 + 3 * 192)
    assert weights == 2 * base + trained
    quantized = replace(settings, lora=LoraSettings(r=4, quantize=True))
    adapted.settings = quantized
    # peft leaves 4 bits to a matrix and makes float32 of all else, the output head included
    linear = [m for m in backbone.model.modules() if isinstance(m, torch.nn.Linear) and m.weight is not backbone.head]
    packed = sum(m.weight.numel() for m in linear)
    assert sizes(adapted) == (packed / 2 + 4 * (base - packed) + trained, trained)
    learner = TrainSettings(model=settings)
    post = Sample("one", "a post", label="positive", rationale="because")
    layouts = work([post], adapted, learner)
    assert memory(adapted, learner, *layouts)[1].optimizer == 3 * trained
    assert flop(adapted.model, learner, *layouts)[1] < flop(backbone.model, TrainSettings(), *layouts)[1]
