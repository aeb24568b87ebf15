"""Stage `student`: distillation from both sources of rationales and from the assistant, and the baseline."""

import csv
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from distill import chain
from distill.planning.workload import ChainForecast
from distill.recipe import Recipe
from tests import micro


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


def test_labelled_posts_without_a_rationale_train_classify_alone(tmp_path: Path) -> None:
    """Of 27 labelled posts 9 have a recorded rationale: the others are left out, or train their label."""
    chain.run(recipe := micro.read(micro.write(tmp_path, micro.RECORDED, name="first")), until="annotate")
    root = Path(recipe.data.root)
    rows = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    rows = [row if n % 3 == 0 else row | {"rationale": None} for n, row in enumerate(r for r in rows if r["label"])]
    (root / "some.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = {"source": "jsonl", "root": str(root), "train": ["some.jsonl"], "validation": ["validation.jsonl"]}
    training = micro.LEARNER | {"hard_labels_baseline": False, "trainer": {"max_epochs": 1}}
    content = micro.RECORDED | {"data": data, "augment": None, "student": training, "evaluate": None, "export": None}
    steps = {}
    for labelled_posts in ("false", "true"):
        flags = [f"--{stage}.labelled_posts={labelled_posts}" for stage in ("assistant", "student")]
        recipe = micro.read(micro.write(tmp_path, content), *flags)
        forecast = ChainForecast(recipe, tmp_path / "scratch")
        assert len(forecast.assistant_rows().samples) == (27 if labelled_posts == "true" else 9)
        chain.run(recipe)
        for stage in ("assistant", "student"):
            checkpoint = torch.load(recipe.folder / stage / "checkpoints" / "last.ckpt", weights_only=True)
            steps[stage, labelled_posts] = checkpoint["global_step"]
        assert len(forecast.student_rows().samples) == (27 if labelled_posts == "true" else 9)
    assert steps == {
        ("assistant", "false"): 2 * 2, ("assistant", "true"): 2 * 4, ("student", "false"): 2, ("student", "true"): 4
    }  # fmt: skip
