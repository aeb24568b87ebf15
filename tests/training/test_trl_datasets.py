"""Stored reasoning data in trl's format: read by datasets, rendered to the same text, used by SFTTrainer."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill.errors import SettingsError
from distill.task.labels import LabelSpace
from distill.task.prompts import render
from distill.task.rationale import Rationale
from distill.task.rationale import render as render_rationale
from distill.task.sample import Sample
from distill.training.trl_datasets import to_prompt_completion

LABELS = LabelSpace()


def stored(root: Path) -> Path:
    """Write four rows as a stage does: with a rationale, without one, without an image, with two images."""
    (root / "images").mkdir(parents=True)
    for i, colour in enumerate(["red", "green", "blue"]):
        Image.new("RGB", (56, 56), colour).save(root / "images" / f"{i}.png")
    chain = render_rationale(Rationale(("Cheerful words.", "A red square.", "They agree.", "Joy."), "positive"))
    rows = [
        row("a", 'what a day\n"Prediction": negative', "positive", ["images/0.png"], chain),
        row("b", "nothing new", "neutral", ["images/1.png"], None),
        row("c", "no picture", None, [], chain),
        row("d", "two pictures", "negative", ["images/1.png", "images/2.png"], chain, aspect="the mayor"),
    ]
    path = root / "rationales.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def row(id: str, text: str, label: Any, images: list[str], rationale: str | None, aspect: str | None = None) -> dict:
    return {
        "id": id,
        "text": text,
        "aspect": aspect,
        "label": label,
        "images": images,
        "rationale": rationale,
        "source": "predict",
        "split": "train",
        "teacher_label": label,
    }


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_prompts_and_answers_are_those_of_the_two_tasks(tmp_path: Path) -> None:
    path = stored(tmp_path / "data")
    data = to_prompt_completion(path, tmp_path / "data", LABELS)
    assert data.column_names == ["prompt", "completion", "images"]
    answers = [item["completion"][0]["content"][0]["text"] for item in data]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert answers == [
        rows[0]["rationale"],
        '"Prediction": positive',
        '"Prediction": neutral',
        rows[2]["rationale"],
        rows[3]["rationale"],
        '"Prediction": negative',
    ]
    last = data[4]
    (message,) = last["prompt"]
    assert message["role"] == "user" and last["completion"][0]["role"] == "assistant"
    assert [part["type"] for part in message["content"]] == ["image", "image", "text"]
    sample = Sample("d", "two pictures", aspect="the mayor")
    assert message["content"][-1]["text"] == render("reason", sample, LABELS)
    assert [image.getpixel((0, 0)) for image in last["images"]] == [(0, 128, 0), (0, 0, 255)]


def test_a_single_task(tmp_path: Path) -> None:
    path = stored(tmp_path / "data")
    assert len(to_prompt_completion(path, tmp_path / "data", LABELS, tasks=("reason",))) == 3
    assert len(to_prompt_completion(path, tmp_path / "data", LABELS, tasks=("classify",))) == 3


def test_posts_that_need_care_are_converted(tmp_path: Path, backbone: Any) -> None:
    path = stored(tmp_path / "data")
    hostile = "see <|image_pad|> <|im_end|> <start_of_image> <image> [IMG] </s> [TOOL_CALLS] <turn|> <think>\0\ud83d"
    rows = [
        row("a", hostile, "neutral", [], f"{hostile} why"),
        row("b", "2024-01-05", 2.0, [], None) | {"images": "", "image": ""},
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    labels = LabelSpace.from_names(["neutral", "2"])
    for processor in (None, backbone.processor):
        data = to_prompt_completion(path, tmp_path / "data", labels, processor=processor)
        texts = [part["text"] for item in data for m in (*item["prompt"], *item["completion"]) for part in m["content"]]
        escaped = (
            "see < |image_pad|> < |im_end|> < start_of_image> < image> [ IMG] < /s> [ TOOL_CALLS] < turn|> < think>"
        )
        assert f'Post: "{escaped} \ufffd"' in texts[0] and texts[1] == f"{escaped} \ufffd why"
        assert 'Post: "2024-01-05"' in texts[4] and texts[5] == '"Prediction": 2'
        assert not any(token in "".join(texts) for token in backbone.processor.tokenizer.all_special_tokens)


def test_datasets_reads_the_file_directly(tmp_path: Path) -> None:
    from datasets import load_dataset

    data = load_dataset("json", data_files=str(stored(tmp_path / "data")), split="train")
    assert data["id"][:] == ["a", "b", "c", "d"]
    assert data["images"][3] == ["images/1.png", "images/2.png"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "angry"}, "row 1: unknown label 'angry'"),
        ({"images": ["../secret.png"]}, "row 1: '../secret.png' lies outside"),
        ({"images": ["images/9.png"]}, "row 1: image images/9.png is missing"),
        ({"text": "", "images": []}, "row 1: there is no text, image, video or audio"),
        ({"id": None}, "row 1: id is missing"),
        ({"label": None, "rationale": None}, "no answers to reason or classify"),
    ],
)
def test_errors_name_the_invalid_row(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = stored(tmp_path / "data")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    first = json.loads(path.read_text().splitlines()[0]) | change
    path.write_text(json.dumps(first) + "\n")
    with pytest.raises(SettingsError, match=message):
        to_prompt_completion(path, tmp_path / "data", LABELS)


def test_errors_name_the_invalid_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.jsonl is missing"):
        to_prompt_completion(tmp_path / "none.jsonl", tmp_path, LABELS)
    (tmp_path / "truncated.jsonl").write_text('{"id": "a", "text"')
    with pytest.raises(SettingsError, match=r"truncated\.jsonl row 1 is not valid JSON"):
        to_prompt_completion(tmp_path / "truncated.jsonl", tmp_path, LABELS)
    with pytest.raises(SettingsError, match="tasks must be"):
        to_prompt_completion(tmp_path / "truncated.jsonl", tmp_path, LABELS, tasks=())


def test_trl_trains_on_it(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    import torch

    from distill.models import tiny
    from distill.models.backbone import ModelSettings, create

    data = to_prompt_completion(stored(tmp_path / "data"), tmp_path / "data", LABELS)
    texts = [part["text"] for item in data for m in (*item["prompt"], *item["completion"]) for part in m["content"]]
    tiny.train_tokenizer([text for text in texts if text], 512).save_pretrained(tmp_path / "tokenizer")
    settings = ModelSettings(tiny=tiny.TinySettings(hidden=64, layers=1, vision_hidden=32), image_size=56)
    backbone = create(settings, LABELS, tmp_path / "tokenizer")
    before = {name: weight.detach().clone() for name, weight in backbone.model.named_parameters()}
    trainer = trl.SFTTrainer(
        model=backbone.model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "trl"),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            max_length=None,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
        ),
        train_dataset=data,
        processing_class=backbone.processor,
    )
    batch = trainer.data_collator([data[0], data[1]])
    learned = [ids[ids != -100] for ids in batch["labels"]]
    answers = [backbone.processor.tokenizer.decode(ids) for ids in learned]
    for answer, item in zip(answers, [data[0], data[1]], strict=True):  # only the answer and its end token have a loss
        assert answer.startswith(item["completion"][0]["content"][0]["text"] + "<|im_end|>")
        assert "<|im_start|>" not in answer
    assert batch["pixel_values"].shape[0] > 0
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.global_step == 2 and len(losses) == 2
    assert all(0 < loss < 20 for loss in losses)
    moved = {n for n, weight in backbone.model.named_parameters() if not torch.equal(weight, before[n])}
    assert any("visual" in name for name in moved) and any("language_model" in name for name in moved)
