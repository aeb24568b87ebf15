"""A chain on videos with sound and words: a teacher and a student that see, hear and read, and their cascade."""

import json
from pathlib import Path
from typing import Any

import pytest

from distill import chain
from distill.recipe import Recipe
from distill.stages import report
from tests import micro

HEARS = micro.MODEL["tiny"] | {"audio_hidden": 32}
LEARNER: dict[str, Any] = {
    "model": micro.MODEL | {"tiny": HEARS, "frames": 2},
    "batch_size": 9,
    "tasks": {"classify": 1.0},
    "trainer": {"max_epochs": 1},
}
CLIPS: dict[str, Any] = {name: micro.RECORDED[name] for name in ("name", "seed", "trainer", "tracking")} | {
    "task": {"scale": {}},
    "data": {
        "source": "clips",
        "clips": {"labelled": 27, "unlabelled": 9, "validation": 9, "test": 9, "image_size": 28},
    },
    "teacher": LEARNER,
    "student": LEARNER
    | {
        "distillation": {"weight": 0.0, "label_weight": 1.0, "label_teacher": "teacher"},
        "hard_labels_baseline": False,
    },
    "evaluate": {"modalities": True},
    "calibrate": {"budget": 0.5, "min_label_mass": 0.0},
    "cascade": {"resamples": 20},
    "export": {"check_samples": 4},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    recipe = micro.read(micro.write(tmp_path_factory.mktemp("clips"), CLIPS))
    assert chain.run(recipe) == ["teacher", "student", "evaluate", "calibrate", "cascade", "export"]
    return recipe


def read(recipe: Recipe, *names: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(recipe.folder.joinpath(*names).read_text())
    return content


def test_each_modality_reaches_the_student(finished: Recipe) -> None:
    metrics = read(finished, "evaluate", "metrics.json")
    values = [
        metrics["student"]["mae"],
        *(metrics[f"student_without_{name}"]["mae"] for name in ("text", "video", "audio")),
    ]
    assert len(set(values)) == 4, "the answers change without the words, the frames or the sound"
    assert {"acc7", "acc5", "acc3", "acc2_with_zero", "correlation"} <= set(metrics["student_without_audio"])


def test_unlabelled_clips_are_scored_by_the_teacher(finished: Recipe) -> None:
    rows = (finished.folder / "student" / "soft_targets" / "labels.jsonl").read_text().splitlines()
    assert len(rows) == 36


def test_cascade_export_and_report_are_written(finished: Recipe) -> None:
    assert 0 <= read(finished, "cascade", "metrics.json")["teacher_calls_per_sample"] <= 1
    assert read(finished, "export", "export.json")["labels_equal"] == 4
    card = (finished.folder / "export" / "README.md").read_text()
    assert "posts with text, video and sound" in " ".join(card.split()) and "whose images go" not in card
    report.run(finished)
    page = (finished.folder / "report.html").read_text(encoding="utf-8")
    assert all(f"student, without {name}" in page for name in ("text", "video", "audio"))
    assert page.count('alt="image of post test-') == 9, "the gallery shows a frame of each video"


def test_a_second_run_does_nothing_and_a_changed_clip_is_noticed(finished: Recipe) -> None:
    assert chain.run(finished) == []
    clip = Path(finished.data.root) / "clips" / "test-0000.mp4"
    clip.write_bytes(clip.with_name("test-0001.mp4").read_bytes())
    assert chain.run(finished)[0] == "teacher"
