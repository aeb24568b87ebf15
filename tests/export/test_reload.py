"""The script that reloads an export in a process without distill."""

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


def run_reload(
    folder: Path, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, float]:
    """The output of the script, run in this process."""
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "distill")
        reload.main(str(folder), str(path))
    return json.loads(capsys.readouterr().out)


def test_an_unchanged_model_gives_equal_results_in_a_process_without_distill(
    model_folder: Path, expected: dict[str, object], tmp_path: Path
) -> None:
    torch.save(expected, tmp_path / "expected.pt")
    command = [sys.executable, "-I", str(reload.__file__), str(model_folder), str(tmp_path / "expected.pt")]
    process = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    result = json.loads(process.stdout)
    assert result["difference"] < 1e-5
    assert (result["labels_equal"], result["samples"]) == (6, 6)


def test_the_script_fails_in_a_process_that_has_imported_distill(
    model_folder: Path, expected: dict[str, object], tmp_path: Path
) -> None:
    torch.save(expected, tmp_path / "expected.pt")
    with pytest.raises(AssertionError):
        reload.main(str(model_folder), str(tmp_path / "expected.pt"))


def test_the_result_counts_differing_logits_and_labels(
    model_folder: Path, expected: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ids = expected["label_ids"]
    first, second = (batch["logits"].clone() for batch in expected["batches"])  # type: ignore[attr-defined]
    first[0, 5] += 0.25  # not a label token
    lowest = second[1, ids].argmin()
    second[1, ids[lowest]] = second[1].max() + 1  # type: ignore[index]
    changed = [batch | {"logits": logits} for batch, logits in zip(expected["batches"], (first, second), strict=True)]  # type: ignore[call-overload]
    path = tmp_path / "expected.pt"
    torch.save({"batches": changed[:1], "label_ids": ids}, path)
    result = run_reload(model_folder, path, monkeypatch, capsys)
    assert result["difference"] == pytest.approx(0.25, abs=1e-4) and result["labels_equal"] == 3
    torch.save({"batches": changed, "label_ids": ids}, path)
    result = run_reload(model_folder, path, monkeypatch, capsys)
    assert (result["labels_equal"], result["samples"]) == (5, 6)


def test_nan_logits_count_as_an_infinite_difference(
    model_folder: Path, expected: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    batch = expected["batches"][0]  # type: ignore[index]
    logits = batch["logits"].clone()
    logits[1, 7] = torch.nan
    torch.save({"batches": [batch | {"logits": logits}], "label_ids": expected["label_ids"]}, tmp_path / "e.pt")
    assert run_reload(model_folder, tmp_path / "e.pt", monkeypatch, capsys)["difference"] == float("inf")
