"""The benchmark baseline matches the published procedure: padding, and the loss of `positions: all`."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import published
from distill.data.corpus import Corpus
from distill.models.backbone import IGNORE, Backbone
from distill.task.prompts import Template
from distill.task.sample import Sample
from distill.training.batches import encode_tasks
from distill.training.soft_targets import OnlineTargets
from distill.training.student import DistillationSettings, StudentModule, StudentSettings

TASKS: dict[Template, float] = {"reason": 1.0, "classify": 1.0}


@pytest.fixture
def samples(postcards: Corpus) -> list[Sample]:
    """A short, a long and a short post."""
    first, second, third = [sample for sample in postcards.train if sample.rationale][:3]
    return [first, replace(second, text=second.text * 4), third]


def test_padded_length_is_that_of_the_longest_sequence(backbone: Backbone, samples: list[Sample]) -> None:
    expected = {task: rows["input_ids"].shape[1] for task, rows in encode_tasks(samples, backbone, TASKS).items()}
    assert published.padded_lengths(samples, backbone, list(TASKS)) == expected
    assert expected["reason"] > expected["classify"]


def test_every_batch_is_padded_to_the_data_set_length(backbone: Backbone, samples: list[Sample]) -> None:
    lengths = published.padded_lengths(samples, backbone, list(TASKS))
    batch = published.encode(samples[::2], backbone, lengths)
    for task, features in batch.items():
        alone = encode_tasks(samples[::2], backbone, TASKS)[task]
        length = alone["input_ids"].shape[1]
        assert features["input_ids"].shape == (2, lengths[task]) and length < lengths[task]
        for name, padding in {"input_ids": backbone.processor.tokenizer.pad_token_id, "attention_mask": 0,
                              "labels": IGNORE, "mm_token_type_ids": 0}.items():  # fmt: skip
            assert (
                torch.equal(features[name][:, :length], alone[name]) and (features[name][:, length:] == padding).all()
            )
        assert torch.equal(features["pixel_values"], alone["pixel_values"])


@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 2.0), (1.0, 1.0), (0.0, 2.0)])
@pytest.mark.parametrize("vocabulary", [768, 800])
def test_loss_equals_that_of_positions_all(
    make_backbone: Any, samples: list[Sample], weight: float, temperature: float, vocabulary: int
) -> None:
    student, assistant = make_backbone(1), make_backbone(2, hidden=128)
    assistant.model.resize_token_embeddings(vocabulary)
    distillation = DistillationSettings(weight, temperature, positions="all")
    module = StudentModule(student, StudentSettings(distillation=distillation), OnlineTargets(assistant, student))
    batch = published.encode(samples[::2], student, published.padded_lengths(samples, student, list(TASKS)))
    actual = published.loss(student.model, assistant.model, batch, weight, temperature)
    expected = sum(module.published_loss(features).total for features in batch.values())
    assert float(actual.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    weights = list(student.model.parameters())
    gradients, expected_gradients = torch.autograd.grad(actual, weights), torch.autograd.grad(expected, weights)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-4)
