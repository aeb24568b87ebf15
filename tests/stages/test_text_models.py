"""Chains without images: text-only models in every role, and posts whose images are left out."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.data.corpus import Corpus
from distill.files import read_json
from distill.planning.tables import plan_text
from tests import micro
from tests.commands import Command
from tests.models.text_folders import write


def learner(folder: Path, **changes: Any) -> dict[str, Any]:
    model = {"path": str(folder), "batch_size": 16, **changes}
    return {"model": model, "batch_size": 8, "learning_rate": 3e-3, "workers": 0, "trainer": {"max_epochs": 1}}


@pytest.fixture
def content(tokenizer_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """A chain of three text-only models on recorded rationales, with a cascade."""
    teacher, assistant, student = (
        write(tmp_path / name, kind, tokenizer_folder, layers=layers)
        for name, kind, layers in (("big", "qwen3", 2), ("middle", "llama", 2), ("small", "gemma3", 2))
    )
    return micro.WITH_TEACHER | {
        "annotate": {"recorded": True},
        "teacher": learner(teacher) | {"tasks": {"classify": 1.0, "review": 0.5}},
        "assistant": learner(assistant),
        "augment": {"max_new_tokens": 8},
        "student": learner(student, lora={"r": 4}) | {"hard_labels_baseline": False},
        "evaluate": {"max_new_tokens": 8, "teacher": False},
        "export": {"check_samples": 4},
    }


@pytest.mark.slow
@pytest.mark.parametrize("images", [True, False])
def test_a_chain_of_text_only_models(
    images: bool, content: dict[str, Any], postcards: Corpus, tmp_path: Path, distill: Command
) -> None:
    """On postcards whose images are left out, or on the same posts without images and without any setting."""
    if images:
        for role in ("teacher", "assistant", "student"):
            content[role]["model"]["images"] = False
    else:
        folder = tmp_path / "texts"
        folder.mkdir()
        for split in ("train", "validation", "test"):
            posts = [post for post in getattr(postcards, split) if post.label][:27]
            rows = [{"id": p.id, "text": p.text, "label": p.label, "rationale": p.rationale} for p in posts]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {split: [f"{split}.jsonl"] for split in ("train", "validation", "test")}
        content["data"] = {"source": "jsonl", "root": str(folder)} | files
    path = micro.write(tmp_path, content)
    result = distill("run", "--config", path)
    assert result.status == 0, result.stderr
    folder = micro.read(path).folder
    report = (folder / "report.html").read_text()
    left_out = "The images of the posts are left out for: assistant, student." in " ".join(report.split())
    assert left_out is images
    assert read_json(folder / "cascade" / "metrics.json")["teacher_calls_per_sample"] > 0
    assert read_json(folder / "export" / "export.json")["labels_equal"] == 4
    AutoModelForCausalLM.from_pretrained(folder / "export")
    assert AutoTokenizer.from_pretrained(folder / "export").chat_template
    again = distill("run", "--config", path)
    assert again.status == 0 and "nothing to do" in again.stdout


def test_the_plan_names_the_models_whose_images_are_left_out(content: dict[str, Any], tmp_path: Path) -> None:
    for role in ("teacher", "assistant", "student"):
        content[role]["model"]["images"] = role != "student"
    text = plan_text(micro.read(micro.write(tmp_path, content)))
    assert "student.model.images is false: the images of 54 posts are left out" in text
    assert "assistant.model.images is false" not in text
    for role in ("teacher", "assistant"):
        assert f"{role}.model.images must be false: the model reads text only" in text


def test_the_log_says_once_that_images_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from distill.chain import run

    model = micro.MODEL | {"images": False}
    content = micro.RECORDED | {"assistant": None, "augment": None, "evaluate": None, "export": None}
    content["student"] = micro.LEARNER | {"model": model, "distillation": {"weight": 0}, "hard_labels_baseline": False}
    with caplog.at_level(logging.WARNING):
        assert run(micro.read(micro.write(tmp_path, content))) == ["annotate", "student"]
    assert caplog.text.count("student.model.images is false: the images of 54 posts are left out") == 1
