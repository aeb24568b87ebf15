"""The script that loads an export as a stranger would."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill.data.corpus import Corpus
from distill.export import reload
from distill.models.backbone import Backbone, ModelSettings, load
from distill.task.labels import LabelSpace


@pytest.fixture(scope="module")
def student(model_folder: Path) -> Backbone:
    return load(ModelSettings(image_size=56), LabelSpace(), model_folder)


@pytest.fixture(scope="module")
def expected(student: Backbone, postcards: Corpus) -> dict[str, object]:
    batches = []
    with torch.inference_mode():
        for first in (0, 3):
            inputs = student.encode(postcards.test[first : first + 3], "classify")
            last = inputs["attention_mask"].sum(1) - 1
            batches.append({"inputs": inputs, "logits": student.model(**inputs).logits[torch.arange(3), last]})
    return {"batches": batches, "label_ids": student.label_ids}


def answered(
    folder: Path, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, float]:
    """What the script prints, here without the process that it wants for itself."""
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "distill")
        reload.main(str(folder), str(path))
    return json.loads(capsys.readouterr().out)


def test_the_same_model_answers_the_same_in_a_process_without_distill(
    model_folder: Path, expected: dict[str, object], tmp_path: Path
) -> None:
    torch.save(expected, tmp_path / "expected.pt")
    command = [sys.executable, "-I", str(reload.__file__), str(model_folder), str(tmp_path / "expected.pt")]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    figures = json.loads(outcome.stdout)
    assert figures["difference"] < 1e-5
    assert (figures["labels_equal"], figures["samples"]) == (6, 6)


def test_it_refuses_a_process_that_knows_distill(
    model_folder: Path, expected: dict[str, object], tmp_path: Path
) -> None:
    torch.save(expected, tmp_path / "expected.pt")
    with pytest.raises(AssertionError):
        reload.main(str(model_folder), str(tmp_path / "expected.pt"))


def test_it_tells_by_how_much_logits_differ_and_which_labels_do(
    model_folder: Path, expected: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ids = expected["label_ids"]
    first, second = (batch["logits"].clone() for batch in expected["batches"])  # type: ignore[attr-defined]
    first[0, 5] += 0.25  # no label's
    least = second[1, ids].argmin()
    second[1, ids[least]] = second[1].max() + 1  # type: ignore[index]
    changed = [batch | {"logits": logits} for batch, logits in zip(expected["batches"], (first, second), strict=True)]  # type: ignore[call-overload]
    path = tmp_path / "expected.pt"
    torch.save({"batches": changed[:1], "label_ids": ids}, path)
    figures = answered(model_folder, path, monkeypatch, capsys)
    assert figures["difference"] == pytest.approx(0.25, abs=1e-4) and figures["labels_equal"] == 3
    torch.save({"batches": changed, "label_ids": ids}, path)
    figures = answered(model_folder, path, monkeypatch, capsys)
    assert (figures["labels_equal"], figures["samples"]) == (5, 6)


def test_what_is_no_number_differs_without_end(
    model_folder: Path, expected: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    batch = expected["batches"][0]  # type: ignore[index]
    logits = batch["logits"].clone()
    logits[1, 7] = torch.nan
    torch.save({"batches": [batch | {"logits": logits}], "label_ids": expected["label_ids"]}, tmp_path / "e.pt")
    assert answered(model_folder, tmp_path / "e.pt", monkeypatch, capsys)["difference"] == float("inf")
