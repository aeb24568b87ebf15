"""The frozen assistant: what it says, that it stays as it is, and whom it may teach."""

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
from distill.training.soft_targets import SoftTargets, shared_vocabulary

TASKS: dict[Template, float] = {"reason": 1.0, "classify": 1.0}


def test_targets_are_the_assistants_own_at_the_answer_tokens(make_backbone: Any, postcards: Corpus) -> None:
    assistant, student = make_backbone(1, hidden=128), make_backbone(2)
    batch = encode(postcards.train[:3], student, TASKS, True)
    targets = SoftTargets(assistant, student)
    assert targets.read(postcards.train[:3]) == {}
    hidden, head = targets(batch)
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


def test_published_targets_are_the_assistants_logits_everywhere(make_backbone: Any, postcards: Corpus) -> None:
    assistant, student = make_backbone(1), make_backbone(2)
    features = student.encode(postcards.test[:3], "classify")
    targets = SoftTargets(assistant, student).logits(features)
    with torch.no_grad():
        expected = assistant.model(**features).logits
    assert targets.shape == expected.shape and not targets.requires_grad
    torch.testing.assert_close(targets, expected, atol=1e-5, rtol=0)


def test_the_assistant_is_frozen_and_switched_to_evaluation(make_backbone: Any) -> None:
    assistant = make_backbone(1)
    assistant.model.train()
    SoftTargets(assistant, make_backbone(2))
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
        targets = SoftTargets(models["assistant"], models["student"])
    assert targets.vocabulary == 768
    sizes = "832 (assistant) and 768" if padded == "assistant" else "768 (assistant) and 832"
    assert f"vocabularies of {sizes} (student) ids, cut to the shared 768" in caplog.text
    torch.testing.assert_close(targets.logits(features), before, atol=1e-5, rtol=0)


def test_equal_vocabularies_are_not_cut(make_backbone: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert shared_vocabulary(make_backbone(1), make_backbone(2, hidden=128)) == 768
    assert "cut" not in caplog.text


def test_another_tokenizer_is_refused(make_backbone: Any, postcards: Corpus) -> None:
    student = make_backbone(2)
    texts = [sample.text for sample in postcards.train] + [" negative neutral positive"] * 9
    words = tiny.train_tokenizer(texts, len(student.processor.tokenizer))
    other = Backbone(student.model, tiny.build_processor(words), LabelSpace(), student.settings)
    with pytest.raises(SettingsError, match="different tokenizers"):
        SoftTargets(other, student)


def test_another_way_to_see_pictures_is_refused(make_backbone: Any, tokenizer_folder: Path) -> None:
    assistant, student = make_backbone(1), make_backbone(2)
    assistant.processor.image_processor.image_mean = [0.1, 0.1, 0.1]
    with pytest.raises(SettingsError, match="images differently"):
        SoftTargets(assistant, student)


def test_another_picture_size_in_the_settings_does_not_matter(make_backbone: Any) -> None:
    """The student's batch is what both read, so only its picture size counts."""
    assistant = make_backbone(1)
    assistant.settings = replace(assistant.settings, image_size=84)
    assert SoftTargets(assistant, make_backbone(2)).vocabulary == 768
