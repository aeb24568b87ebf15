"""Stage `assistant`: trains both tasks on the teacher's rationales."""

import csv
import json
from pathlib import Path

import torch

from distill import chain
from tests import micro


def test_it_learns_both_tasks_from_the_teachers_rationales(folder: Path) -> None:
    with (folder / "assistant" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for task in ("reason", "classify"):
        losses = [float(row[f"train/{task}_loss"]) for row in rows if row[f"train/{task}_loss"]]
        assert losses[-1] < 0.5 * losses[0]
    lines = (folder / "annotate" / "rationales.jsonl").read_text().splitlines()
    checkpoint = torch.load(folder / "assistant" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == len(losses) == 25 * -(-len(lines) // 4)


def test_without_rationales_only_classification_is_trained(tmp_path: Path) -> None:
    """A recipe without an annotate section: no stage uses reasoning."""
    content = {name: part for name, part in micro.RECORDED.items() if name not in ("annotate", "augment")}
    tasks = {"tasks": {"classify": 1.0}}
    content |= {"assistant": micro.LEARNER | tasks, "student": micro.LEARNER | tasks | {"hard_labels_baseline": False}}
    recipe = micro.read(micro.write(tmp_path, content, export=None))
    assert chain.run(recipe) == ["assistant", "student", "evaluate"]
    metrics = json.loads((recipe.folder / "evaluate" / "metrics.json").read_text())
    assert set(metrics) == {"assistant", "student", "majority_class"}
    assert "parse_rate" not in metrics["student"]
