"""What the tasks of a batch hold: which samples, which answers, and the same picture for each."""

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
    READER_ACCURACY,
    Batch,
    answer,
    check_exact,
    check_tasks,
    encode,
    encode_tasks,
    questions,
    synthetic_answers,
)

BOTH: dict[Template, float] = {"reason": 1.0, "classify": 1.0}


def texts(backbone: Backbone, batch: Batch) -> list[str]:
    """What is to be learnt of each sample in each task, decoded, in the order of the batch."""
    decode = backbone.processor.tokenizer.decode
    starts = [0, *batch.sizes.cumsum(0).tolist()]
    rows = [(batch.tokens[i:j], batch.tasks[i:j]) for i, j in pairwise(starts)]
    return [decode(tokens[tasks == task]) for tokens, tasks in rows for task in tasks.unique().tolist()]


@pytest.mark.parametrize("packing", [True, False])
def test_each_task_has_its_own_answers(backbone: Backbone, postcards: Corpus, packing: bool) -> None:
    samples = postcards.train[:3]
    batch = encode(samples, backbone, BOTH, packing)
    assert len(batch.inputs["input_ids"]) == (3 if packing else 6)
    pictures = batch.inputs["image_grid_thw"]
    assert len(pictures) == (3 if packing else 6), "with packing, a picture is there once for both tasks"
    expected = [f"{text}<|im_end|>" for s in samples for text in (s.rationale, f'"Prediction": {s.label}')]
    assert texts(backbone, batch) == expected
    if not packing:  # each token stands behind the column that predicts it, but for the last, which need not be read
        inside = batch.tokens != backbone.processor.tokenizer.eos_token_id
        assert torch.equal(batch.inputs["input_ids"].flatten()[batch.columns[inside] + 1], batch.tokens[inside])


def test_the_shares_of_tokens_samples_and_tasks(backbone: Backbone, postcards: Corpus) -> None:
    """An answer's tokens share its weight, samples share a batch, and a missing rationale gives nobody more."""
    one, two = postcards.train[:2]
    samples = [one, replace(two, rationale=None)]
    batch = encode(samples, backbone, {"reason": 3.0, "classify": 0.5}, True)
    for index, (weight, known) in enumerate([(3.0, 1), (0.5, 2)]):
        shares = batch.shares[batch.tasks == index]
        assert float(shares.sum()) == pytest.approx(weight * known / 2)
    reason = batch.shares[batch.tasks == 0]
    assert torch.allclose(reason, torch.tensor(3.0 / 2 / len(reason)))
    assert len(reason) == len(backbone.answer_tokens(str(one.rationale)))


def test_a_task_takes_the_samples_whose_answer_is_known(backbone: Backbone, postcards: Corpus) -> None:
    whole, other = postcards.train[:2]
    samples = [
        whole,
        replace(other, rationale=None),
        replace(other, label=None),
        replace(other, label=None, rationale=None),
    ]
    labels = backbone.labels
    assert [answer("classify", sample, labels) is None for sample in samples] == [False, False, True, True]
    assert [answer("review", sample, labels) is None for sample in samples] == [False, False, True, True]
    assert [answer("reason", sample, labels) is None for sample in samples] == [False, True, False, True]
    assert [len(questions(sample, labels, BOTH)) for sample in samples] == [2, 1, 1, 0]
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


# ---- what the packed sequence relies on ----


@pytest.mark.parametrize("packing", [True, False])
def test_a_model_that_keeps_to_its_mask_is_accepted(backbone: Backbone, postcards: Corpus, packing: bool) -> None:
    check_exact(backbone, postcards.train[:1], list(BOTH), packing)
    graded = on_a_scale(backbone, spread=0.75)
    check_exact(graded, [replace(postcards.train[0], label=1.0)], ["classify", "review"], packing)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tasks", [["reason", "classify"], ["classify", "reason"]])
def test_a_model_that_looks_past_its_mask_is_refused_unless_nothing_is_packed(
    make_backbone: Any, postcards: Corpus, dtype: Any, tasks: list[Template]
) -> None:
    """Beside a long rationale, which hardly sees what it must not, and by the first posts, which have a single task."""
    backbone = make_backbone(1)
    backbone.model.to(getattr(torch, dtype))
    backbone.settings = replace(backbone.settings, dtype=dtype)
    plain = [replace(post, rationale=None) for post in postcards.train[:2]]
    rows = [*plain, replace(postcards.train[2], rationale=str(postcards.train[2].rationale) * 8)]
    check_exact(backbone, rows, tasks, True)
    inner = backbone.model.model.language_model
    forward = inner.forward
    inner.forward = lambda **inputs: forward(**inputs | {"attention_mask": None})
    check_exact(backbone, rows, tasks, False)
    with pytest.raises(SettingsError, match="packing: this model sees more of a packed sequence than its mask shows"):
        check_exact(backbone, rows, tasks, True)


