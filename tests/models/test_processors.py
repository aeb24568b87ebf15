"""Processors with and without torchvision, on folders of tiny models named as published ones."""

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoProcessor, Qwen2_5_VLProcessor
from transformers.utils import is_torchvision_available

from distill.errors import SettingsError
from distill.models.processors import image_only, processor_class
from tests.models.family_folders import write
from tests.models.family_table import FAMILIES

without_torchvision = pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
with_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is not installed")

VIDEO = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "llava_onevision", "internvl", "minicpmv4_6")
NEED_TORCHVISION = ("mistral3", "pixtral", "molmo2", "lfm2_vl", "phi4_multimodal")


def loaded(folder: Path) -> Any:
    return processor_class(AutoConfig.from_pretrained(folder), str(folder)).from_pretrained(folder)


@pytest.mark.parametrize("kind", VIDEO)
def test_a_processor_is_saved_with_the_settings_of_its_video_processor(kind: str, tmp_path: Path) -> None:
    processor = loaded(write(FAMILIES[kind], tmp_path))
    published = json.loads((tmp_path / "processor_config.json").read_text())
    processor.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "processor_config.json").read_text())
    assert saved["processor_class"] == published["processor_class"]
    for part, name in (("image_processor", "image_processor_type"), ("video_processor", "video_processor_type")):
        assert published[part].items() <= saved[part].items(), f"{part} keeps {name} and its sizes"
    options = published.keys() - {"processor_class", "image_processor", "video_processor"}
    assert all(saved[option] == published[option] for option in options)
    shutil.copy(tmp_path / "config.json", tmp_path / "saved")
    again = loaded(tmp_path / "saved")
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()


@without_torchvision
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda processor: pickle.loads(pickle.dumps(processor))])
def test_a_processor_without_its_video_processor_can_be_copied(copied: Any, tmp_path: Path) -> None:
    processor = loaded(write(FAMILIES["internvl"], tmp_path))
    found = copied(processor)
    assert type(found) is type(processor) and found.to_dict() == processor.to_dict()
    assert found.video_processor.to_dict() == {"video_processor_type": "InternVLVideoProcessor"}


@without_torchvision
def test_a_folder_of_an_earlier_version_loads_by_the_models_config(tmp_path: Path) -> None:
    """Earlier versions saved a class of their own, without a video processor."""
    config = json.loads((write(FAMILIES["qwen2_5_vl"], tmp_path) / "processor_config.json").read_text())
    config["processor_class"] = "ImageOnlyProcessor"
    config["image_processor"]["patch_size"] = 7
    del config["video_processor"]
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    processor = loaded(tmp_path)
    assert type(processor) is image_only(Qwen2_5_VLProcessor)
    settings = processor.video_processor.to_dict()
    assert settings["patch_size"] == 7 and "image_processor_type" not in settings


@without_torchvision
@pytest.mark.parametrize("kind", NEED_TORCHVISION)
def test_a_processor_that_exists_with_torchvision_only_is_refused(kind: str, tmp_path: Path) -> None:
    write(FAMILIES[kind], tmp_path)
    with pytest.raises(SettingsError) as refused:
        loaded(tmp_path)
    assert str(refused.value) == (
        f"model.path: the processor of {tmp_path} needs torchvision, in the version that belongs to torch "
        f"{torch.__version__}: pip install torchvision"
    )


@with_torchvision
@pytest.mark.parametrize("kind", VIDEO)
@pytest.mark.parametrize("named", [True, False])
def test_a_processor_saved_without_torchvision_loads_with_it(
    kind: str, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(FAMILIES[kind], tmp_path) / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ({} if named else {"video_processor": {}})))
    with monkeypatch.context() as patch:
        patch.setattr("distill.models.processors.is_torchvision_available", lambda: False)
        processor = loaded(tmp_path)
    processor.save_pretrained(tmp_path)
    standard = AutoProcessor.from_pretrained(tmp_path)
    assert type(standard).__name__ == type(processor).__name__ and standard.video_processor is not None
    assert (
        type(standard.video_processor).__name__ == FAMILIES[kind].processor["video_processor"]["video_processor_type"]
    )
