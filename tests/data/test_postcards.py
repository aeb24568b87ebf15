"""The built-in corpus: deterministic, balanced, and solvable only from text and image together."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distill.data import postcards
from distill.data.postcards import FACES, RARE_WORDS, RULE, TONES, PostcardSettings
from distill.task.labels import LabelSpace
from distill.task.rationale import check

SMALL = PostcardSettings(labelled=27, unlabelled=18, validation=9, test=36)
LABELS = LabelSpace()


def generate(root: Path, settings: PostcardSettings) -> None:
    postcards.corpus(settings).generate(root)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cards") / "data"
    generate(root, SMALL)
    return root


def rows(root: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / f"{split}.jsonl").read_text("utf-8").splitlines()]


def every(root: Path) -> list[dict[str, Any]]:
    return [row for split in ("train", "validation", "test") for row in rows(root, split)]


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_output_depends_on_the_seed_only(corpus: Path, tmp_path: Path) -> None:
    generate(tmp_path / "again", SMALL)
    assert content(tmp_path / "again") == content(corpus)
    generate(tmp_path / "other", replace(SMALL, seed=8))
    other = content(tmp_path / "other")
    assert other.keys() == content(corpus).keys()
    assert other["train.jsonl"] != content(corpus)["train.jsonl"]


def test_counts_match_the_settings(corpus: Path) -> None:
    train = rows(corpus, "train")
    assert [row["label"] is not None for row in train] == [True] * 27 + [False] * 18
    assert all((row["label"] is None) == (row["rationale"] is None) for row in train)
    for split, count in (("validation", 9), ("test", 36)):
        found = rows(corpus, split)
        assert len(found) == count and all(row["label"] and row["rationale"] for row in found)
    ids = [row["id"] for row in every(corpus)]
    assert len(set(ids)) == len(ids) == 27 + 18 + 9 + 36


def test_every_cell_is_equally_frequent_in_each_part(corpus: Path) -> None:
    parts = [rows(corpus, "train")[:27], rows(corpus, "train")[27:], rows(corpus, "validation"), rows(corpus, "test")]
    for part in parts:
        cells = Counter((row["attributes"]["tone"], row["attributes"]["face"]) for row in part)
        assert set(cells) == {(tone, face) for tone in TONES for face in FACES}
        assert set(cells.values()) == {len(part) // 9}


def ceiling(posts: list[dict[str, Any]], *shown: str) -> float:
    """The best possible accuracy from these attributes: the most frequent label for each combination of values."""
    seen: dict[tuple[str, ...], Counter[str]] = {}
    for row in posts:
        seen.setdefault(tuple(row["attributes"][name] for name in shown), Counter())[label(row)] += 1
    return sum(counts.most_common(1)[0][1] for counts in seen.values()) / len(posts)


def label(row: dict[str, Any]) -> str:
    return RULE[row["attributes"]["tone"], row["attributes"]["face"]][0]


def test_neither_text_nor_image_is_sufficient(corpus: Path) -> None:
    posts = every(corpus)
    assert ceiling(posts, "tone") == pytest.approx(5 / 9)
    assert ceiling(posts, "face") == pytest.approx(6 / 9)
    assert ceiling(posts, "tone", "face") == 1
    assert ceiling(posts) <= 4 / 9 + 1e-9


def test_labels_and_rationales_match_the_attributes(corpus: Path) -> None:
    for row in every(corpus):
        attributes = row["attributes"]
        if row["label"] is None:
            continue
        assert row["label"] == label(row)
        chain = check(row["rationale"], LABELS, row["label"])
        assert attributes["tone"] in chain.texts[0]
        assert attributes["face"] in chain.texts[1] and attributes["sky"] in chain.texts[1]


def test_the_teacher_alone_meets_every_rare_word(tmp_path: Path) -> None:
    generate(tmp_path / "data", replace(SMALL, unlabelled=900, validation=90, test=270, rare=0.5, teacher=180))

    def met(split: str) -> Counter[str]:
        words = {word for words in RARE_WORDS.values() for word in words}
        texts = [re.findall(r"\w+", row["text"]) for row in rows(tmp_path / "data", split)]
        assert all(len(words & set(text)) <= 1 for text in texts)
        return Counter(word for text in texts for word in text if word in words)

    assert met("teacher") == {word: 1 for words in RARE_WORDS.values() for word in words}
    assert set(met("train")) == {word for words in RARE_WORDS.values() for word in words[::2]}
    assert met("train").total() == pytest.approx(927 / 2, abs=60)
    assert 0.35 < sum(word not in met("train") for word in met("test").elements()) / met("test").total() < 0.65


def test_the_text_does_not_reveal_the_image(corpus: Path) -> None:
    for row in every(corpus):
        assert not any(value in row["text"].lower() for value in (*FACES, row["attributes"]["sky"]))


def test_images_have_the_given_size_and_are_distinct(corpus: Path, tmp_path: Path) -> None:
    files = [corpus / row["image"] for row in every(corpus)]
    images = [np.asarray(Image.open(file)) for file in files]
    assert {image.shape for image in images} == {(56, 56, 3)}
    assert len({image.tobytes() for image in images}) == len(files)
    generate(tmp_path / "large", PostcardSettings(labelled=9, unlabelled=0, validation=9, test=9, image_size=84))
    assert Image.open(tmp_path / "large" / "images" / "test-0000.png").size == (84, 84)


def test_the_faces_are_visible_in_the_image(corpus: Path) -> None:
    """The mean images of two expressions differ more than the means of two halves of one expression."""
    by_face: dict[str, list[np.ndarray]] = {face: [] for face in FACES}
    for row in every(corpus):
        by_face[row["attributes"]["face"]].append(np.asarray(Image.open(corpus / row["image"]), dtype=float)[25:50])
    means = {face: np.mean(images, 0) for face, images in by_face.items()}
    between = [np.abs(means[one] - means[two]).max() for one, two in (FACES[:2], FACES[1:], FACES[::2])]
    within = [np.abs(np.mean(p[::2], 0) - np.mean(p[1::2], 0)).max() for p in by_face.values()]
    assert min(between) > max(within)


def test_a_second_call_changes_nothing(corpus: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    generate(root, SMALL)
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    generate(root, SMALL)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == times
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_other_settings_replace_the_whole_corpus(tmp_path: Path) -> None:
    root = tmp_path / "data"
    generate(root, SMALL)
    generate(root, replace(SMALL, test=9))
    assert len(rows(root, "test")) == 9
    assert len(list((root / "images").iterdir())) == 27 + 18 + 9 + 9
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_folder_with_other_files_is_not_changed(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (root / "thesis.txt").write_text("three years of work")
    with pytest.raises(FileExistsError, match=r"data\.root: .* contains thesis\.txt; use a new or empty folder"):
        generate(root, SMALL)
    assert content(root) == {"thesis.txt": b"three years of work"}
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("name", ["notes.txt", "images/mine.png"])
def test_a_foreign_file_in_the_corpus_is_not_deleted(tmp_path: Path, name: str) -> None:
    root = tmp_path / "data"
    generate(root, SMALL)
    (root / name).write_text("mine")
    with pytest.raises(FileExistsError, match=rf"contains {name}"):
        generate(root, replace(SMALL, test=9))
    assert (root / name).read_text() == "mine" and len(rows(root, "test")) == 36