def test_a_model_that_bends_its_logits_is_refused(make_backbone: Any, postcards: Corpus) -> None:
    backbone = make_backbone(1)
    backbone.model.lm_head.register_forward_hook(lambda *args: 5 * torch.tanh(args[2] / 5))
    with pytest.raises(SettingsError, match="its logits are more than its output head"):
        check_exact(backbone, postcards.train[:1], list(BOTH), True)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"reason": 0.0}, "student.tasks.reason: 0.0"),
        ({"reason": -1.0}, "student.tasks.reason: -1.0"),
        ({"guess": 1.0}, "student.tasks.guess"),
        ({}, "at least one task"),
    ],
)
def test_impossible_tasks_are_refused(tasks: dict[str, float], message: str) -> None:
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
    """The same model with five bins for labels."""
    scale = Scale(low=-2, high=2, bins=5, spread=spread)
    return Backbone(backbone.model, backbone.processor, LabelSpace.from_scale(scale, GRADES), backbone.settings)


def test_a_value_is_answered_by_the_name_of_its_bin(backbone: Backbone) -> None:
    graded = on_a_scale(backbone, spread=0)
    samples = [Sample("a", "so good", label=1.6), Sample("b", "so so", label=-0.2), Sample("c", "unknown")]
    assert answer("classify", samples[0], graded.labels) == '"Prediction": superb'
    batch = encode(samples, graded, {"classify": 1.0, "review": 1.0}, True)
    assert texts(backbone, batch) == [
        f'"Prediction": {name}<|im_end|>' for name in ("superb", "superb", "middling", "middling")
    ]
    assert batch.sizes[2] == 0


def test_a_spread_gives_every_bin_its_share_behind_a_prompt_closed_with_the_prefix(
    backbone: Backbone, postcards: Corpus
) -> None:
    """A batch with a picture and one without, as mixed corpora give them."""
    graded = on_a_scale(backbone, spread=0.75)
    samples = [replace(postcards.train[0], label=1.6), Sample("b", "so so", label=-0.2), Sample("c", "unknown")]
    batch = encode(samples, graded, {"classify": 1.0, "review": 0.5}, True)
    ends = (batch.tokens == backbone.processor.tokenizer.eos_token_id).nonzero()[:, 0]
    targets = torch.tensor(graded.labels.scale.targets([1.6, -0.2])).float()  # type: ignore[union-attr]
    expected = torch.stack([targets[0], targets[0] / 2, targets[1], targets[1] / 2]).flatten() / 3
    torch.testing.assert_close(batch.shares[ends], expected)
    decode = backbone.processor.tokenizer.decode
    words = "".join(decode(batch.tokens[: batch.sizes[0] // 2])).split("<|im_end|>")
    assert [word.strip() for word in words] == [*GRADES, ""]
    closed = decode(batch.inputs["input_ids"][0])
    assert closed.count('"Prediction":') == 4, "asked for in both prompts, and their answers begun"
    assert closed.count("A first reader said") == 1


def test_made_up_readers_follow_from_the_id_and_are_often_but_not_always_right() -> None:
    labels = LabelSpace()
    samples = [Sample(f"s{n}", "x", label=labels.names[n % 3]) for n in range(3000)]
    made_up = [synthetic_answers(sample, labels) for sample in samples]
    assert made_up == [synthetic_answers(replace(sample, text="y"), labels) for sample in samples]
    for said, confidence in (("student", "student_confidence"), ("teacher", "teacher_confidence")):
        right = [getattr(one, said) == sample.label for one, sample in zip(made_up, samples, strict=True)]
        assert sum(right) / 3000 == pytest.approx(READER_ACCURACY, abs=0.03)
        sure = [getattr(one, confidence) for one in made_up]
        assert min(sure) < 0.35 and max(sure) > 0.98 and all(1 / 3 <= value <= 1 for value in sure)
    agree = sum(one.student == one.teacher for one in made_up) / 3000
    assert agree == pytest.approx(0.6**2 + 2 * 0.2**2, abs=0.03), "they do not copy each other"
    wrong = [one.student for one, sample in zip(made_up, samples, strict=True) if one.student != sample.label]
    assert {wrong.count(name) > 300 for name in labels.names} == {True}


def test_a_review_tells_the_earlier_answers_and_never_the_truth(backbone: Backbone, postcards: Corpus) -> None:
    samples = postcards.train[:6]
    features = encode(samples, backbone, {"review": 1.0}, True).inputs
    for row, sample in enumerate(samples):
        said = synthetic_answers(sample, backbone.labels)
        question, _, reply = backbone.processor.tokenizer.decode(features["input_ids"][row]).partition("assistant")
        assert f"A first reader said {said.student} ({said.student_confidence:.0%} sure)" in question
        assert f"a second one {said.teacher} ({said.teacher_confidence:.0%} sure)" in question
        assert f'"Prediction": {sample.label}' in reply
