"""Stage `calibrate`: thresholds from the validation split alone, for the student at hand."""

import json
from pathlib import Path

import pytest

from distill.cascade.cascade import Calibration
from distill.errors import SettingsError
from distill.recipe import Recipe


def test_the_calibration_belongs_to_the_student_and_the_validation_split(finished: Recipe, folder: Path) -> None:
    path = folder / "calibrate" / "calibration.json"
    content = json.loads(path.read_text())
    assert content["n"] == content["promise"]["n"] == 9
    chain = json.loads((folder / "chain.json").read_text())["stages"]
    student = f"student-{chain['student']['fingerprint']}"
    found = Calibration.read(path, student)
    assert 0 < found.student_temperature <= 20 and found.measure == "entropy"
    assert set(content["models"]) == {"student", "teacher"}
    with pytest.raises(SettingsError, match="another student"):
        Calibration.read(path, "student-0123456789abcdef")


def test_the_teacher_is_asked_about_validation_and_test_posts_once_each(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "evaluate" / "ledger.jsonl").read_text().splitlines()]
    asked = [line["id"] for line in lines if line["template"] == "classify"]
    assert len(asked) == len(set(asked)) == 18, "evaluate, calibrate and cascade share what was answered"
