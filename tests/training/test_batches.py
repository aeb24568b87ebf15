"""What the tasks of a batch hold: which samples, which answers, and the same picture for each."""

from dataclasses import replace

import pytest
import torch

from distill.data.corpus import Corpus
from distill.errors import SettingsError
from distill.models.backbone import IGNORE, Backbone
from distill.training.batches import answer, check_tasks, encode_tasks


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
    assert [answer("classify", sample) is None for sample in samples] == [False, False, True, True]
    assert [answer("reason", sample) is None for sample in samples] == [False, True, False, True]
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
    assert check_tasks({"reason": 1.0, "classify": 1.0, "predict": 0.5, "explain": 2}, "teacher.tasks") is None
