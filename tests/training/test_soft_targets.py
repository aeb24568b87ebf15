"""Online soft targets: their values, the frozen assistant, and which students are compatible."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.data.corpus import Corpus
from distill.errors import SettingsError
from distill.models import tiny
from distill.models.backbone import IGNORE, Backbone
from distill.task.labels import LabelSpace
from distill.task.prompts import Template
from distill.training.batches import encode, encode_tasks
from distill.training.soft_targets import OnlineTargets, shared_vocabulary

TASKS: dict[Template, float] = {"reason": 1.0, "classify": 1.0}


def test_targets_are_the_assistants_logits_at_the_answer_positions(make_backbone: Any, postcards: Corpus) -> None:
    assistant, student = make_backbone(1, hidden=128), make_backbone(2)
    batch = encode(postcards.train[:3], student, TASKS, True)
    targets = OnlineTargets(assistant, student)
    assert targets.read(postcards.train[:3]) == {}
    hidden, head, cap = targets(batch)
    assert cap is None
    assert hidden.shape == (len(batch.tokens), 128) and not hidden.requires_grad
    published = encode_tasks(postcards.train[:3], student, TASKS)
    with torch.no_grad():
        rows = {
            task: assistant.model(**{k: v for k, v in f.items() if k != "labels"}).logits
            for task, f in published.items()
        }
    expected = [
        logits[row, (published[task]["labels"][row] != IGNORE).nonzero()[:, 0] - 1]
        for row in range(3)
        for task, logits in rows.items()
    ]
    torch.testing.assert_close(hidden @ head.T, torch.cat(expected), atol=1e-4, rtol=0)


def test_published_targets_are_the_assistants_logits_at_all_positions(make_backbone: Any, postcards: Corpus) -> None:
    assistant, student = make_backbone(1), make_backbone(2)
    features = student.encode(postcards.test[:3], "classify")
    targets = OnlineTargets(assistant, student).logits(features)
    with torch.no_grad():
        expected = assistant.model(**features).logits
    assert targets.shape == expected.shape and not targets.requires_grad
    torch.testing.assert_close(targets, expected, atol=1e-5, rtol=0)


def test_the_assistant_is_frozen_and_in_evaluation_mode(make_backbone: Any) -> None:
    assistant = make_backbone(1)
    assistant.model.train()
    OnlineTargets(assistant, make_backbone(2))
    assert not assistant.model.training
    assert not any(weights.requires_grad for weights in assistant.model.parameters())


@pytest.mark.parametrize("padded", ["assistant", "student"])
def test_padded_vocabularies_are_cut_to_the_shared_ids(
    make_backbone: Any, postcards: Corpus, padded: str, caplog: pytest.LogCaptureFixture
) -> None:
    models = {"assistant": make_backbone(1), "student": make_backbone(2)}
    features = models["student"].encode(postcards.test[:2], "classify")
    with torch.no_grad():
        before = models["assistant"].model(**features).logits
    models[padded].model.resize_token_embeddings(832)
    with caplog.at_level(logging.INFO, logger="distill"):
        targets = OnlineTargets(models["assistant"], models["student"])
    assert targets.vocabulary == 768
    sizes = "assistant 832, student 768" if padded == "assistant" else "assistant 768, student 832"
    assert f"vocabulary sizes differ: {sizes}; the 768 shared ids are used" in caplog.text
    torch.testing.assert_close(targets.logits(features), before, atol=1e-5, rtol=0)


def test_equal_vocabularies_are_not_cut(make_backbone: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert shared_vocabulary(make_backbone(1), make_backbone(2, hidden=128)) == 768
    assert "vocabulary" not in caplog.text


def test_a_different_tokenizer_is_rejected(make_backbone: Any, postcards: Corpus) -> None:
    student = make_backbone(2)
    texts = [sample.text for sample in postcards.train] + [" negative neutral positive"] * 9
    words = tiny.train_tokenizer(texts, len(student.processor.tokenizer))
    other = Backbone(student.model, tiny.build_processor(words), LabelSpace(), student.settings)
    with pytest.raises(SettingsError, match="different tokenizers"):
        OnlineTargets(other, student)


def test_a_different_image_processor_is_rejected(make_backbone: Any, tokenizer_folder: Path) -> None:
    assistant, student = make_backbone(1), make_backbone(2)
    assistant.processor.image_processor.image_mean = [0.1, 0.1, 0.1]
    with pytest.raises(SettingsError, match="images differently"):
        OnlineTargets(assistant, student)


def test_a_different_image_size_in_the_settings_is_accepted(make_backbone: Any) -> None:
    """Both models read the student's batch, so only its image size is used."""
    assistant = make_backbone(1)
    assistant.settings = replace(assistant.settings, image_size=84)
    assert OnlineTargets(assistant, make_backbone(2)).vocabulary == 768
