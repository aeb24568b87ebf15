"""Stage `student`: distillation from both sources of rationales and from the assistant, and the baseline."""

import csv
from pathlib import Path

import torch
from safetensors.torch import load_file

from distill.recipe import Recipe


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_it_learns_from_the_teachers_and_the_assistants_rationales(folder: Path) -> None:
    rows = lines(folder / "annotate" / "rationales.jsonl") + lines(folder / "augment" / "rationales.jsonl")
    checkpoint = torch.load(folder / "student" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2 * -(-rows // 8)
    with (folder / "student" / "metrics.csv").open(newline="") as file:
        curve = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert all(float(row[f"train/{task}_kl"]) > 0 for row in curve for task in ("reason", "classify"))


def test_the_baseline_learns_from_labels_only_for_about_as_many_steps(folder: Path) -> None:
    with (folder / "student" / "hard_labels" / "metrics.csv").open(newline="") as file:
        names = next(csv.reader(file))
    assert "train/classify_loss" in names and "train/reason_loss" not in names
    steps = [
        torch.load(folder / "student" / part / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
        for part in ("", "hard_labels")
    ]
    assert abs(steps[0] - steps[1]) <= 0.5 * steps[0]


def test_the_assistant_is_not_saved_with_the_student(finished: Recipe, folder: Path) -> None:
    """Student and assistant have the same size here, so that additional weights would be detected."""
    weights = load_file(folder / "student" / "adapter" / "model.safetensors")
    other = load_file(folder / "assistant" / "adapter" / "model.safetensors")
    assert set(weights) == set(other)
    assert not any(torch.equal(weights[name], other[name]) for name in weights if weights[name].std() > 0)
    state = torch.load(folder / "student" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert len(state) <= len(weights) + 1  # the embeddings are tied
    baseline = load_file(folder / "student" / "hard_labels" / "adapter" / "model.safetensors")
    assert not all(torch.equal(weights[name], baseline[name]) for name in weights)
