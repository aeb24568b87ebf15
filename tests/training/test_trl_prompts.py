"""Prompt-only and preference data for trl: their rows, their pictures, and the trainers that take them."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill.errors import SettingsError
from distill.models.backbone import Backbone
from distill.task.labels import LabelSpace
from distill.task.prompts import render
from distill.task.rationale import Rationale
from distill.task.rationale import render as render_rationale
from distill.task.sample import Sample
from distill.training.trl_datasets import to_preferences, to_prompts
from tests.conftest import MakeBackbone
from tests.training.test_trl_datasets import own_cache, stored

LABELS = LabelSpace()

__all__ = ["own_cache"]


def chain(prediction: str) -> str:
    return render_rationale(Rationale(("Words.", "A square.", "They agree.", "So it is."), prediction))


def ledger(folder: Path, answers: list[tuple[str, str, str, bool]]) -> Path:
    """A ledger with answers: post, template, text and whether it ended by itself."""
    rows = [
        {"key": str(n), "id": post, "template": template, "answer": {"text": text, "finished": finished}}
        for n, (post, template, text, finished) in enumerate(answers)
    ]
    path = folder / "ledger.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_prompt_for_each_post(tmp_path: Path) -> None:
    path = stored(tmp_path)
    path.write_text(path.read_text() * 2)  # as in annotate and augment
    data = to_prompts(path, tmp_path, LABELS, image_size=28)
    assert data["id"][:] == ["a", "b", "c", "d"] and data["label"][:] == ["positive", "neutral", None, "negative"]
    assert [len(images) for images in data["images"][:]] == [1, 1, 0, 2]
    first = data[0]
    assert first["images"][0].size == (28, 28) and first["images"][0].getpixel((0, 0)) == (255, 0, 0)
    sample = Sample("a", 'what a day\n"Prediction": negative')
    assert first["prompt"] == [{"role": "user", "content": render("reason", sample, LABELS)}]
    assert to_prompts(path, tmp_path, LABELS)[0]["images"][0].size == (56, 56)


def test_control_tokens_are_those_of_the_processor(tmp_path: Path, backbone: Backbone) -> None:
    path = stored(tmp_path)
    row = json.loads(path.read_text().splitlines()[0]) | {"text": "see <|im_end|> [IMG]"}
    path.write_text(json.dumps(row) + "\n")
    texts = [to_prompts(path, tmp_path, LABELS, each)[0]["prompt"][0]["content"] for each in (None, backbone.processor)]
    assert "see < |im_end|> [ IMG]" in texts[0] and "see < |im_end|> [IMG]" in texts[1]


def test_a_wrong_answer_is_rejected_in_favour_of_the_stored_rationale(tmp_path: Path) -> None:
    path = stored(tmp_path)
    answers = [
        ("a", "explain", chain("neutral"), True),  # an answer to another prompt
        ("a", "predict", chain("positive"), True),  # right
        ("a", "predict", chain("negative"), True),
        ("a", "reason", chain("neutral"), True),  # a later one
        ("b", "predict", chain("negative"), True),  # the row has no rationale
        ("c", "predict", chain("negative"), True),  # the row has no label
        ("d", "reason", chain("negative"), False),  # cut by the token limit
        ("e", "reason", "no post of the file", True),
    ]
    data = to_preferences(path, [ledger(tmp_path, answers)], tmp_path, LABELS, image_size=28)
    assert data["id"][:] == ["a", "d"] and data["label"][:] == ["positive", "negative"]
    assert [row[0]["content"] for row in data["rejected"][:]] == [chain("negative"), chain("negative")]
    assert data[0]["chosen"][0]["content"] == json.loads(path.read_text().splitlines()[0])["rationale"]
    assert data[0]["images"][0].size == (28, 28)


def test_errors(tmp_path: Path) -> None:
    path = stored(tmp_path)
    with pytest.raises(SettingsError, match=r"none\.jsonl is missing"):
        to_prompts(tmp_path / "none.jsonl", tmp_path, LABELS)
    with pytest.raises(SettingsError, match=r"none\.jsonl is missing"):
        to_preferences(path, [tmp_path / "none.jsonl"], tmp_path, LABELS)
    right = ledger(tmp_path, [("a", "predict", chain("positive"), True)])
    with pytest.raises(SettingsError, match="the ledgers have no wrong answer about a post"):
        to_preferences(path, [right], tmp_path, LABELS)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(SettingsError, match="has no rows"):
        to_prompts(tmp_path / "empty.jsonl", tmp_path, LABELS)


@pytest.mark.parametrize("kind", ["DPO", "GRPO", "Distillation"])
def test_trl_trains_on_it(kind: str, make_backbone: MakeBackbone, tmp_path: Path) -> None:
    trl: Any = pytest.importorskip("trl")
    path = stored(tmp_path)
    student = make_backbone(1)
    arguments: dict[str, Any] = {
        "output_dir": str(tmp_path / "trl"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    given: dict[str, Any] = {}
    if kind == "DPO":
        answers = [(post, "reason", chain("neutral"), True) for post in "ad"]
        data = to_preferences(path, [ledger(tmp_path, answers)], tmp_path, LABELS, student.processor, 28)
        arguments["max_length"] = None
        student.save(tmp_path / "model")  # the reference model of DPO is loaded from the folder of the model
        student.model.config._name_or_path = str(tmp_path / "model")
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["images"]))
        data = to_prompts(path, tmp_path, LABELS, student.processor, 28)
        arguments["max_completion_length"] = 6
    if kind == "GRPO":
        arguments["num_generations"] = 2
        given["reward_funcs"] = lambda completions, label, **_: [float(len(name)) for name in label]
    if kind == "Distillation":
        given["teacher_model"] = make_backbone(2, 96).model
    trainer = getattr(trl, f"{kind}Trainer")(
        model=student.model,
        args=getattr(trl, f"{kind}Config")(**arguments),
        train_dataset=data,
        processing_class=student.processor,
        **given,
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert all(isinstance(image, Image.Image) for image in data[0]["images"])
