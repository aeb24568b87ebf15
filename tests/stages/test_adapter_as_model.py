"""A chain whose student is an adapter that peft wrote: it is trained further, or merged and trained in full."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from distill.chain import run, up_to_date
from distill.models.backbone import create
from distill.stages.context import Context
from tests import micro
from tests.commands import Command
from tests.models.foreign_adapters import logits, lora, write


def learner(adapter: Path, **model: Any) -> dict[str, Any]:
    settings = {"path": str(adapter), "image_size": 28, "batch_size": 64, **model}
    return {"model": settings, "batch_size": 8, "trainer": {"max_epochs": 1}, "learning_rate": 1e-3}


@pytest.mark.slow
@pytest.mark.parametrize("continued", [True, False])
def test_a_student_that_starts_as_an_adapter_is_planned_trained_and_exported(
    continued: bool, model_folder: Path, tmp_path: Path, distill: Command
) -> None:
    shutil.copytree(model_folder, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    adapter = tmp_path / "adapter"
    write(adapter, tmp_path / "base", lora(target_modules=["q_proj", "lm_head"]))
    student = learner(adapter, lora={"r": 2} if continued else None)
    content = micro.RECORDED | {
        "assistant": None,
        "augment": None,
        "student": student | {"distillation": {"weight": 0}, "tasks": {"classify": 1.0}},
    }
    path = micro.write(tmp_path, content)
    recipe = micro.read(path)
    plan = distill("plan", "--config", path)
    assert plan.status == 0 and str(adapter) in plan.stdout, plan.stderr
    assert "export" in run(recipe)
    folder = recipe.folder
    trained = Context(recipe, {}).load("student")
    assert isinstance(trained.model, PeftModel) is continued
    start = create(recipe.student.model, recipe.labels, tmp_path)  # type: ignore[union-attr]
    assert (logits(trained.model) - logits(start.model)).abs().max() > 1e-4
    exported = AutoModelForImageTextToText.from_pretrained(folder / "export")
    torch.testing.assert_close(logits(exported), logits(trained.model), atol=1e-4, rtol=0)
    assert json.loads((folder / "export" / "export.json").read_text())["labels_equal"] == 4
    assert (folder / "export" / "adapter").exists() is continued
    card = ModelCard.load(folder / "export" / "README.md")
    assert card.data.to_dict()["license"] == "mit" and "base_model" not in card.data.to_dict()

    longer = micro.read(micro.write(tmp_path, content, student__trainer__max_epochs=2))
    assert run(longer)[0] == "student"  # continues from the checkpoint
    assert all(up_to_date(longer).values())
    (tmp_path / "base" / "README.md").write_text("---\nlicense: other\n---\n")
    assert not up_to_date(longer)["student"]
