"""Stage `teacher`: what a trained teacher leaves, and what it cannot learn from."""

import csv
from pathlib import Path

import pytest
from safetensors.torch import load_file

from distill import chain
from distill.errors import SettingsError
from distill.models.backbone import load
from distill.recipe import Recipe
from tests import micro


def test_it_leaves_an_adapter_checkpoints_and_its_curve(finished: Recipe, folder: Path) -> None:
    assert finished.teacher is not None
    names = {path.name for path in (folder / "teacher").iterdir()}
    assert names == {"adapter", "checkpoints", "metrics.csv"}
    assert {path.name for path in (folder / "teacher" / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    with (folder / "teacher" / "metrics.csv").open(newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) == 25 * 7 and losses[-1] < 0.2 * losses[0]  # 27 labelled posts, four a step


def test_the_adapter_is_the_trained_model_with_the_chains_tokenizer(finished: Recipe, folder: Path) -> None:
    assert finished.teacher is not None
    teacher = load(finished.teacher.model, finished.labels, folder / "teacher" / "adapter")
    stored = load_file(folder / "teacher" / "adapter" / "model.safetensors")
    assert sum(weights.numel() for weights in stored.values()) > 50_000
    tokenizers = {path.name: path for path in (folder / "tokenizer").iterdir()}
    assert len(tokenizers) == 1, "models of one vocabulary size share one tokenizer"
    assert len(teacher.processor.tokenizer) == 600


def test_without_a_labelled_rationale_there_is_nothing_to_learn(tmp_path: Path) -> None:
    recipe = micro.read(micro.write(tmp_path, micro.TAUGHT, data__postcards__labelled=0))
    with pytest.raises(SettingsError, match="no training row has both a label and a rationale to learn from"):
        chain.run(recipe, until="teacher")
