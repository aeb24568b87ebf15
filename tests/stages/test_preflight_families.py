"""Models of other kinds and families that do not fit the posts stop a run before its first question."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from PIL import Image
from transformers.utils import is_torchvision_available

from tests import micro
from tests.commands import Command
from tests.models.family_folders import write as write_family
from tests.models.family_table import FAMILIES
from tests.stages.preflight_runs import pretrained, refused

__all__ = ["refused"]

Refused = Callable[..., str]


def saved(config: t.PretrainedConfig, folder: Path, architecture: str = "") -> str:
    if architecture:
        config.architectures = [architecture]
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("config", "architecture", "reason"),
    [
        (t.T5Config(), "", "is an encoder-decoder model (t5); it must be a decoder, which continues its prompt"),
        (t.Florence2Config(), "",
         "is an encoder-decoder model (florence2); it must be a decoder, which continues its prompt"),
        (t.WhisperConfig(), "", "is a model of audio (whisper); it must take images and text"),
        (t.VoxtralConfig(), "", "is a model of audio (voxtral); it must take images and text"),
        (t.BertConfig(), "BertForSequenceClassification",
         "is a BertForSequenceClassification; it must be a model that generates text"),
        (t.BertConfig(), "BertForMaskedLM", "is a BertForMaskedLM; it must be a model that generates text"),
    ],
)  # fmt: skip
def test_a_model_of_another_kind(
    config: t.PretrainedConfig, architecture: str, reason: str, refused: Refused, tmp_path: Path
) -> None:
    path = saved(config, tmp_path / "model", architecture)
    assert refused(student__model=pretrained(path)) == f"student.model.path: {path} {reason}"


def test_an_embedding_model(refused: Refused, tmp_path: Path) -> None:
    path = saved(t.Qwen3Config(), tmp_path / "model", "Qwen3ForCausalLM")
    (tmp_path / "model" / "modules.json").write_text("[]")
    message = refused(student__model=pretrained(path))
    assert message == (
        f"student.model.path: {path} is an embedding model of sentence-transformers; it must generate text"
    )


def test_a_folder_of_quantized_weights(refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "student-q4.gguf").write_bytes(b"GGUF")
    assert refused(student__model=pretrained(str(folder))) == (
        f"student.model.path: {folder} holds only quantized weights (student-q4.gguf), which cannot be trained; "
        "use the original weights"
    )


def test_an_attention_implementation_that_the_family_does_not_have(refused: Refused, tmp_path: Path) -> None:
    path = str(write_family(FAMILIES["paligemma2"], tmp_path / "model"))
    message = refused(student__model=pretrained(path, image_size=56))
    assert message == "student.model.attention: Gemma2Model does not support sdpa; use eager"


def pictured(folder: Path, without: str = "") -> dict[str, Any]:
    """The settings of nine posts with a picture each, except one of this split."""
    folder.mkdir()
    Image.new("RGB", (56, 56)).save(folder / "a.png")
    for split in ("train", "validation", "test"):
        rows = [{"id": f"{split}{n}", "text": f"{split} {n}", "label": "neutral", "image": "a.png"} for n in range(3)]
        if split == without:
            del rows[1]["image"]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: [f"{split}.jsonl"] for split in ("train", "validation", "test")}
    return {"source": "jsonl", "root": str(folder)} | files


def test_posts_without_a_picture_that_the_family_needs(refused: Refused, tmp_path: Path) -> None:
    path = str(write_family(FAMILIES["paligemma"], tmp_path / "model"))
    message = refused(data=pictured(tmp_path / "data", "validation"), student__model=pretrained(path, image_size=56))
    assert message == (
        "student.model.path: PaliGemma needs a picture in each post; 1 of 9 posts have none, such as validation1"
    )


def test_pictures_that_the_family_needs_are_left_out_neither_in_training_nor_in_evaluation(
    distill: Command, tmp_path: Path
) -> None:
    path = str(write_family(FAMILIES["paligemma"], tmp_path / "model"))
    student = {"model": pretrained(path, image_size=56), "tasks": {"classify": 1.0}, "hard_labels_baseline": False}
    student |= {"distillation": {"weight": 0.0}, "trainer": {"max_epochs": 1}}
    content = {name: micro.RECORDED[name] for name in ("name", "seed", "trainer", "tracking")} | {
        "data": pictured(tmp_path / "data"), "student": student, "evaluate": {"modalities": True},
    }  # fmt: skip
    result = distill("run", "--config", micro.write(tmp_path, content, data__drop_modality={"images": 0.5}))
    assert (result.status, result.error) == (
        2, "student.model.path: PaliGemma needs a picture in each post; remove images from data.drop_modality"
    )  # fmt: skip
    result = distill("run", "--config", micro.write(tmp_path, content, data__drop_modality={"text": 0.5}))
    assert result.status == 0, result.stderr
    metrics = json.loads((tmp_path / "runs/micro/evaluate/metrics.json").read_text())
    assert [name for name in metrics if "without" in name] == ["student_without_text"]


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_a_processor_that_needs_torchvision(refused: Refused, tmp_path: Path) -> None:
    path = str(write_family(FAMILIES["lfm2_vl"], tmp_path / "model"))
    assert refused(student__model=pretrained(path)) == (
        f"student.model.path: the processor of {path} needs torchvision, in the version that belongs to torch "
        f"{torch.__version__}: pip install torchvision"
    )


def test_an_image_size_that_the_processor_does_not_take(refused: Refused, tmp_path: Path) -> None:
    folder = write_family(FAMILIES["qwen2_vl"], tmp_path / "model")
    config = json.loads((folder / "processor_config.json").read_text())
    config["image_processor"]["do_resize"] = False  # then the size must be a multiple of 28
    (folder / "processor_config.json").write_text(json.dumps(config))
    message = refused(student__model=pretrained(str(folder), image_size=50))
    assert message.startswith("student.model.path: the processor does not take posts with 1 images and image_size 50: ")


def test_a_tokenizer_without_a_chat_template(refused: Refused, tmp_path: Path) -> None:
    folder = write_family(FAMILIES["llava"], tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    assert "has no chat template; use its instruction-tuned version" in refused(student__model=pretrained(str(folder)))


def test_packing_is_no_problem_of_a_family_that_does_not_pack(refused: Refused, tmp_path: Path) -> None:
    """The only problem is another one."""
    path = str(write_family(FAMILIES["gemma3"], tmp_path / "model"))
    changes: dict[str, Any] = {"calibrate": {"by": "risk", "risk": 0.01}, "student__distillation": {"weight": 0}}
    assert refused(student__model=pretrained(path, image_size=56), **changes).startswith("calibrate.risk: ")
