"""What the tasks of a batch hold: which samples, which answers, and the same picture for each."""

from dataclasses import replace

import pytest
import torch

from distill.data.corpus import Corpus
from distill.errors import SettingsError
from distill.models.backbone import IGNORE, Backbone
from distill.task.labels import LabelSpace, Scale
from distill.task.sample import Sample
from distill.training.batches import READER_ACCURACY, answer, check_tasks, encode_tasks, made_up_answers


def test_each_task_has_its_own_answers_to_the_same_pictures(backbone: Backbone, postcards: Corpus) -> None:
    samples = postcards.train[:3]
    batch = encode_tasks(samples, backbone, {"reason": 1.0, "classify": 1.0})
    assert list(batch) == ["reason", "classify"]
    assert torch.equal(batch["reason"]["pixel_values"], batch["classify"]["pixel_values"])
    tokenizer = backbone.processor.tokenizer
    for row, sample in enumerate(samples):
        for task, expected in (("reason", sample.rationale), ("classify", f'"Prediction": {sample.label}')):
            labels = batch[task]["labels"][row]
            assert tokenizer.decode(labels[labels != IGNORE]) == f"{expected}<|im_end|>"


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
    batch = encode_tasks(samples, backbone, {"reason": 1.0, "classify": 1.0})
    assert len(batch["reason"]["input_ids"]) == len(batch["classify"]["input_ids"]) == 2
    assert list(encode_tasks(samples[1:2], backbone, {"reason": 1.0, "classify": 1.0})) == ["classify"]
    assert encode_tasks(samples[3:], backbone, {"reason": 1.0, "classify": 1.0}) == {}


def test_a_teacher_learns_to_explain_from_the_label_and_to_predict_without_it(
    backbone: Backbone, postcards: Corpus
) -> None:
    batch = encode_tasks(postcards.train[:1], backbone, {"predict": 1.0, "explain": 1.0})
    texts = {task: backbone.processor.tokenizer.decode(features["input_ids"][0]) for task, features in batch.items()}
    hint = f"The sentiment is {postcards.train[0].label}."
    assert hint in texts["explain"] and hint not in texts["predict"]
    assert all(str(postcards.train[0].rationale) in text for text in texts.values())


def test_a_batch_is_no_longer_than_its_longest_sample(backbone: Backbone, postcards: Corpus) -> None:
    short, long = postcards.train[0], replace(postcards.train[1], text=postcards.train[1].text * 20)
    lengths = [
        encode_tasks(samples, backbone, {"classify": 1.0})["classify"]["input_ids"].shape[1]
        for samples in ([short], [long], [short, long])
    ]
    assert lengths[0] < lengths[1] == lengths[2]


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
    batch = encode_tasks(samples, graded, {"classify": 1.0, "review": 1.0})
    for features in batch.values():
        assert "targets" not in features and len(features["labels"]) == 2
        for row, name in zip(features["labels"], ("superb", "middling"), strict=True):
            assert backbone.processor.tokenizer.decode(row[row != IGNORE]) == f'"Prediction": {name}<|im_end|>'


def test_a_spread_gives_targets_over_all_bins_and_prompts_closed_with_the_prefix(
    backbone: Backbone, postcards: Corpus
) -> None:
    """A batch with a picture and one without, as mixed corpora give them."""
    graded = on_a_scale(backbone, spread=0.75)
    samples = [replace(postcards.train[0], label=1.6), Sample("b", "so so", label=-0.2), Sample("c", "unknown")]
    batch = encode_tasks(samples, graded, {"classify": 1.0, "review": 0.5})
    expected = torch.tensor(graded.labels.scale.targets([1.6, -0.2]))  # type: ignore[union-attr]
    for features in batch.values():
        assert "labels" not in features
        torch.testing.assert_close(features["targets"], expected.float())
    asked = graded.encode(samples[:2], "classify")
    assert torch.equal(batch["classify"]["input_ids"], asked["input_ids"])
    assert torch.equal(batch["classify"]["pixel_values"], asked["pixel_values"])
    text = backbone.processor.tokenizer.decode(batch["review"]["input_ids"][0])
    assert "A first reader said" in text and text.endswith('"Prediction":')


def test_made_up_readers_follow_from_the_id_and_are_often_but_not_always_right() -> None:
    labels = LabelSpace()
    samples = [Sample(f"s{n}", "x", label=labels.names[n % 3]) for n in range(3000)]
    made_up = [made_up_answers(sample, labels) for sample in samples]
    assert made_up == [made_up_answers(replace(sample, text="y"), labels) for sample in samples]
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
    features = encode_tasks(samples, backbone, {"review": 1.0})["review"]
    for row, sample in enumerate(samples):
        said = made_up_answers(sample, backbone.labels)
        question, _, reply = backbone.processor.tokenizer.decode(features["input_ids"][row]).partition("assistant")
        assert f"A first reader said {said.student} ({said.student_confidence:.0%} sure)" in question
        assert f"a second one {said.teacher} ({said.teacher_confidence:.0%} sure)" in question
        assert f'"Prediction": {sample.label}' in reply
