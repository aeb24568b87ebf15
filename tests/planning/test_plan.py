"""The trainings of a chain before it runs: figures against counts by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.models import tiny
from distill.planning import plan
from distill.planning.workload import ChainForecast
from distill.training.batches import encode, encode_tasks
from distill.training.processes import process_count
from tests import micro
from tests.clip_files import write_clip
from tests.test_recipes import qwen_config

SERVER = {"base_url": "http://127.0.0.1:9/v1", "model": "big"}
FEW = {"labelled": 9, "unlabelled": 0, "validation": 9, "test": 9, "image_size": 28}
ALONE: dict[str, Any] = micro.RECORDED | {
    "data": {"source": "postcards", "postcards": FEW},
    "student": micro.LEARNER | {"distillation": {"weight": 0.0}, "hard_labels_baseline": False},
}
ALONE = {name: section for name, section in ALONE.items() if name not in ("assistant", "augment")}
"""A student without an assistant, on a few posts."""


def trainings(
    folder: Path, content: dict[str, Any], **changes: Any
) -> tuple[dict[str, plan.TrainingForecast], ChainForecast]:
    (folder / "scratch").mkdir()
    forecast = ChainForecast(micro.read(micro.write(folder, content, **changes)), folder / "scratch")
    problems: list[str] = []
    found = {training.name: training for training in plan.forecast_trainings(forecast, problems)}
    assert problems == []
    return found, forecast


def test_figures_equal_counts_by_hand(tmp_path: Path) -> None:
    found, forecast = trainings(tmp_path, micro.RECORDED)
    assistant, student, gold = (found[name] for name in ("assistant", "student", "hard labels"))
    assert [training.rows for training in found.values()] == [27, 54, 27]
    assert [training.exact for training in found.values()] == [True, False, True]
    assert [training.epochs for training in found.values()] == [2, 2, 4]  # as many steps for half as many rows
    assert [training.steps for training in found.values()] == [2 * 4, 2 * 7, 4 * 4]
    rows, model = forecast.annotated_rows().samples, assistant.model
    assert model is not None and assistant.tokens is not None
    tasks: Any = assistant.settings.tasks
    batch = encode(rows, model, tasks, True)
    padded = [features["input_ids"].shape[1] for features in encode_tasks(rows, model, tasks).values()]
    assert assistant.tokens[0].tokens == sum(padded)
    assert assistant.tokens[1].logits * 27 == pytest.approx(len(batch.tokens))
    assert student.source == "cached" and student.tokens is not None
    assert student.disk == pytest.approx(54 * student.tokens[1].logits * 2 * 64 + 4 * model.head.numel())
    assert gold.source == "none" and gold.tokens is not None and gold.tokens[1].logits < 10


@pytest.mark.parametrize("packing", [True, False])
def test_unlabelled_posts_and_the_prompt_of_the_label_distribution_are_counted(tmp_path: Path, packing: bool) -> None:
    options = {"student__distillation": {"label_weight": 1.0}, "student__packing": packing}
    found, forecast = trainings(tmp_path, micro.RECORDED, **options)
    student, gold = found["student"], found["hard labels"]
    assert student.rows == 27 + 27 + 9 and gold.rows == 27
    model = student.model
    assert model is not None and student.tokens is not None
    tasks: Any = student.settings.tasks
    total = 0
    for row in forecast.student_rows().samples:
        batch = encode([row], model, tasks, packing, {row.id: [0.2, 0.3, 0.5]})
        mask = batch.inputs.get("attention_mask", torch.ones_like(batch.inputs["input_ids"]))
        total += int(mask.sum())
    assert student.tokens[1].tokens * 63 == pytest.approx(total)


def test_steps_follow_from_the_arguments_of_the_trainer(tmp_path: Path) -> None:
    arguments = {"max_epochs": 3, "accumulate_grad_batches": 3, "devices": 2}
    found, _ = trainings(tmp_path, micro.RECORDED, assistant__trainer=arguments, student__trainer={"max_steps": 7})
    assert (found["assistant"].epochs, found["assistant"].steps) == (3, 3 * 1)  # 14 rows per process in 2 batches
    assert (found["student"].epochs, found["student"].steps) == (1.0, 7)


@pytest.mark.parametrize(
    ("devices", "count"), [(2, 2), ([0, 1], 2), ("0,1", 2), ("2", 2), (-1, 1), ("auto", 1), (None, 1)]
)
def test_processes_are_counted_as_by_lightning(devices: Any, count: int) -> None:
    arguments = {"accelerator": "cpu"} | ({} if devices is None else {"devices": devices})
    assert process_count(arguments) == count


def test_with_one_epoch_or_positions_all_the_assistant_runs_online(tmp_path: Path) -> None:
    content = micro.RECORDED | {"data": ALONE["data"]}
    found, _ = trainings(tmp_path, content, student__trainer={"max_epochs": 1})
    assert found["student"].source == "online"
    (second := tmp_path / "second").mkdir()
    found, _ = trainings(second, content, student__distillation={"positions": "all"})
    student = found["student"]
    assert student.source == "online" and student.tokens is not None and student.flops is not None
    assert student.tokens[1].logits == student.tokens[1].tokens
    assert student.flops[1] / student.flops[0] > 0.8  # only the padding is saved


def test_a_published_model_is_planned_without_its_weights(tmp_path: Path) -> None:
    """Qwen2.5-VL-3B and 7B from their configs, with LoRA in bfloat16."""
    words = tiny.train_tokenizer(["negative neutral positive"] * 9, 300)
    ids = {name: words.convert_tokens_to_ids(name) for name in tiny.SPECIAL_TOKENS}
    sections = {}
    for role, size in (
        ("student", (2048, 36, 16, 2, 11008, 151_936, True)),
        ("assistant", (3584, 28, 28, 4, 18944, 152_064, False)),
    ):
        config = qwen_config(*size)
        config.image_token_id, config.video_token_id = ids["<|image_pad|>"], ids["<|video_pad|>"]
        config.vision_start_token_id = ids["<|vision_start|>"]
        config.save_pretrained(tmp_path / role)
        tiny.build_processor(words).save_pretrained(tmp_path / role)
        model = {"path": str(tmp_path / role), "lora": {}, "image_size": 280, "dtype": "bfloat16"}
        sections[role] = {"model": model, "batch_size": 2, "trainer": {"max_epochs": 20, "precision": "bf16-mixed"}}
    sections["student"] |= {"hard_labels_baseline": False}
    found, _ = trainings(tmp_path, micro.RECORDED | sections, data__postcards=FEW, trainer__accelerator="gpu")
    student = found["student"]
    assert student.model is not None and student.tokens is not None and student.flops and student.memory
    assert student.tokens[1].patches == 400 and student.tokens[0].patches == 800
    before, after = student.memory
    assert before.assistant == pytest.approx(2 * 8.29e9 + 4 * 40.4e6, rel=0.01)
    assert after.assistant == 2 * 152_064 * 3584, "its output head alone"
    assert after.total < before.total
    layers = 2 * 2.775e9 * student.tokens[1].tokens  # all but the head of the 3B model, forward
    assert 2 * layers < student.flops[1] < 3 * layers < student.flops[0]
    assert student.source == "cached" and student.disk > 7168 * student.tokens[1].logits * student.rows


def test_the_memory_of_a_batch_is_that_of_the_longest_sound(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name, seconds in (("short", 1.0), ("long", 12.0)):
        write_clip(data / f"{name}.wav", pitch=440, seconds=seconds)
    rows: list[dict[str, Any]] = [
        {"id": f"p{n:02}", "text": f"post {n:02}", "label": ("negative", "positive")[n % 2], "audio": "short.wav"}
        for n in range(100)
    ]
    rows[2]["audio"] = "long.wav"  # not one of the posts that are tokenized
    lines = [json.dumps(row) + "\n" for row in rows]
    for split, part in (("train", lines[:80]), ("validation", lines[80:90]), ("test", lines[90:])):
        (data / f"{split}.jsonl").write_text("".join(part))
    files = {"source": "jsonl", "validation": ["validation.jsonl"], "root": str(data)}
    student = ALONE["student"] | {"model": micro.MODEL | {"tiny": micro.MODEL["tiny"] | {"audio_hidden": 32}}}
    student |= {"tasks": {"classify": 1.0}}
    content = {name: section for name, section in ALONE.items() if name != "annotate"}
    found, _ = trainings(tmp_path, content | {"data": files, "student": student})
    assert found["student"].tokens is not None
    for counts in found["student"].tokens:
        assert counts.longest == pytest.approx(counts.tokens + 11 * 25, abs=8)
