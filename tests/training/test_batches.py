"""Encoding of training batches: samples, answers, loss weights, and the check of the packed layout."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from distill.data.corpus import Corpus
from distill.errors import SettingsError
from distill.models.backbone import Backbone
from distill.task.labels import LabelSpace, Scale
from distill.task.prompts import Template
from distill.task.sample import Sample
from distill.training.batches import (
    SYNTHETIC_ACCURACY,
    Batch,
    PackingError,
    check_compatibility,
    check_tasks,
    encode,
    encode_tasks,
    prompts_and_answers,
    synthetic_answers,
    target_answer,
)

BOTH: dict[Template, float] = {"reason": 1.0, "classify": 1.0}


def texts(backbone: Backbone, batch: Batch) -> list[str]:
    """Decode the answer tokens of each sample and task, in the order of the batch."""
    decode = backbone.processor.tokenizer.decode
    starts = [0, *batch.sizes.cumsum(0).tolist()]
    rows = [(batch.tokens[i:j], batch.tasks[i:j]) for i, j in pairwise(starts)]
    return [decode(tokens[tasks == task]) for tokens, tasks in rows for task in tasks.unique().tolist()]


@pytest.mark.parametrize("packing", [True, False])
def test_each_task_has_its_own_answers(backbone: Backbone, postcards: Corpus, packing: bool) -> None:
    samples = postcards.train[:3]
    batch = encode(samples, backbone, BOTH, packing)
    assert len(batch.inputs["input_ids"]) == (3 if packing else 6)
    images = batch.inputs["image_grid_thw"]
    assert len(images) == (3 if packing else 6), "with packing, both tasks share the image"
    expected = [f"{text}<|im_end|>" for s in samples for text in (s.rationale, f'"Prediction": {s.label}')]
    assert texts(backbone, batch) == expected
    if not packing:  # a token follows the position that predicts it; the end token is predicted but not an input
        inside = batch.tokens != backbone.processor.tokenizer.eos_token_id
        assert torch.equal(batch.inputs["input_ids"].flatten()[batch.positions[inside] + 1], batch.tokens[inside])


def test_loss_weights_of_tokens_samples_and_tasks(backbone: Backbone, postcards: Corpus) -> None:
    """The tokens of an answer share its weight; a missing rationale does not increase the weight of other samples."""
    one, two = postcards.train[:2]
    samples = [one, replace(two, rationale=None)]
    batch = encode(samples, backbone, {"reason": 3.0, "classify": 0.5}, True)
    for index, (weight, answered) in enumerate([(3.0, 1), (0.5, 2)]):
        weights = batch.loss_weights[batch.tasks == index]
        assert float(weights.sum()) == pytest.approx(weight * answered / 2)
    reason = batch.loss_weights[batch.tasks == 0]
    assert torch.allclose(reason, torch.tensor(3.0 / 2 / len(reason)))
    assert len(reason) == len(backbone.answer_tokens(str(one.rationale)))


def test_a_task_includes_the_samples_that_have_an_answer(backbone: Backbone, postcards: Corpus) -> None:
    whole, other = postcards.train[:2]
    samples = [
        whole,
        replace(other, rationale=None),
        replace(other, label=None),
        replace(other, label=None, rationale=None),
    ]
    labels = backbone.labels
    assert [target_answer("classify", sample, labels) is None for sample in samples] == [False, False, True, True]
    assert [target_answer("review", sample, labels) is None for sample in samples] == [False, False, True, True]
    assert [target_answer("reason", sample, labels) is None for sample in samples] == [False, True, False, True]
    assert [len(prompts_and_answers(sample, labels, BOTH)) for sample in samples] == [2, 1, 1, 0]
    batch = encode(samples, backbone, BOTH, True)
    assert batch.sizes[3] == 0 and (batch.sizes[:3] > 0).all() and len(batch.inputs["input_ids"]) == 3
    published = encode_tasks(samples, backbone, BOTH)
    assert len(published["reason"]["input_ids"]) == len(published["classify"]["input_ids"]) == 2
    assert list(encode_tasks(samples[1:2], backbone, BOTH)) == ["classify"]
    assert encode_tasks(samples[3:], backbone, BOTH) == {}


def test_a_teacher_learns_to_explain_from_the_label_and_to_predict_without_it(
    backbone: Backbone, postcards: Corpus
) -> None:
    batch = encode(postcards.train[:1], backbone, {"predict": 1.0, "explain": 1.0}, False)
    predict, explain = (backbone.processor.tokenizer.decode(row) for row in batch.inputs["input_ids"])
    hint = f"The sentiment is {postcards.train[0].label}."
    assert hint in explain and hint not in predict
    assert all(str(postcards.train[0].rationale) in text for text in (predict, explain))


def test_a_batch_is_no_longer_than_its_longest_sample(backbone: Backbone, postcards: Corpus) -> None:
    short, long = postcards.train[0], replace(postcards.train[1], text=postcards.train[1].text * 20)
    lengths = [
        encode(samples, backbone, BOTH, True).inputs["input_ids"].shape[1]
        for samples in ([short], [long], [short, long])
    ]
    assert lengths[0] < lengths[1] == lengths[2]


# ---- check of the packed layout ----


@pytest.mark.parametrize("packing", [True, False])
def test_a_model_that_respects_its_mask_is_accepted(backbone: Backbone, postcards: Corpus, packing: bool) -> None:
    check_compatibility(backbone, postcards.train[:1], list(BOTH), packing)
    graded = on_a_scale(backbone, spread=0.75)
    check_compatibility(graded, [replace(postcards.train[0], label=1.0)], ["classify", "review"], packing)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tasks", [["reason", "classify"], ["classify", "reason"]])
def test_a_model_that_ignores_its_mask_is_rejected_unless_packing_is_off(
    make_backbone: Any, postcards: Corpus, dtype: Any, tasks: list[Template]
) -> None:
    """Also detected with a long rationale, which is hardly affected, and if the first posts have only one task."""
    backbone = make_backbone(1)
    backbone.model.to(getattr(torch, dtype))
    backbone.settings = replace(backbone.settings, dtype=dtype)
    plain = [replace(post, rationale=None) for post in postcards.train[:2]]
    rows = [*plain, replace(postcards.train[2], rationale=str(postcards.train[2].rationale) * 8)]
    check_compatibility(backbone, rows, tasks, True)
    inner = backbone.model.model.language_model
    forward = inner.forward
    inner.forward = lambda **inputs: forward(**inputs | {"attention_mask": None})
    check_compatibility(backbone, rows, tasks, False)
    with pytest.raises(
        PackingError, match="packing: the model attends to tokens of a packed sequence that its mask hides"
    ):
        check_compatibility(backbone, rows, tasks, True)


def test_rounding_of_improbable_answers_is_accepted(make_backbone: Any, postcards: Corpus) -> None:
    """In 16 bits, log-probabilities of -100 are rounded to whole nats; a model cut to some layers begins with such."""
    backbone = make_backbone(1)
    backbone.model.to(torch.bfloat16)
    backbone.settings = replace(backbone.settings, dtype="bfloat16")
    backbone.model.lm_head.weight.data *= 100
    inner = backbone.model.model.language_model

    def rounded(_: Any, __: Any, states: torch.Tensor) -> torch.Tensor:
        """Rounding that depends on the layout, as with other kernels."""
        noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(states.shape[1]))
        return states * (1 + 2**-8 * noise).to(states.dtype)

    inner.norm.register_forward_hook(rounded)
    check_compatibility(backbone, postcards.train[:3], list(BOTH), True)
    forward = inner.forward
    inner.forward = lambda **inputs: forward(**inputs | {"attention_mask": None})
    with pytest.raises(PackingError):
        check_compatibility(backbone, postcards.train[:3], list(BOTH), True)


def test_a_model_that_caps_its_logits_is_rejected(make_backbone: Any, postcards: Corpus) -> None:
    backbone = make_backbone(1)
    backbone.model.lm_head.register_forward_hook(lambda *args: 5 * torch.tanh(args[2] / 5))
    with pytest.raises(SettingsError, match="its logits are not the output head applied to its last hidden states"):
        check_compatibility(backbone, postcards.train[:1], list(BOTH), True)


QWEN_3_5 = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "initializer_range": 0.1,
}  # fmt: skip


def test_linear_attention_is_known_by_its_config_and_by_its_weights(backbone: Backbone) -> None:
    from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlavaConfig

    qwen = pytest.importorskip("transformers.models.qwen3_5")
    tokenizer = backbone.processor.tokenizer
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=qwen.Qwen3_5TextConfig(vocab_size=len(tokenizer), **QWEN_3_5).to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    linear = Backbone(model, backbone.processor, backbone.labels, backbone.settings)
    posts = [Sample("a", "a post", label="neutral", rationale="some words about it")]
    assert not linear.packs
    check_compatibility(linear, posts, list(BOTH), True)
    linear.packs = True
    with pytest.raises(PackingError):
        check_compatibility(linear, posts, list(BOTH), True)
    check_compatibility(linear, posts, list(BOTH), False)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"reason": 0.0}, "student.tasks.reason is 0.0"),
        ({"reason": -1.0}, "student.tasks.reason is -1.0"),
        ({"guess": 1.0}, "student.tasks.guess"),
        ({}, "at least one task"),
    ],
)
def test_invalid_tasks_are_rejected(tasks: dict[str, float], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        check_tasks(tasks, "student.tasks")


def test_the_papers_tasks_are_accepted() -> None:
    assert (
        check_tasks({"reason": 1.0, "classify": 1.0, "predict": 0.5, "explain": 2, "review": 0.5}, "teacher.tasks")
        is None
    )


# ---- labels on a scale, and the review ----

GRADES = ("dreadful", "poor", "middling", "fair", "superb")


def on_a_scale(backbone: Backbone, spread: float) -> Backbone:
    """Return the same model with the five bins of a scale as labels."""
    scale = Scale(low=-2, high=2, bins=5, spread=spread)
    return Backbone(backbone.model, backbone.processor, LabelSpace.from_scale(scale, GRADES), backbone.settings)


def test_the_answer_to_a_value_is_the_name_of_its_bin(backbone: Backbone) -> None:
    graded = on_a_scale(backbone, spread=0)
    samples = [Sample("a", "so good", label=1.6), Sample("b", "so so", label=-0.2), Sample("c", "unknown")]
    assert target_answer("classify", samples[0], graded.labels) == '"Prediction": superb'
    batch = encode(samples, graded, {"classify": 1.0, "review": 1.0}, True)
    assert texts(backbone, batch) == [
        f'"Prediction": {name}<|im_end|>' for name in ("superb", "superb", "middling", "middling")
    ]
    assert batch.sizes[2] == 0


def test_with_spread_every_bin_is_an_answer_weighted_by_its_target(backbone: Backbone, postcards: Corpus) -> None:
    """One sample has an image, the others have none; the prompts end with the prediction prefix."""
    graded = on_a_scale(backbone, spread=0.75)
    samples = [replace(postcards.train[0], label=1.6), Sample("b", "so so", label=-0.2), Sample("c", "unknown")]
    batch = encode(samples, graded, {"classify": 1.0, "review": 0.5}, True)
    ends = (batch.tokens == backbone.processor.tokenizer.eos_token_id).nonzero()[:, 0]
    targets = torch.tensor(graded.labels.scale.targets([1.6, -0.2])).float()  # type: ignore[union-attr]
    expected = torch.stack([targets[0], targets[0] / 2, targets[1], targets[1] / 2]).flatten() / 3
    torch.testing.assert_close(batch.loss_weights[ends], expected)
    decode = backbone.processor.tokenizer.decode
    words = "".join(decode(batch.tokens[: batch.sizes[0] // 2])).split("<|im_end|>")
    assert [word.strip() for word in words] == [*GRADES, ""]
    closed = decode(batch.inputs["input_ids"][0])
    assert closed.count('"Prediction":') == 4, "in the text of both prompts and at their ends"
    assert closed.count("A first reader said") == 1


def test_synthetic_answers_depend_on_the_id_only_and_have_the_stated_accuracy() -> None:
    labels = LabelSpace()
    samples = [Sample(f"s{n}", "x", label=labels.names[n % 3]) for n in range(3000)]
    synthetic = [synthetic_answers(sample, labels) for sample in samples]
    assert synthetic == [synthetic_answers(replace(sample, text="y"), labels) for sample in samples]
    for name, confidence in (("student", "student_confidence"), ("teacher", "teacher_confidence")):
        correct = [getattr(one, name) == sample.label for one, sample in zip(synthetic, samples, strict=True)]
        assert sum(correct) / 3000 == pytest.approx(SYNTHETIC_ACCURACY, abs=0.03)
        confidences = [getattr(one, confidence) for one in synthetic]
        assert min(confidences) < 0.35 and max(confidences) > 0.98
        assert all(1 / 3 <= value <= 1 for value in confidences)
    agree = sum(one.student == one.teacher for one in synthetic) / 3000
    assert agree == pytest.approx(0.6**2 + 2 * 0.2**2, abs=0.03), "the two answers are independent"
    wrong = [one.student for one, sample in zip(synthetic, samples, strict=True) if one.student != sample.label]
    assert {wrong.count(name) > 300 for name in labels.names} == {True}


def test_a_review_prompt_contains_the_earlier_answers_and_not_the_gold_label(
    backbone: Backbone, postcards: Corpus
) -> None:
    samples = postcards.train[:6]
    features = encode(samples, backbone, {"review": 1.0}, True).inputs
    for row, sample in enumerate(samples):
        earlier = synthetic_answers(sample, backbone.labels)
        prompt, _, reply = backbone.processor.tokenizer.decode(features["input_ids"][row]).partition("assistant")
        assert f"A first reader said {earlier.student} ({earlier.student_confidence:.0%} sure)" in prompt
        assert f"a second one {earlier.teacher} ({earlier.teacher_confidence:.0%} sure)" in prompt
        assert f'"Prediction": {sample.label}' in reply
