"""The script that computes the logits of an export in a process without distill."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill.data.corpus import Corpus
from distill.export import reload
from distill.models.backbone import Backbone, ModelSettings, load
from distill.models.encoding import Features
from distill.task.labels import LabelSpace


@pytest.fixture(scope="module")
def student(model_folder: Path) -> Backbone:
    return load(ModelSettings(image_size=56), LabelSpace(), model_folder)


@pytest.fixture(scope="module")
def batches(student: Backbone, postcards: Corpus) -> list[Features]:
    return [student.encode(postcards.test[first : first + 3], "classify") for first in (0, 3)]


def test_the_logits_are_those_of_the_model_in_a_process_without_distill(
    student: Backbone, model_folder: Path, batches: list[Features], tmp_path: Path
) -> None:
    torch.save(batches, tmp_path / "batches.pt")
    paths = [model_folder, tmp_path / "batches.pt", tmp_path / "logits.pt"]
    command = [sys.executable, "-I", str(reload.__file__), *map(str, paths)]
    subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    logits = torch.load(tmp_path / "logits.pt")
    with torch.inference_mode():
        expected = [
            student.model(**{name: value[row : row + 1] for name, value in batch.items() if name != "pixel_values"}
                          | pixels(batch, row)).logits[0, batch["attention_mask"][row].sum() - 1]
            for batch in batches for row in range(3)
        ]  # fmt: skip
    torch.testing.assert_close(logits, torch.stack(expected), atol=1e-5, rtol=0)


def pixels(batch: Features, row: int) -> Features:
    """The patches of one of three posts with one image each."""
    return {"pixel_values": batch["pixel_values"].chunk(3)[row]}


def test_the_script_fails_in_a_process_that_has_imported_distill(
    model_folder: Path, batches: list[Features], tmp_path: Path
) -> None:
    torch.save(batches, tmp_path / "batches.pt")
    with pytest.raises(AssertionError):
        reload.main(str(model_folder), str(tmp_path / "batches.pt"), str(tmp_path / "logits.pt"))
    assert not (tmp_path / "logits.pt").exists()
