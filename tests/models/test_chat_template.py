"""Chat templates: that of the tokenizer alone, none, and those that cannot render a post."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from distill.errors import SettingsError
from distill.models.backbone import ModelSettings, create
from distill.models.tiny import CHAT_TEMPLATE
from distill.task.labels import LabelSpace
from distill.task.sample import Sample

LABELS = LabelSpace()
TEXT_ONLY = "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>\n{% endfor %}assistant:"


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A model without a chat template."""
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    return tmp_path / "model"


def in_tokenizer(folder: Path, template: object) -> Path:
    """Write a template where older tokenizers have it."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return folder


def settings(folder: Path) -> ModelSettings:
    return ModelSettings(str(folder), image_size=56)


@pytest.mark.parametrize("named", [False, True])
def test_the_template_of_the_tokenizer_is_used_and_saved(
    named: bool, folder: Path, model_folder: Path, mixed: list[Sample], tmp_path: Path
) -> None:
    others = [{"name": "default", "template": CHAT_TEMPLATE}, {"name": "tool_use", "template": "none"}]
    in_tokenizer(folder, others if named else CHAT_TEMPLATE)
    expected = create(settings(model_folder), LABELS, tmp_path).encode(mixed, "reason")["input_ids"]
    backbone = create(settings(folder), LABELS, tmp_path)
    assert torch.equal(backbone.encode(mixed, "reason")["input_ids"], expected)
    backbone.save(tmp_path / "saved")
    again = create(settings(tmp_path / "saved"), LABELS, tmp_path)
    assert torch.equal(again.encode(mixed, "reason")["input_ids"], expected)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template; use its instruction-tuned version, or put a chat_template.jinja into its folder"),
        (TEXT_ONLY, "cannot render a post of images and text: "),
        (TEXT_ONLY.replace("m['content']", "m['content'] | string"), "it takes the text of a message as a string only"),
        (CHAT_TEMPLATE.replace("'image'", "'picture'"), "it drops the images"),
        ("{% for", "cannot render a post of images and text: "),
        ([{"name": "tool_use", "template": CHAT_TEMPLATE}], "cannot render a post of images and text: "),
    ],
)
def test_a_model_without_a_usable_template_is_refused_before_its_weights_are_read(
    template: object, message: str, folder: Path, tmp_path: Path
) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(SettingsError) as error:
        create(settings(in_tokenizer(folder, template) if template else folder), LABELS, tmp_path, weights=False)
    assert message in str(error.value) and f"{folder} " in str(error.value) and "\n" not in str(error.value)
