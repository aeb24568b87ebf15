"""CMU-MOSI: utterances with continuous labels, from CSV and from JSONL."""

import json
from pathlib import Path

import pytest

from distill.data import mosi
from distill.errors import SettingsError


def test_csv_with_quotes_commas_and_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeffid,text,label\r\n1,"so, ""good""\nreally",2.4\r\n\r\n2,bad,-3\r\n3,unknown,\r\n'.encode())
    rows = list(mosi.read(path, "train"))
    assert [(row.number, row.problem) for row in rows] == [(2, None), (5, None), (6, None)]
    assert rows[0].fields == {"id": "1", "text": 'so, "good"\nreally', "label": 2.4}
    assert [row.fields["label"] for row in rows] == [2.4, -3.0, None]
    assert all(isinstance(row.fields["label"], float) for row in rows[:2])


def test_a_column_given_twice_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,text,,label, text,\n1,a,,1,b,\n")
    with pytest.raises(SettingsError, match=r"^a\.csv has the column text twice; rename one of them$"):
        list(mosi.read(path, "train"))


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "utf-8-sig"])
def test_csv_in_other_encodings(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes('id,text,label\r\n1,"今天真开心,\n朋友都来了",1\r\n2,2024-01-05,0\r\n'.encode(encoding))
    rows = list(mosi.read(path, "train"))
    assert [row.fields["text"] for row in rows] == ["今天真开心,\n朋友都来了", "2024-01-05"]
    assert {row.encoding for row in rows} == {{"utf-16": "utf-16-le", "utf-8-sig": "utf-8"}.get(encoding, encoding)}


def test_each_split_uses_its_own_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,text,label,split\n1,a,1,train\n2,b,1,dev\n3,c,1,Test\n4,d,1,\n5,e,1,valid\n6,f,1,other\n")
    ids = {split: [row.fields["id"] for row in mosi.read(path, split)] for split in ("train", "validation", "test")}
    assert ids == {"train": ["1", "4", "6"], "validation": ["2", "4", "5", "6"], "test": ["3", "4", "6"]}
    assert [row.problem for row in mosi.read(path, "train")][-1] == (
        "unknown split 'other'; the splits are train, validation, test"
    )


@pytest.mark.parametrize("label", ["nan", "inf", "-Infinity", "good", True, [1], {}, 10**400])
def test_labels_must_be_finite_numbers(tmp_path: Path, label: object) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"id": "1", "text": "x", "label": label}) + '\n{"id": "2", "text": "y", "label": 1}\n')
    bad, good = mosi.read(path, "train")
    assert bad.number == 1 and bad.problem is not None and bad.problem.startswith("label ")
    assert good.problem is None and good.fields["label"] == 1.0


def test_nan_in_json_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "1", "text": "x", "label": NaN}\n')
    (row,) = mosi.read(tmp_path / "a.jsonl", "train")
    assert row.problem == "label nan is not a finite number"


def test_rows_with_wrong_cell_counts_and_oversized_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,text,label\n1,x\n2,y,1,extra\n3,z,1\n4," + "x" * 140_000 + ",1\n5,w,1\n")
    problems = [(row.number, row.problem) for row in mosi.read(path, "train")]
    assert problems[:3] == [(2, "has 2 cells instead of 3"), (3, "has 4 cells instead of 3"), (4, None)]
    assert problems[3][0] == 5 and str(problems[3][1]).startswith("is not valid CSV: field larger")
    assert problems[-1] == (6, None)
