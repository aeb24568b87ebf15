"""What a run says of posts with videos and sound before it asks or trains anything."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import is_torchvision_available

from distill.stages.context import Context
from distill.stages.preflight import notices, problems
from tests import micro
from tests.models.clips import write
from tests.models.family_folders import write as write_family
from tests.models.family_table import FAMILIES
from tests.models.text_folders import write as write_text_model

IGNORED = {"video": "ignore", "audio": "ignore"}
HEARS = micro.MODEL | {"tiny": micro.MODEL["tiny"] | {"audio_hidden": 32}}


@pytest.fixture
def said(tmp_path: Path) -> Any:
    """The problems and the notices of a chain that trains a student with these settings on posts with clips."""
    data = tmp_path / "data"
    data.mkdir()
    write(data / "a.mp4", frames=3, pitch=440)

    def check(model: dict[str, Any], text: str = "words", **data_settings: Any) -> tuple[list[str], list[str]]:
        for split in ("train", "validation", "test"):
            rows = [
                {"id": f"{split}{n}", "text": "words" if n < 2 else text, "label": label}
                | ({"video": "a.mp4"} if n else {})
                for n, label in enumerate(("negative", "neutral", "positive"))
            ]
            (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"source": "jsonl", "root": str(data), "validation": ["validation.jsonl"]}
        content = {name: micro.RECORDED[name] for name in ("name", "seed", "trainer", "tracking")}
        content |= {
            "data": files | data_settings,
            "student": micro.LEARNER | {"model": model, "tasks": {"classify": 1.0}, "distillation": {"weight": 0.0}},
        }
        context = Context(micro.read(micro.write(tmp_path, content)), {})
        return problems(context, ["student"]), notices(context, ["student"])

    return check


def test_a_model_that_hears_takes_them(said: Any) -> None:
    assert said(HEARS) == ([], [])


def test_a_model_that_cannot_hear_is_refused_unless_it_ignores_the_sound(said: Any) -> None:
    assert said(micro.MODEL) == (
        [
            "student.model.audio must be ignore: Qwen2.5-VL is no family that hears, and posts have sound, which is "
            "then left out"
        ],
        [],
    )
    assert said(micro.MODEL | IGNORED) == (
        [],
        [
            "student.model.video is ignore: the videos of 6 posts are left out",
            "student.model.audio is ignore: the sounds of 6 posts are left out",
        ],
    )


def test_posts_of_which_nothing_is_left_are_counted(said: Any) -> None:
    assert said(HEARS | {"video": "ignore"}, text="")[1] == [
        "student.model.video is ignore: the videos of 6 posts are left out"
    ]
    assert said(micro.MODEL | IGNORED, text="")[1][2:] == [
        "student.model is given nothing of 3 posts without text, such as train2"
    ]


@pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is not installed")
def test_phi_4_is_refused_if_a_sound_is_left_without_its_video(said: Any, tmp_path: Path) -> None:
    path = {"path": str(write_family(FAMILIES["phi4_multimodal"], tmp_path / "phi")), "image_size": 56}
    assert said(path)[0] == []
    assert said(path | {"video": "ignore", "images": False})[0] == []
    refusal = (
        "student.model.audio must be ignore: Phi-4-multimodal hears sounds beside pictures with other weights, and "
        "posts have sound without a picture or video; or set model.images to false and model.video to ignore"
    )
    assert said(path | {"video": "ignore"})[0] == [refusal]
    assert said(path, drop_modality={"video": 0.5})[0] == [refusal]


def test_a_model_of_text_is_refused_unless_it_ignores_the_videos(
    said: Any, tokenizer_folder: Path, tmp_path: Path
) -> None:
    path = {"path": str(write_text_model(tmp_path / "llama", "llama", tokenizer_folder))}
    assert said(path | {"audio": "ignore"})[0] == [
        "student.model.video must be ignore: the model sees no pictures, and posts have videos, whose frames are then "
        "left out"
    ]
    assert said(path | IGNORED)[0] == []
