"""Stage `calibrate`: thresholds from the validation split, for the student of the run."""

import json
from pathlib import Path

import pytest

from distill.cascade.cascade import Calibration
from distill.errors import SettingsError
from distill.recipe import Recipe


def test_the_calibration_is_of_the_student_and_the_validation_split(finished: Recipe, folder: Path) -> None:
    path = folder / "calibrate" / "calibration.json"
    content = json.loads(path.read_text())
    assert content["n"] == content["promise"]["n"] == 9
    chain = json.loads((folder / "chain.json").read_text())["stages"]
    student = f"student-{chain['student']['identity']}"
    found = Calibration.read(path, student)
    assert 0 < found.student_temperature <= 20 and found.measure == "entropy"
    assert set(content["models"]) == {"student", "teacher"}
    with pytest.raises(SettingsError, match="another student"):
        Calibration.read(path, "student-0123456789abcdef")


def test_the_teacher_receives_each_validation_and_test_post_once(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "evaluate" / "ledger.jsonl").read_text().splitlines()]
    ids = [line["id"] for line in lines if line["template"] == "classify"]
    assert len(ids) == len(set(ids)) == 18, "evaluate, calibrate and cascade share their answers"
