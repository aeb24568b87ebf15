"""The baseline of the benchmarks is the procedure as published: its layout, and the loss of `positions: all`."""

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
from distill.training.soft_targets import SoftTargets
from distill.training.student import DistillationSettings, StudentModule, StudentSettings

TASKS: dict[Template, float] = {"reason": 1.0, "classify": 1.0}


@pytest.fixture
def samples(postcards: Corpus) -> list[Sample]:
    """A short post, a long one, another short one."""
    first, second, third = [sample for sample in postcards.train if sample.rationale][:3]
    return [first, replace(second, text=second.text * 4), third]


def test_the_width_of_a_task_is_its_longest_sequence(backbone: Backbone, samples: list[Sample]) -> None:
    expected = {task: rows["input_ids"].shape[1] for task, rows in encode_tasks(samples, backbone, TASKS).items()}
    assert published.longest(samples, backbone, list(TASKS)) == expected
    assert expected["reason"] > expected["classify"]


def test_every_batch_has_the_width_of_the_data_set(backbone: Backbone, samples: list[Sample]) -> None:
    widths = published.longest(samples, backbone, list(TASKS))
    batch = published.encode(samples[::2], backbone, widths)
    for task, features in batch.items():
        alone = encode_tasks(samples[::2], backbone, TASKS)[task]
        length = alone["input_ids"].shape[1]
        assert features["input_ids"].shape == (2, widths[task]) and length < widths[task]
        for name, padding in {"input_ids": backbone.processor.tokenizer.pad_token_id, "attention_mask": 0,
                              "labels": IGNORE, "mm_token_type_ids": 0}.items():  # fmt: skip
            assert (
                torch.equal(features[name][:, :length], alone[name]) and (features[name][:, length:] == padding).all()
            )
        assert torch.equal(features["pixel_values"], alone["pixel_values"])


@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 2.0), (1.0, 1.0), (0.0, 2.0)])
@pytest.mark.parametrize("vocabulary", [768, 800])
def test_it_has_the_loss_of_positions_all(
    make_backbone: Any, samples: list[Sample], weight: float, temperature: float, vocabulary: int
) -> None:
    student, assistant = make_backbone(1), make_backbone(2, hidden=128)
    assistant.model.resize_token_embeddings(vocabulary)
    distillation = DistillationSettings(weight, temperature, positions="all")
    module = StudentModule(student, StudentSettings(distillation=distillation), SoftTargets(assistant, student))
    batch = published.encode(samples[::2], student, published.longest(samples, student, list(TASKS)))
    found = published.loss(student.model, assistant.model, batch, weight, temperature)
    expected = sum(module.published_loss(features).total for features in batch.values())
    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    learned = torch.autograd.grad(found, list(student.model.parameters()))
    for gradient, of_module in zip(
        learned, torch.autograd.grad(expected, list(student.model.parameters())), strict=True
    ):
        torch.testing.assert_close(gradient, of_module, atol=1e-5, rtol=1e-4)
