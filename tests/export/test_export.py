"""The exported student: complete, loadable with transformers alone, checked, and written atomically."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from distill.data.corpus import Corpus
from distill.errors import RunError
from distill.export.check import Check
from distill.export.export import ExportSettings, export
from distill.models.backbone import Backbone, LoraSettings, ModelSettings, create, load
from distill.task.labels import LabelSpace
from tests.reloads import new_interpreter

LABELS = LabelSpace()
FEW = ExportSettings(check_samples=4)
CARD = "---\nlicense: apache-2.0\n---\n\n# card\n"


@pytest.fixture
def student(model_folder: Path) -> Backbone:
    return load(ModelSettings(image_size=56), LABELS, model_folder)


@pytest.fixture(scope="module")
def exported(model_folder: Path, postcards: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a tiny student; read-only for tests."""
    student = load(ModelSettings(image_size=56), LABELS, model_folder)
    folder = tmp_path_factory.mktemp("run") / "export"
    with new_interpreter():
        result = export(student, postcards.test, folder, model_folder, CARD, FEW)
    assert result["samples"] == result["labels_equal"] == 4 and result["difference"] <= 1e-4
    return folder


@torch.inference_mode()
def logits_of(model: torch.nn.Module, student: Backbone, corpus: Corpus) -> torch.Tensor:
    inputs = student.encode(corpus.test[:6], "classify")
    return model(**inputs).logits[torch.arange(6), inputs["attention_mask"].sum(1) - 1]


# ---- content of the folder ----


def test_the_folder_is_complete_and_no_temporary_files_remain(exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "processor_config.json", "README.md", "export.json", "scoring.json",
    }  # fmt: skip
    assert [path.name for path in exported.parent.iterdir()] == ["export"]
    assert (exported / "README.md").read_text() == CARD
    assert json.loads((exported / "config.json").read_text())["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]


def test_the_configs_name_classes_of_transformers(exported: Path) -> None:
    """The standard processor requires a video processor config; no class of this package may be named."""
    processor = json.loads((exported / "processor_config.json").read_text())
    assert processor["processor_class"] == "Qwen2_5_VLProcessor"
    assert processor["image_processor"]["image_processor_type"] == "Qwen2VLImageProcessor"
    video, image = processor["video_processor"], processor["image_processor"]
    assert video["video_processor_type"] == "Qwen2VLVideoProcessor"
    assert all(video[name] == image[name] for name in ("patch_size", "merge_size", "image_mean", "image_std"))
    assert json.loads((exported / "tokenizer_config.json").read_text())["processor_class"] == "Qwen2_5_VLProcessor"
    for path in exported.glob("*.json"):
        assert "ImageOnlyProcessor" not in path.read_text() and "distill" not in path.read_text()


LOAD_WITHOUT_DISTILL = """
import json, sys
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

folder, posts = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForImageTextToText.from_pretrained(folder).eval()
tokenizer, image_processor = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
for text, path in posts:
    pixels = image_processor(images=[Image.open(path).convert("RGB")], return_tensors="pt")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    tokens = int(pixels["image_grid_thw"].prod()) // image_processor.merge_size**2
    prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * tokens) + '"Prediction":'
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    types = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    with torch.inference_mode():
        print(json.dumps(model(input_ids=ids, mm_token_type_ids=types, **pixels).logits[0, -1].tolist()))
assert "distill" not in sys.modules
"""


def test_the_usage_in_the_card_gives_the_students_logits_without_distill(
    exported: Path, student: Backbone, postcards: Corpus, tmp_path: Path
) -> None:
    """In a process with transformers alone, with the prompt of the card in the chat template."""
    from distill.task.prompts import render

    posts = [(render("classify", post, LABELS), str(post.images[0])) for post in postcards.test[:6]]
    command = [sys.executable, "-I", "-c", LOAD_WITHOUT_DISTILL, str(exported), json.dumps(posts)]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    logits = torch.tensor([json.loads(line) for line in process.stdout.splitlines()])
    assert torch.allclose(logits, logits_of(student.model, student, postcards), atol=1e-4)


# ---- an adapter ----


def test_an_adapter_is_merged_and_also_exported_separately(
    model_folder: Path, postcards: Corpus, tmp_path: Path
) -> None:
    settings = ModelSettings(path=str(model_folder), lora=LoraSettings(r=4, dropout=0.0), image_size=56)
    fresh = create(settings, LABELS, tmp_path)
    for name, weights in fresh.model.named_parameters():
        if "lora_B" in name:  # initialised to zero
            torch.nn.init.normal_(weights, std=0.2)
    adapter = tmp_path / "student" / "adapter"
    fresh.save(adapter)

    student = load(settings, LABELS, adapter)
    with_adapter = logits_of(student.model, student, postcards)
    plain = load(ModelSettings(image_size=56), LABELS, model_folder)
    assert (with_adapter - logits_of(plain.model, plain, postcards)).abs().max() > 0.1, "the adapter has an effect"

    folder = tmp_path / "export"
    export(student, postcards.test, folder, adapter, CARD, FEW)
    merged = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert torch.allclose(logits_of(merged, student, postcards), with_adapter, atol=1e-4)
    assert not any("lora" in name for name in load_file(folder / "model.safetensors"))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in (folder / "adapter").iterdir()
    }
    separate = load(settings, LABELS, folder / "adapter")
    assert torch.allclose(logits_of(separate.model, separate, postcards), with_adapter, atol=1e-6)


# ---- a failed export ----


def test_an_export_that_is_refused_keeps_the_earlier_one(
    exported: Path, student: Backbone, postcards: Corpus, tmp_path: Path, model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    reload = Check.reload

    def truncate(check: Check, new: Path) -> None:
        path = new / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-4000])
        reload(check, new)

    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(Check, "reload", truncate)
    with pytest.raises(RunError, match=r"^export: .* does not load with transformers alone: "):
        export(student, postcards.test, folder, model_folder, CARD, FEW)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_full_disk_keeps_the_earlier_export(
    exported: Path, student: Backbone, postcards: Corpus, tmp_path: Path, model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(student.processor, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        export(student, postcards.test, folder, model_folder, CARD, FEW)
    assert (folder / "model.safetensors").exists() and [path.name for path in tmp_path.iterdir()] == ["export"]


def test_remains_of_a_killed_process_are_replaced(
    exported: Path, student: Backbone, postcards: Corpus, tmp_path: Path, model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    dead_pid = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True).stdout.strip()
    for leftover in ("export", f".export.{dead_pid}.new", f".export.{dead_pid}.old"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "partial").write_text("x")
    export(student, postcards.test, tmp_path / "export", model_folder, CARD, ExportSettings(check_samples=0))
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert "partial" not in names and names == {path.name for path in exported.iterdir()}
