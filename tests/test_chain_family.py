"""A whole chain whose models do not pack, cap their logits and read answers by token type (PaliGemma 2)."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import micro
from tests.commands import Command
from tests.models.family_folders import write
from tests.models.family_table import FAMILIES


@pytest.mark.slow
def test_a_chain_of_a_family_with_rules_of_its_own(distill: Command, tmp_path: Path) -> None:
    path = str(write(FAMILIES["paligemma2"], tmp_path / "model"))
    model: dict[str, Any] = {"path": path, "image_size": 56, "batch_size": 16, "attention": "eager"}
    adapted = model | {"lora": {"r": 2, "targets": "all-linear"}}
    learner = {"model": adapted, "batch_size": 8, "trainer": {"max_epochs": 1}}
    recipe = micro.write(
        tmp_path, micro.RECORDED, assistant=learner, augment={"max_new_tokens": 8}, evaluate={"max_new_tokens": 8},
        student=learner | {"hard_labels_baseline": False, "distillation": {"soft_targets": "cached"}},
        calibrate={"budget": 0.5, "min_label_mass": 0.0}, cascade={"resamples": 20, "teacher": {"model": model}},
    )  # fmt: skip
    assert "Problems that stop" not in distill("plan", "--config", recipe).stdout
    result = distill("run", "--config", recipe)
    assert result.status == 0, result.stderr
    run = tmp_path / "runs" / "micro"
    assert all(stage["status"] == "done" for stage in json.loads((run / "chain.json").read_text())["stages"].values())
    assert json.loads((run / "cascade" / "metrics.json").read_text())["n"] == 9
    export = json.loads((run / "export" / "export.json").read_text())
    assert export["labels_equal"] == export["samples"] == 4
