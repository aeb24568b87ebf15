"""MVSA: label files, and the published rule that merges text and image labels."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import pytest

from distill.data import mvsa

SINGLE = "ID\ttext,image"
MULTIPLE = "ID\ttext,image\ttext,image\ttext,image"


def layout(root: Path, lines: Sequence[str], texts: Mapping[str, bytes]) -> Path:
    (root / "data").mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (root / "data" / f"{name}.txt").write_bytes(text)
    (root / "labelResultAll.txt").write_bytes("\r\n".join(lines).encode())
    return root / "labelResultAll.txt"


def test_single(tmp_path: Path) -> None:
    path = layout(
        tmp_path,
        [SINGLE, "1\tpositive,neutral", "2\tnegative,negative", "3\tpositive,negative", "4\tneutral,positive"],
        {"1": b"one\r\n", "2": b"two", "3": b"three"},
    )
    one, two, three, four = mvsa.read(path, tmp_path)
    assert (one.number, one.fields) == (2, {"id": "1", "text": "one", "label": "positive", "images": ["data/1.jpg"]})
    assert two.fields["label"] == "negative"
    assert (three.fields["id"], three.problem) == ("3", "text is positive and image is negative")
    assert (four.number, four.problem) == (5, "text 4.txt is missing")


def test_multiple_takes_the_majority_of_each_modality(tmp_path: Path) -> None:
    path = layout(
        tmp_path,
        [
            MULTIPLE,
            "1\tpositive,neutral\tpositive,negative\tneutral,neutral",  # text positive, image neutral
            "2\tpositive,neutral\tneutral,neutral\tnegative,neutral",  # no majority for the text
            "3\tpositive,negative\tpositive,negative\tneutral,neutral",  # text positive, image negative
            "4\tneutral,neutral\tneutral,neutral\tpositive,positive",
        ],
        dict.fromkeys("1234", b"x"),
    )
    one, two, three, four = mvsa.read(path, tmp_path)
    assert one.fields["label"] == "positive" and four.fields["label"] == "neutral"
    assert two.problem == "annotators do not agree on the text: positive, neutral, negative"
    assert three.problem == "text is positive and image is negative"


@pytest.mark.parametrize("pair", list(product(mvsa.LABELS, repeat=2)))
def test_merged_labels_match_the_published_table(pair: tuple[str, str]) -> None:
    score = {"negative": -1, "neutral": 0, "positive": 1}
    if set(pair) == {"negative", "positive"}:
        with pytest.raises(ValueError, match="text is"):
            mvsa.ground_truth([pair])
    else:  # the other cells of the table are the sign of the sum
        total = sum(score[label] for label in pair)
        assert score[mvsa.ground_truth([pair])] == (total > 0) - (total < 0)


@pytest.mark.parametrize(
    "cells", ["", "\tpositive", "\tpositive,", "\t,", "\tpositive,neutral,negative", "\tpositive,Good"]
)
def test_malformed_labels_are_reported(tmp_path: Path, cells: str) -> None:
    (row,) = mvsa.read(layout(tmp_path, [SINGLE, f"1{cells}"], {"1": b"x"}), tmp_path)
    assert row.problem == "has no labels" or "is not a text,image pair of negative" in str(row.problem)


def test_texts_in_other_encodings_are_read(tmp_path: Path) -> None:
    accents, chinese = "café “très” bon – déjà vu", "今天真开心,朋友都来了"
    texts = {
        "1": "café".encode(), "2": accents.encode("cp1252"), "3": b"caf\xe9 \x81", "4": "\ufeffhi".encode(),
        "5": chinese.encode("gb18030"), "6": "don’t… 💩".encode("gb18030"), "7": "hi".encode("utf-16"),
    }  # fmt: skip
    rows = list(mvsa.read(layout(tmp_path, [SINGLE, *(f"{name}\tneutral,neutral" for name in texts)], texts), tmp_path))
    expected = ["café", accents, "café \x81", "hi", chinese, "don’t… 💩", "hi"]
    assert [row.fields["text"] for row in rows] == expected
    encodings = ["utf-8", "cp1252", "latin-1", "utf-8", "gb18030", "gb18030", "utf-16-le"]
    assert [row.encoding for row in rows] == encodings


def test_ids_cannot_read_files_outside_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    names = ["../../secret", str(tmp_path / "secret"), "link", "a\0b"]
    path = layout(root, [SINGLE, *(f"{name}\tneutral,neutral" for name in names)], {})
    (tmp_path / "secret.txt").write_text("secret")
    (root / "data" / "link.txt").symlink_to(tmp_path / "secret.txt")
    rows = list(mvsa.read(path, root))
    assert len(rows) == 4
    for row in rows:
        assert row.problem is not None and "text" not in row.fields


def test_a_label_file_in_a_folder_below_the_root(tmp_path: Path) -> None:
    path = layout(tmp_path / "MVSA_Single", [SINGLE, "1\tneutral,neutral"], {"1": b"x"})
    (row,) = mvsa.read(path, tmp_path)
    assert row.fields["images"] == ["MVSA_Single/data/1.jpg"]
