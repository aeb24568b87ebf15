"""Reading of the reasoning data that a stage wrote."""

import json
from pathlib import Path

import pytest

from distill.annotation.reasoning_data import read_rationales
from distill.errors import SettingsError
from distill.task.labels import LabelSpace

ROW = {"id": "a", "text": "hello", "label": "neutral", "rationale": "words", "source": "predicted"}


def test_rows_are_samples_with_all_their_fields(tmp_path: Path) -> None:
    path = tmp_path / "rationales.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | {"id": "b", "source": "edited"}) + "\n")
    found = list(read_rationales(path, tmp_path, LabelSpace()))
    assert [(sample.id, sample.label, sample.rationale) for sample, _ in found] == [
        ("a", "neutral", "words"),
        ("b", "neutral", "words"),
    ]
    assert [fields["source"] for _, fields in found] == ["predicted", "edited"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"label": "no such label"}, "no such label"), ({"label": None}, ""), ({"rationale": None}, "has no rationale")],
)
def test_a_row_that_cannot_be_used_is_named(change: dict[str, str | None], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rationales.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | {"id": "b"} | change) + "\n")
    with pytest.raises(SettingsError, match=rf"rationales\.jsonl, row 2: .*{reason}.*; correct the row, or delete"):
        list(read_rationales(path, tmp_path, LabelSpace()))
