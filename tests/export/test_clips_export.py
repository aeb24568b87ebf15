"""The export of a student that sees videos and hears: it is loaded with the sampling it was trained with."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.api import Student
from distill.data.clips import ClipReader, VideoSettings
from distill.export.card import model_card
from distill.export.export import ExportSettings, export
from distill.files import read_json
from distill.models import tiny
from distill.models.backbone import ModelSettings, create
from distill.models.local import Local
from distill.models.tiny import TinySettings
from distill.task.labels import LabelSpace
from tests.models import clips


@pytest.mark.parametrize("images", [True, False])
def test_an_exported_student_is_given_clips_as_it_was_trained(images: bool, tmp_path: Path) -> None:
    tiny.train_tokenizer(["negative neutral positive"], 400, audio=True).save_pretrained(tmp_path / "tokenizer")
    torch.manual_seed(0)
    size = TinySettings(hidden=64, vision_hidden=32, audio_hidden=32)
    settings = ModelSettings(tiny=size, images=images, image_size=56, frames=2)
    reader = ClipReader(VideoSettings(frames=3))
    student = create(settings, LabelSpace(), tmp_path / "tokenizer", clips=reader)
    student.save(tmp_path / "adapter")
    posts = clips.posts(tmp_path / "posts")
    options = ExportSettings(check_samples=8)
    student.model.eval()
    expected = Local(student, "").classify(posts).probabilities
    card = model_card("student", "", "apache-2.0", "data", "recipe", {}, posts[4], student)
    assert "each an image after its time" in card and "The sound of a post precedes" in card
    shown = ["image_url"] if images else []
    request = json.loads(card.partition("<<'JSON'\n")[2].partition("\nJSON\n")[0])
    kinds = [part["type"] for part in request["messages"][0]["content"]]
    assert kinds == [*shown, "text", "image_url", "input_audio", "text"]
    assert f"posts with text, {'images, ' if images else ''}video and sound" in " ".join(card.split())
    assert "from a tiny Qwen2.5-Omni with" in card
    result = export(student, posts, tmp_path / "export", tmp_path / "adapter", card, options)
    assert result["labels_equal"] == len(posts)
    found = read_json(tmp_path / "export" / "scoring.json")["clips"]
    assert found == {
        "video": "frames", "audio": "auto", "frames": 2, "image_size": 56,
        "sampling": {"frames": 3, "fps": None, "max_frames": 64, "max_side": 640},
    }  # fmt: skip
    again = Student.from_pretrained(tmp_path / "export")
    rows = [list(row["probabilities"].values()) for row in again.label(posts)]
    np.testing.assert_allclose(rows, expected, atol=1e-5)
