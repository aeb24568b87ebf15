"""Stage `teacher`: its output files, and errors on data without the required labels and rationales."""

import csv
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from distill import chain
from distill.data import jsonl
from distill.errors import SettingsError
from distill.models.backbone import load
from distill.recipe import Recipe
from distill.stages.context import Context
from tests import micro


def test_it_writes_adapter_checkpoints_and_metrics(finished: Recipe, folder: Path) -> None:
    assert finished.teacher is not None
    names = {path.name for path in (folder / "teacher").iterdir()}
    assert names == {"adapter", "checkpoints", "metrics.csv"}
    assert {path.name for path in (folder / "teacher" / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    with (folder / "teacher" / "metrics.csv").open(newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) == 25 * 7 and losses[-1] < 0.2 * losses[0]  # 27 labelled posts, four per step


def test_the_adapter_is_the_trained_model_with_the_chains_tokenizer(finished: Recipe, folder: Path) -> None:
    assert finished.teacher is not None
    teacher = load(finished.teacher.model, finished.labels, folder / "teacher" / "adapter")
    stored = load_file(folder / "teacher" / "adapter" / "model.safetensors")
    assert sum(weights.numel() for weights in stored.values()) > 50_000
    tokenizers = {path.name: path for path in (folder / "tokenizer").iterdir()}
    assert len(tokenizers) == 1, "models of one vocabulary size share one tokenizer"
    assert len(teacher.processor.tokenizer) == 600


def test_training_without_a_labelled_rationale_is_an_error(tmp_path: Path) -> None:
    recipe = micro.read(micro.write(tmp_path, micro.WITH_TEACHER, data__postcards__labelled=0))
    with pytest.raises(SettingsError, match="no training row has both a label and a rationale to learn from"):
        chain.run(recipe, until="teacher")


def test_without_an_annotate_section_a_teacher_learns_from_labels(tmp_path: Path) -> None:
    """Posts without rationales: the teacher learns the tasks classify and review."""
    content = {name: part for name, part in micro.RECORDED.items() if name not in ("annotate", "assistant", "augment")}
    content |= {"teacher": micro.LEARNER | {"tasks": {"classify": 1.0, "review": 0.5}}}
    content |= {"student": None, "evaluate": None, "export": None}
    recipe = micro.read(micro.write(tmp_path, content))
    for file in ("train", "validation", "test"):  # the postcards as user data without rationales
        Context(recipe, {}).corpus  # noqa: B018
        rows = [json.loads(line) for line in (tmp_path / "data" / f"{file}.jsonl").read_text().splitlines()]
        jsonl.write_rows(tmp_path / "data" / f"{file}.jsonl", ({**row, "rationale": None} for row in rows))
    content |= {"data": {"source": "jsonl", "validation": ["validation.jsonl"]}}
    recipe = micro.read(micro.write(tmp_path, content))
    assert chain.run(recipe) == ["teacher"]
    with (recipe.folder / "teacher" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert len(rows) == 2 * 4 and all(float(row["train/review_loss"]) > 0 for row in rows)


def test_reasoning_tasks_require_an_annotate_section(tmp_path: Path) -> None:
    removed = ("annotate", "assistant", "augment")
    content = {name: part for name, part in micro.WITH_TEACHER.items() if name not in removed}
    content |= {"student": None, "evaluate": None, "export": None}
    message = "teacher.tasks takes only classify and review without an annotate section"
    for tasks in ({"predict": 1.0, "explain": 1.0, "classify": 1.0}, {"review": 1.0}):
        with pytest.raises(SettingsError, match=message):
            micro.read(micro.write(tmp_path, content | {"teacher": micro.LEARNER | {"tasks": tasks}}))
