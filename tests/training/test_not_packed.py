"""Training with packing of models that cannot keep packed answers apart: one sequence for each answer, one warning."""

import logging
from pathlib import Path
from typing import Any

import pytest

from distill.models.backbone import Backbone, LoraSettings
from distill.training.assistant import AssistantModule, TrainSettings
from distill.training.datamodule import ReasoningDataModule
from distill.training.fit import fit
from tests.models import family_checks
from tests.training.training_runs import QUIET


def train(backbone: Backbone, folder: Path) -> AssistantModule:
    posts = family_checks.posts(folder / "posts")
    module = AssistantModule(backbone, TrainSettings(tasks=family_checks.TASKS))
    data = ReasoningDataModule(backbone, posts, posts, module.settings.tasks, module.encode, batch_size=2)  # type: ignore[arg-type]
    fit(module, data, folder, QUIET | {"max_epochs": 1})
    return module


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "packing" in record.getMessage()]


def test_a_family_that_does_not_pack(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backbone = family_checks.load("gemma3", tmp_path / "model", LoraSettings(r=2, targets="all-linear"))
    with caplog.at_level(logging.WARNING):
        module = train(backbone, tmp_path / "run")
    assert warnings_of(caplog) == [
        "packing: Gemma 3 cannot keep the answers in one sequence apart; each answer has its own sequence"
    ]
    posts = family_checks.posts(tmp_path / "posts")
    assert len(module.encode(posts[:2]).inputs["input_ids"]) == 4


def test_a_model_that_is_found_not_to_pack_when_it_is_checked(
    make_backbone: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = make_backbone(1)
    inner = backbone.model.model.language_model
    forward = inner.forward
    inner.forward = lambda **inputs: forward(**inputs | {"attention_mask": None})
    assert backbone.packs
    with caplog.at_level(logging.WARNING):
        train(backbone, tmp_path / "run")
    assert not backbone.packs and len(warnings_of(caplog)) == 1


def test_a_model_that_packs_is_not_warned_about(
    make_backbone: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = make_backbone(1)
    with caplog.at_level(logging.WARNING):
        train(backbone, tmp_path / "run")
    assert backbone.packs and not warnings_of(caplog)
