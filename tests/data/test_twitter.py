"""TomBERT's tab-separated files without quoting."""

from pathlib import Path

import pytest

from distill.data import twitter
from distill.errors import SettingsError

HEADER = "index\t#1 Label\t#2 ImageID\t#3 String\t#3 String\n"


def write(path: Path, *rows: str, header: str = HEADER) -> Path:
    path.write_bytes((header + "".join(row + "\n" for row in rows)).encode())
    return path


def test_reads_labels_images_and_targets(tmp_path: Path) -> None:
    path = write(
        tmp_path / "dev.tsv",
        "1\t0\t11.jpg\tRT @ someone : $T$ lost against Ghent\tHull",
        "2\t1\t11.jpg\tRT @ someone : Hull lost against $T$\tGhent",
        "3\t2\t17_06_5.jpg\t$T$ and $T$ again !\t# Cork",
    )
    rows = list(twitter.read(path, "photos/all"))
    assert [row.number for row in rows] == [2, 3, 4]
    assert [row.problem for row in rows] == [None] * 3
    assert rows[0].fields == {
        "id": "dev-1",
        "text": "RT @ someone : Hull lost against Ghent",
        "aspect": "Hull",
        "label": "negative",
        "images": ["photos/all/11.jpg"],
    }
    assert rows[0].fields["text"] == rows[1].fields["text"]
    assert [row.fields["label"] for row in rows] == ["negative", "neutral", "positive"]
    assert rows[2].fields["text"] == "# Cork and # Cork again !"


def test_quotes_are_ordinary_characters(tmp_path: Path) -> None:
    path = write(
        tmp_path / "dev.tsv",
        '1\t0\t1.jpg\t" an open quote about $T$\tHull',
        '2\t1\t2.jpg\t$T$ said : "" yes "\t"Ghent',
        "3\t2\t3.jpg\tnext\u2028line \x0b of $T$\tCork\r",
    )
    texts = [row.fields["text"] for row in twitter.read(path, "images")]
    assert texts == ['" an open quote about Hull', '"Ghent said : "" yes "', "next\u2028line \x0b of Cork"]


def test_invalid_rows_have_a_problem(tmp_path: Path) -> None:
    path = write(
        tmp_path / "dev.tsv", "1\t0\t1.jpg\tonly four", "2\t0\t1.jpg\t$T$ alone\t ", "3\t7\t1.jpg\tof $T$\tHull"
    )
    short, without_target, unknown_label = twitter.read(path, "images")
    assert (short.number, short.fields["id"], short.problem) == (2, "dev-1", "has 4 columns instead of 5")
    assert (without_target.number, without_target.problem) == (3, "has no target")
    assert unknown_label.problem is None and unknown_label.fields["label"] == "7"  # checked later


def test_a_file_without_header_keeps_its_first_row(tmp_path: Path) -> None:
    path = write(tmp_path / "dev.tsv", "1\t0\t1.jpg\tof $T$\tHull", header="")
    assert [(row.number, row.fields["id"]) for row in twitter.read(path, "images")] == [(1, "dev-1")]


@pytest.mark.parametrize(
    "header",
    [
        "Index\tLabel\tImageID\tString\tString",
        "id\tlabel\timage\ttext\taspect",
        "\ufeff" + HEADER[:-1],
        "\n" + HEADER[:-1],
        '"index"\t"label"\t"image"\t"text"\t"aspect"',
        "\t#1 Label\t#2 ImageID\t#3 String\t#3 String",
    ],
)
def test_a_header_has_no_number(tmp_path: Path, header: str) -> None:
    path = write(tmp_path / "dev.tsv", "1\t0\t1.jpg\tof $T$\tHull\r", header=f"{header}\r\n")
    assert [(row.fields["id"], row.fields["aspect"]) for row in twitter.read(path, "images")] == [("dev-1", "Hull")]


def test_numbers_have_several_forms_and_words_are_kept(tmp_path: Path) -> None:
    labels = ["0.0", "+1", "2.", " 2 ", "positive", ""]
    path = write(tmp_path / "dev.tsv", *(f"{n}\t{label}\t1.jpg\tof $T$\tHull" for n, label in enumerate(labels)))
    found = [row.fields["label"] for row in twitter.read(path, "images")]
    assert found == ["negative", "neutral", "positive", "positive", "positive", ""]


@pytest.mark.parametrize(
    ("labels", "found"),
    [((-1, 0, 1), "-1, 0, 1"), ((1, -1), "-1, 1"), ((1, 2, 3), "1, 2, 3"), ((0, 1, 2, 3, 4), "0, 1, 2, 3, 4"),
     (("-1.0", "0.0", "1.0"), "-1, 0, 1"), (("\u22121", "+1"), "-1, 1")],
)  # fmt: skip
def test_labels_that_are_numbered_otherwise_are_refused(tmp_path: Path, labels: tuple[object, ...], found: str) -> None:
    rows = [f"{index}\t{label}\t{index}.jpg\t$T$ opens\tthe shop" for index, label in enumerate(labels)]
    path = write(tmp_path / "minus-one.tsv", *rows)
    takes = rf"minus-one\.tsv has the labels {found}; data\.source twitter takes 0 \(negative\), 1 \(neutral\) and"
    with pytest.raises(SettingsError, match=takes.replace(" and", ", 2")):
        list(twitter.read(path, "images"))
