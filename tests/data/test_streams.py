"""Rows of files that are read one by one, against the readers of whole files, and what is written."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.data import jsonl, streams
from distill.errors import SettingsError

ROWS = [{"id": "a", "text": "one,\ntwo"}, {"id": "b", "text": 'say "x"', "aspect": "x"}, {"id": "c", "image": "c.png"}]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "posts.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    with (tmp_path / "posts.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["other", "id", "text", "aspect", "image"])
        writer.writeheader()
        writer.writerows(ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "posts.parquet")
    return tmp_path


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_every_format_has_the_same_rows(suffix: str, files: Path) -> None:
    path = files / f"posts.{suffix}"
    found = [dict(row.fields) for row in streams.rows(path)]
    # a row of a Parquet table has the columns of the first row here
    assert found == [row if suffix != "parquet" else {n: row[n] for n in row if n in ROWS[0]} for row in ROWS]
    assert streams.count(path) == 3


def test_json_lines_are_those_of_the_reader_of_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": "1", "text": "a"}\r\n\n{"id": "2", "id": "3"}\n[]\n{"text": "caf\xe9"}\n{"te')
    found, expected = list(streams.rows(path)), list(jsonl.read(path))
    assert [(row.number, row.fields, row.problem) for row in found] == [
        (row.number, row.fields, row.problem) for row in expected
    ]
    assert len(found) == 5 and found[3].fields == {"text": "café"}


def test_a_broken_row_of_a_table_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfid,text\n1,a\n2\n3,b,c\n\n4,caf\xe9\n")
    found = list(streams.rows(path))
    assert [(row.number, row.problem) for row in found] == [
        (2, None), (3, "has 1 cells; the header has 2"), (4, "has 3 cells; the header has 2"), (6, None),
    ]  # fmt: skip
    assert found[3].fields == {"id": "4", "text": "caf\udce9"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "has no column text, image, images, video or audio; its columns are none"),
        ("a.csv", "a,b\n", "has no column text, image, images, video or audio; its columns are a, b"),
        ("a.csv", "text,text\n", "two columns have the same name"),
        ("a.parquet", "PAR1", "is not a Parquet file"),
        ("a.txt", "a", "is none of JSONL, CSV, Parquet"),
    ],
)
def test_a_file_that_holds_no_posts_is_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SettingsError, match=message):
        list(streams.rows(tmp_path / name))


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_rows_are_written_in_the_order_of_the_columns(suffix: str, tmp_path: Path) -> None:
    path, count = tmp_path / f"out.{suffix}", 10_000  # more than one group of a Parquet file
    columns = {"row": "int64", "text": "string", "price": "double"}
    streams.write(path, ({"text": f"é {n}", "row": n, "left_out": 1} for n in range(count)), columns)
    if suffix == "parquet":
        table = pq.read_table(path)
        assert table.column_names == list(columns) and table.num_rows == count
        assert table.to_pylist()[-1] == {"row": 9999, "text": "é 9999", "price": None}
    elif suffix == "csv":
        lines = path.read_text(encoding="utf-8").splitlines()
        assert (lines[0], lines[-1], len(lines)) == ("row,text,price", "9999,é 9999,", count + 1)
    else:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines[-1] == '{"row": 9999, "text": "é 9999", "price": null}' and len(lines) == count
