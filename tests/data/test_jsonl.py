"""JSONL rows: reading, invalid rows and fields, and atomic writing."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from distill.data import jsonl
from distill.errors import RunError
from distill.task.sample import Sample


def test_reads_every_row_with_its_line_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": "a"}\r\n\n  \n{"id": "b", "text": "x\xe2\x80\xa8y"}\n{"id": "c"}')
    rows = list(jsonl.read(path))
    assert [(row.number, row.fields["id"], row.problem) for row in rows] == [
        (1, "a", None),
        (4, "b", None),
        (5, "c", None),
    ]
    assert rows[1].fields["text"] == "x\u2028y"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"id": "a",', "is not valid JSON"),
        (b"[1, 2]", "is not a JSON object"),
        (b"null", "is not a JSON object"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"id": "a", "label": "x", "label": "y"}', "is not valid JSON: label is given twice"),
        (b'{"id": "a", "attributes": {"k": "v", "k": "w"}}', "is not valid JSON: k is given twice"),
        (b'{"id": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'\xff\xfe{"id": "a"}', "is not valid JSON"),
    ],
)
def test_an_invalid_row_does_not_affect_the_others(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line + b'\n{"id": "b"}\n')
    rows = list(jsonl.read(path))
    assert rows[0].number == 1 and rows[0].problem is not None and rows[0].problem.startswith(problem)
    assert rows[-1].number == 2 and rows[-1].fields == {"id": "b"} and rows[-1].problem is None


def test_one_image_and_a_list_of_images(tmp_path: Path) -> None:
    root = tmp_path.resolve()
    assert jsonl.to_sample({"id": "a", "text": "x", "image": "a.jpg"}, root).images == (root / "a.jpg",)
    both = jsonl.to_sample({"id": "a", "text": "x", "images": ["a.jpg", "b/c.jpg"], "image": None}, root)
    assert both.images == (root / "a.jpg", root / "b" / "c.jpg")
    assert jsonl.to_sample({"id": "a", "images": ["a.jpg"]}, root).text == ""


def test_optional_fields(tmp_path: Path) -> None:
    plain = jsonl.to_sample({"id": 7, "text": "x", "aspect": " ", "unknown": 1}, tmp_path)
    assert plain == Sample("7", "x")
    full = {
        "id": "a",
        "text": "x",
        "aspect": "y",
        "label": "neutral",
        "rationale": "z",
        "attributes": {"k": "v", "n": None},
    }
    assert jsonl.to_sample(full, tmp_path) == Sample("a", "x", (), "y", "neutral", "z", {"k": "v"})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"text": "x"}, "id is missing"),
        ({"id": "", "text": "x"}, "id is missing"),
        ({"id": None, "text": "x"}, "id is missing"),
        ({"id": "  ", "text": "x"}, "id is missing"),
        ({"id": ["a"], "text": "x"}, "id must be text"),
        ({"id": float("inf"), "text": "x"}, "id must be text, not inf"),
        ({"id": True, "text": "x"}, "id must be text"),
        ({"id": 1.5, "text": "x"}, "id must be text"),
        ({"id": "a"}, "no text, image, video or audio"),
        ({"id": "a", "text": " \n", "images": []}, "no text, image, video or audio"),
        ({"id": "a", "text": 3}, "text must be text"),
        ({"id": "a", "text": "x", "aspect": ["y"]}, "aspect must be text"),
        ({"id": "a", "text": "x", "rationale": {}}, "rationale must be text"),
        ({"id": "a", "text": "x", "attributes": [1]}, "attributes must be an object"),
        ({"id": "a", "text": "x", "attributes": {"k": 1}}, "attributes must be text"),
        ({"id": "a", "text": "x", "images": "a.jpg"}, "images must be file names"),
        ({"id": "a", "text": ["x", "y"]}, "text must be text"),
        ({"id": "a", "text": "x", "image": {"path": "a.jpg", "bytes": None}}, "images must be file names"),
        ({"id": "a", "text": "x", "image": "/a.jpg"}, "outside the data root"),
        ({"id": "a", "text": "x", "image": "https://h/a.jpg"}, "is an address; store the file in the data root"),
        ({"id": "a", "text": "x", "image": "data:image/png;base64,iVBORw0KGgo="}, "'data:image/png;.*' is an address"),
        ({"id": "a", "text": "x", "image": "file:///a.jpg"}, "is an address"),
        ({"id": "a", "text": "x", "images": [None]}, "images must be file names"),
        ({"id": "a", "text": "x", "image": "a.jpg", "images": ["a.jpg"]}, "both given"),
        ({"id": "a", "text": "x", "image": "../a.jpg"}, "outside the data root"),
        ({"id": "\ud83d", "text": "x"}, "the id or a file name has control characters or is not valid Unicode"),
        ({"id": "a", "text": "x", "image": "a\ue000.jpg"}, "the id or a file name has control characters"),
    ],
)
def test_invalid_fields_are_named(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        jsonl.to_sample(fields, tmp_path)


def test_files_in_other_encodings_are_read(tmp_path: Path) -> None:
    for encoding in ("latin-1", "utf-8-sig", "utf-16"):
        (tmp_path / "a.jsonl").write_bytes('{"id": "a", "text": "café"}\n{"id": "b", "text": "x"}'.encode(encoding))
        rows = list(jsonl.read(tmp_path / "a.jsonl"))
        assert [jsonl.to_sample(row.fields, tmp_path).text for row in rows] == ["café", "x"]
    assert [row.encoding for row in rows] == ["utf-16-le"] * 2


def test_an_empty_image_name_is_no_image(tmp_path: Path) -> None:
    root = tmp_path.resolve()
    for empty in ({"image": ""}, {"images": ""}, {"images": [""]}, {"image": "", "images": []}, {"image": " "}):
        assert jsonl.to_sample({"id": "a", "text": "Glad we came", **empty}, root).images == ()
    assert jsonl.to_sample({"id": "a", "image": "a.jpg", "images": []}, root).images == (root / "a.jpg",)


def test_unusable_characters_are_replaced_in_every_text(tmp_path: Path) -> None:
    fields = {"id": "a", "text": "a\0b", "aspect": "\ud83dx", "rationale": "\ue000", "attributes": {"k": "\x01v"}}
    assert jsonl.to_sample(fields, tmp_path) == Sample("a", "a b", (), "\ufffdx", None, "\ufffd", {"k": " v"})


def test_a_missing_value_may_be_nan_or_blank(tmp_path: Path) -> None:
    lines = ['{"id": "a", "text": "x", "label": NaN, "aspect": NaN, "image": NaN, "rationale": NaN}',
             '{"id": "a", "text": "x", "label": " ", "aspect": "", "image": ""}']  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert [jsonl.to_sample(row.fields, tmp_path) for row in jsonl.read(tmp_path / "a.jsonl")] == [Sample("a", "x")] * 2


def test_dates_stay_texts_and_whole_numbers_are_ids(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 7.0, "text": "2024-01-05", "label": "neutral"}')
    (row,) = jsonl.read(tmp_path / "a.jsonl")
    assert jsonl.to_sample(row.fields, tmp_path) == Sample("7", "2024-01-05", label="neutral")


def test_to_sample_inverts_to_row(tmp_path: Path) -> None:
    root = tmp_path.resolve()
    samples = [
        Sample(
            "a",
            'two\nlines "quoted" \U0001f600',
            (root / "i" / "a.jpg", root / "b.jpg"),
            "y",
            "neutral",
            "z",
            {"k": "v"},
        ),
        Sample("b", "\u2028", (root / "b.jpg",)),
        Sample("c", "x", label=-1.5),
    ]
    jsonl.write_rows(root / "out" / "a.jsonl", (jsonl.to_row(sample, root) for sample in samples))
    assert [jsonl.to_sample(row.fields, root) for row in jsonl.read(root / "out" / "a.jsonl")] == samples
    lines = (root / "out" / "a.jsonl").read_text(encoding="utf-8").split("\n")
    assert list(json.loads(lines[0])) == ["id", "text", "aspect", "label", "images", "rationale", "attributes"]
    assert json.loads(lines[0])["images"] == ["i/a.jpg", "b.jpg"]
    assert "\U0001f600" in lines[0]


def test_to_row_rejects_an_image_outside_the_root(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        jsonl.to_row(Sample("a", "x", (tmp_path.parent / "a.jpg",)), tmp_path)


def test_the_datasets_library_reads_the_rows(tmp_path: Path) -> None:
    samples = [
        Sample("a", "x", (tmp_path / "a.jpg",), "y", "neutral", "z", {"k": "v"}),
        Sample("b", "x", (), None, None, None, {"other": "w"}),
        Sample("c", "x"),
    ]
    jsonl.write_rows(tmp_path / "a.jsonl", [jsonl.to_row(sample, tmp_path) for sample in samples])
    table = datasets.load_dataset(
        "json", data_files=str(tmp_path / "a.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert table["images"][:] == [["a.jpg"], [], []]
    read = [jsonl.to_sample(fields, tmp_path) for fields in table]
    assert read == [jsonl.to_sample(row.fields, tmp_path) for row in jsonl.read(tmp_path / "a.jsonl")]


def failing() -> Iterator[dict[str, Any]]:
    yield {"id": "new"}
    raise KeyError("in the middle")


def test_an_error_while_writing_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    jsonl.write_rows(path, [{"id": "old"}])
    with pytest.raises(KeyError):
        jsonl.write_rows(path, failing())
    assert path.read_text() == '{"id": "old"}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_unknown_numbers_are_written_as_null(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    jsonl.write_rows(path, [{"mass": float("nan"), "values": [1.0, float("inf")]}])
    assert path.read_text() == '{"mass": null, "values": [1.0, null]}\n'


def test_a_full_disk_raises_and_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    jsonl.write_rows(path, [{"id": "old"}])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot write .*a\.jsonl: No space left on device"):
        jsonl.write_rows(path, [{"id": "new"}])
    assert path.read_text() == '{"id": "old"}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_while_writing_keeps_the_old_file_and_the_next_write_works(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    jsonl.write_rows(path, [{"id": "old"}])
    script = (
        "import os, signal, sys, pathlib; from distill.data.jsonl import write_rows\n"
        "def rows():\n"
        "    for i in range(100_000):\n"
        "        if i == 50_000: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        yield {'id': i}\n"
        "write_rows(pathlib.Path(sys.argv[1]), rows())\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(path)], cwd=Path(__file__).parents[2], check=False)
    assert killed.returncode == -9
    assert path.read_text() == '{"id": "old"}\n'
    jsonl.write_rows(path, [{"id": "new"}])
    assert path.read_text() == '{"id": "new"}\n'
    assert list(tmp_path.iterdir()) == [path]
