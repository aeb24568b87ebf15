"""The export of a text-only student in bfloat16, whose embeddings have a scale that is not stored."""

from pathlib import Path

import pytest
import torch

from distill.data.corpus import Corpus
from distill.export.export import ExportSettings, export
from distill.models.backbone import LoraSettings, ModelSettings, create, load
from distill.task.labels import LabelSpace
from tests.models import text_folders


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_gemma_in_sixteen_bits_passes_with_its_figures(
    dtype: str, tokenizer_folder: Path, postcards: Corpus, tmp_path: Path
) -> None:
    base = text_folders.write(tmp_path / "base", "gemma3", tokenizer_folder)
    settings = ModelSettings(str(base), lora=LoraSettings(r=4, dropout=0.0), images=False, dtype=dtype)
    backbone = create(settings, LabelSpace(), tmp_path)
    for name, weights in backbone.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, 0, 0.05)
    backbone.save(tmp_path / "student")
    student = load(settings, LabelSpace(), tmp_path / "student")
    result = export(
        student,
        postcards.validation,
        tmp_path / "export",
        tmp_path / "student",
        "card",
        ExportSettings(check_samples=8),
    )
    assert result["steps"]["saving"] <= result["float32_limit"] < result["steps"]["rounding"]
