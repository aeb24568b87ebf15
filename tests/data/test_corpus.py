"""Reading, validation and splitting of a corpus, with valid and invalid data."""

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill.data import corpus as corpus_module
from distill.data import images
from distill.data.corpus import Corpus, DataSettings, Dropped, read_corpus, write_quarantine
from distill.data.postcards import PostcardSettings
from distill.errors import RunError, SettingsError
from distill.task.labels import LabelSpace, Scale

LABELS = LabelSpace()
BINS = LabelSpace.from_scale(Scale())


def write(path: Path, rows: Sequence[Mapping[str, Any] | bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")


def post(name: str, **fields: Any) -> dict[str, Any]:
    return {"id": name, "text": f"text of {name}", "label": "neutral", **fields}


def save_image(path: Path, colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 12), colour).save(path)


def valid_settings(folder: Path, **settings: Any) -> DataSettings:
    """Settings of a corpus with three files of one valid row each; existing files are kept."""
    for split in ("train", "validation", "test"):
        if not (folder / f"{split}.jsonl").exists():
            write(folder / f"{split}.jsonl", [post(split)])
    return DataSettings(**{"root": str(folder), "validation": ["validation.jsonl"], **settings})


def names(corpus: Corpus) -> dict[str, list[str]]:
    return {split: [sample.id for sample in getattr(corpus, split)] for split in corpus_module.SPLITS}


def test_reads_three_files(tmp_path: Path) -> None:
    save_image(tmp_path / "images" / "a.png")
    rows = [post("a", image="images/a.png"), post("b", label=None), post("c", label="positive")]
    write(tmp_path / "train.jsonl", rows)
    corpus = read_corpus(valid_settings(tmp_path), LABELS)
    assert names(corpus) == {"train": ["a", "b", "c"], "validation": ["validation"], "test": ["test"]}
    assert corpus.train[0].images == (tmp_path.resolve() / "images" / "a.png",)
    assert [sample.label for sample in corpus.train] == ["neutral", None, "positive"]
    assert corpus.dropped == [] and corpus.root == tmp_path.resolve()


def test_invalid_rows_are_dropped_with_a_reason_and_valid_ones_kept(tmp_path: Path) -> None:
    root = tmp_path / "root"
    save_image(root / "good.png")
    save_image(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "words.jpg").write_text("not an image")
    (root / "drawing.svg").write_text("<svg/>")
    (root / "short.png").write_bytes((root / "good.png").read_bytes()[:50])
    cases: list[tuple[Any, str, str]] = [
        (b'{"id": "a",', "", "is not valid JSON"),
        ({"text": "x", "label": "neutral"}, "", "id is missing"),
        (post("empty", text=" "), "empty", "there is no text, image, video or audio"),
        (post("odd", label="Neutral"), "odd", "unknown label 'Neutral'; the labels are negative, neutral, positive"),
        (post("list", label=["neutral"]), "list", "unknown label"),
        (post("value", label=0.5), "value", "unknown label 0.5"),
        (post("below", image="a/b/gone.png"), "below", "image a/b/gone.png is missing"),
        (post("out", image="../secret.png"), "out", "'../secret.png' lies outside the data root"),
        (post("link", image="link.png"), "link", "'link.png' lies outside the data root"),
        (post("words", image="words.jpg"), "words", "image words.jpg is none of JPEG"),
        (post("svg", image="drawing.svg"), "svg", "image drawing.svg is none of JPEG"),
        (post("short", images=["good.png", "short.png"]), "short", "image short.png is broken"),
        (post("first"), "first", "id 'first' is already used by train.jsonl row 1"),
        (post("\ud83d"), "\\ud83d", "the id or a file name has control characters"),
        (post("true", label=True), "true", "label must be text, not true"),
        (post("long", label="x" * 10_000), "long", "unknown label 'xxx"),
    ]
    write(root / "train.jsonl", [post("first", image="good.png"), *(row for row, _, _ in cases), post("last")])
    corpus = read_corpus(valid_settings(root), LABELS)
    assert names(corpus)["train"] == ["first", "last"]
    assert [(row.file, row.row) for row in corpus.dropped] == [("train.jsonl", i + 2) for i in range(len(cases))]
    for dropped, (_, name, reason) in zip(corpus.dropped, cases, strict=True):
        assert dropped.id == name and reason in dropped.reason and len(dropped.reason) <= 300

    write_quarantine(tmp_path / "quarantine.jsonl", corpus.dropped)
    lines = (tmp_path / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    assert [Dropped(**json.loads(line)) for line in lines] == corpus.dropped


def test_splits_may_number_their_posts_alike(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "train.jsonl", [post("1"), post("2"), post("2", text="again")])
    write(tmp_path / "test.jsonl", [post("1", text="other"), post("2", text="text  of 2"), post("3")])
    with caplog.at_level(logging.WARNING):
        corpus = read_corpus(valid_settings(tmp_path), LABELS)
    assert names(corpus) == {"train": ["1", "2"], "validation": ["validation"], "test": ["1", "3"]}
    assert corpus.test[0].text == "other"
    assert corpus.dropped == [
        Dropped("train.jsonl", 3, "2", "id '2' is already used by train.jsonl row 2"),
        Dropped("test.jsonl", 2, "2", "id '2' is already used by train.jsonl row 2 with the same content"),
    ]
    assert caplog.messages == [
        "data: 1 posts repeat a post of another split and are dropped from the later one; the first: test.jsonl row 2"
    ]


def test_encodings_and_replaced_characters_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [post("a", text="a\0b\ue000"), post("b"), post("c", text="\ud83d"), post("d", text="2024-01-05")]
    write(tmp_path / "train.jsonl", rows)
    chinese, western = post("e", text="今天真开心，朋友都来了"), post("f", text="café")
    write(tmp_path / "test.jsonl", [json.dumps(chinese, ensure_ascii=False).encode("gb18030")])
    write(tmp_path / "validation.jsonl", [json.dumps(western, ensure_ascii=False).encode("cp1252")])
    with caplog.at_level(logging.WARNING):
        corpus = read_corpus(valid_settings(tmp_path), LABELS)
    assert [sample.text for sample in corpus.train] == ["a b\ufffd", "text of b", "\ufffd", "2024-01-05"]
    assert (corpus.validation[0].text, corpus.test[0].text) == ("café", "今天真开心，朋友都来了")
    assert caplog.messages == [
        "data: 2 texts are not UTF-8 and are read by their content: 1 as cp1252, 1 as gb18030; the first: "
        "validation.jsonl row 1",
        "data: 3 control, private-use or invalid characters in 2 rows are replaced; the first: train.jsonl row 1",
    ]


def test_whole_numbers_are_label_names(tmp_path: Path) -> None:
    labels = LabelSpace.from_names(["0", "1", "2"])
    rows = [post(f"p{i}", label=label) for i, label in enumerate([2, 1.0, "0", 0, 1.5, True, 7])]
    for split in corpus_module.SPLITS:
        write(tmp_path / f"{split}.jsonl", rows if split == "train" else [post(split, label=0)])
    corpus = read_corpus(valid_settings(tmp_path), labels)
    assert [sample.label for sample in corpus.train] == ["2", "1", "0", "0"]
    assert [row.reason for row in corpus.dropped] == [
        "unknown label 1.5; the labels are 0, 1, 2",
        "label must be text, not true",
        "unknown label '7'; the labels are 0, 1, 2",
    ]


def test_a_linked_data_folder_is_read(tmp_path: Path) -> None:
    save_image(tmp_path / "disk" / "images" / "a.png")
    write(tmp_path / "disk" / "train.jsonl", [post("a", image="images/a.png")])
    settings = valid_settings(tmp_path / "disk")
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    corpus = read_corpus(dataclasses.replace(settings, root=str(tmp_path / "data")), LABELS)
    assert corpus.dropped == [] and corpus.train[0].images == ((tmp_path / "disk/images/a.png").resolve(),)
    (tmp_path / "empty").mkdir()
    (tmp_path / "cards").symlink_to(tmp_path / "empty")
    cards = PostcardSettings(labelled=9, unlabelled=0, validation=9, test=9)
    read_corpus(DataSettings("postcards", str(tmp_path / "cards"), postcards=cards), LABELS)
    assert (tmp_path / "cards").is_symlink() and (tmp_path / "empty" / "train.jsonl").exists()


def test_the_id_of_a_dropped_row_can_be_used_by_another_row(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [post("a", image="gone.png"), post("a")])
    corpus = read_corpus(valid_settings(tmp_path), LABELS)
    assert names(corpus)["train"] == ["a"] and [row.row for row in corpus.dropped] == [1]


def test_rows_for_evaluation_need_a_label(tmp_path: Path) -> None:
    write(tmp_path / "validation.jsonl", [post("a", label=None), post("b")])
    corpus = read_corpus(valid_settings(tmp_path), LABELS)
    assert names(corpus)["validation"] == ["b"]
    assert corpus.dropped == [
        Dropped("validation.jsonl", 1, "a", "has no label, which every row of data.validation needs")
    ]


def test_an_image_is_decoded_once_for_all_rows_that_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_image(tmp_path / "a.png")
    decoded: list[str] = []
    decode = images.decode

    def counting(path: Path, *options: Any) -> Image.Image:
        decoded.append(path.name)
        return decode(path, *options)

    monkeypatch.setattr(corpus_module, "decode", counting)
    write(tmp_path / "train.jsonl", [post(str(i), image=("a.png", "./a.png")[i % 2]) for i in range(10)])
    assert len(read_corpus(valid_settings(tmp_path), LABELS).train) == 10
    assert decoded == ["a.png"]


def test_the_pixel_limit_is_a_setting(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    write(tmp_path / "train.jsonl", [post("a", image="a.png"), post("b")])
    assert names(read_corpus(valid_settings(tmp_path), LABELS))["train"] == ["a", "b"]
    small = read_corpus(valid_settings(tmp_path, max_pixels=143), LABELS)
    assert names(small)["train"] == ["b"] and "12 x 12 pixels, more than 143" in small.dropped[0].reason


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"data\.train: cannot read .*train\.jsonl: No such file"),
        (b"\n \n", r"data\.train: train\.jsonl has no rows"),
        (b'{"id": "a", "text": "x", "label": "odd"}\n[]\n',
         r"data\.train: none of the 2 rows of train\.jsonl can be used; row 1: unknown label 'odd'; the labels"),
        (b'\n{"id": "a", "text": "x", "image": "gone.jpg"}\n', r"row 2: image gone\.jpg is missing"),
    ],
)  # fmt: skip
def test_a_file_without_usable_rows_raises(tmp_path: Path, content: bytes | None, message: str) -> None:
    settings = valid_settings(tmp_path)
    if content is None:
        (tmp_path / "train.jsonl").unlink()
    else:
        (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(SettingsError, match=message) as caught:
        read_corpus(settings, LABELS)
    assert "\n" not in str(caught.value)


def test_the_error_names_the_file_without_usable_rows(tmp_path: Path) -> None:
    write(tmp_path / "more.jsonl", [post("a", label=None)])
    with pytest.raises(
        SettingsError, match=r"data\.test: none of the 1 rows of more\.jsonl can be used; row 1: has no l"
    ):
        read_corpus(valid_settings(tmp_path, test=["test.jsonl", "more.jsonl"]), LABELS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": []}, r"data\.train is empty; name at least one file"),
        ({"root": "/nonexistent"}, r"data\.train: cannot read /nonexistent/train\.jsonl"),
        ({"test": ["."]}, r"data\.test: cannot read"),
        ({"test": [], "test_fraction": 0.0}, r"data\.test_fraction is 0; it takes more than 0 if"),
        ({"validation": [], "validation_fraction": 1.5}, r"^validation_fraction is 1\.5; it takes at least 0, below 1"),
        ({"validation": [], "test": [], "validation_fraction": 0.5, "test_fraction": 0.5}, "must sum to less than 1"),
        ({"test": []}, r"data\.test: data\.train has too few labelled posts"),
    ],
)
def test_invalid_settings_are_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_corpus(valid_settings(tmp_path, **settings), LABELS)


def test_splits_without_a_file_are_drawn_from_train(tmp_path: Path) -> None:
    rows = [post(f"p{i}", label=("negative", "neutral", "positive", None)[i % 4]) for i in range(400)]
    write(tmp_path / "train.jsonl", rows)
    settings = valid_settings(tmp_path, validation=[], test=[], test_fraction=0.2)
    corpus = read_corpus(settings, LABELS)
    assert Counter(sample.label for sample in corpus.validation) == {"negative": 10, "neutral": 10, "positive": 10}
    assert len(corpus.test) == 60 and len(corpus.train) == 310
    assert names(corpus) == names(read_corpus(settings, LABELS))
    assert names(corpus) != names(read_corpus(dataclasses.replace(settings, seed=1), LABELS))
    assert all(sample.label is not None for sample in corpus.test)


def test_a_split_with_files_is_not_changed(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [post(f"p{i}") for i in range(100)])
    corpus = read_corpus(valid_settings(tmp_path, validation=[]), LABELS)
    assert (len(corpus.train), len(corpus.validation), names(corpus)["test"]) == (90, 10, ["test"])


def test_twitter_layout(tmp_path: Path) -> None:
    save_image(tmp_path / "photos" / "1.jpg")
    header = "index\t#1 Label\t#2 ImageID\t#3 String\t#3 String\n"
    for split in ("train", "dev", "test"):
        body = "1\t2\t1.jpg\t$T$ won\tHull\n2\t3\t1.jpg\t$T$ lost\tHull\n3\t0\t../1.jpg\t$T$ lost\tHull\n"
        (tmp_path / f"{split}.tsv").write_text(header + body)
    settings = DataSettings("twitter", str(tmp_path), ["train.tsv"], ["dev.tsv"], ["test.tsv"], images="photos")
    corpus = read_corpus(settings, LABELS)
    assert names(corpus) == {"train": ["train-1"], "validation": ["dev-1"], "test": ["test-1"]}
    sample = corpus.test[0]
    assert (sample.text, sample.aspect, sample.label) == ("Hull won", "Hull", "positive")
    assert [(row.file, row.row, row.reason[:17]) for row in corpus.dropped[:2]] == [
        ("train.tsv", 3, "unknown label '3'"),
        ("train.tsv", 4, "image 1.jpg is mi"),
    ]


def test_mvsa_layout_with_drawn_splits(tmp_path: Path) -> None:
    lines = ["ID\ttext,image"]
    for i in range(1, 61):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{i}.txt").write_text(f"text {i}")
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "data" / f"{i}.jpg")
        lines.append(f"{i}\t" + ("positive,neutral", "neutral,neutral", "negative,negative")[i % 3])
    lines.append("61\tpositive,negative")
    (tmp_path / "labelResultAll.txt").write_text("\n".join(lines))
    corpus = read_corpus(DataSettings("mvsa", str(tmp_path), ["labelResultAll.txt"], test=[]), LABELS)
    assert [len(part) for part in (corpus.train, corpus.validation, corpus.test)] == [48, 6, 6]
    assert Counter(sample.label for sample in corpus.test) == {"negative": 2, "neutral": 2, "positive": 2}
    assert corpus.dropped == [Dropped("labelResultAll.txt", 62, "61", "text is positive and image is negative")]


def test_mosi_layout_with_a_scale(tmp_path: Path) -> None:
    (tmp_path / "all.csv").write_text("id,text,label,split\na,x,3,train\nb,y,3.1,train\nc,z,-3,dev\nd,w,0.5,test\n")
    settings = DataSettings("mosi", str(tmp_path), ["all.csv"], ["all.csv"], ["all.csv"])
    corpus = read_corpus(settings, BINS)
    assert [sample.label for sample in corpus.train + corpus.validation + corpus.test] == [3.0, -3.0, 0.5]
    assert corpus.dropped == [Dropped("all.csv", 3, "b", "label 3.1 is outside the scale from -3 to 3")]
    assert len(read_corpus(settings, LabelSpace.from_scale(Scale(low=-5, high=5))).train) == 2


def test_continuous_labels_and_a_scale_require_each_other(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"data\.source mosi has continuous labels: add task\.scale"):
        read_corpus(DataSettings("mosi", str(tmp_path)), LABELS)
    message = r"task\.scale needs continuous labels: data\.source mosi or mmsa or clips, not jsonl"
    with pytest.raises(SettingsError, match=message):
        read_corpus(valid_settings(tmp_path), BINS)


def test_postcards_are_generated_and_read(tmp_path: Path) -> None:
    postcards = PostcardSettings(labelled=9, unlabelled=9, validation=9, test=9)
    settings = DataSettings("postcards", str(tmp_path / "cards"), postcards=postcards)
    corpus = read_corpus(settings, LABELS)
    assert [len(part) for part in (corpus.train, corpus.validation, corpus.test)] == [18, 9, 9]
    assert sum(sample.label is None for sample in corpus.train) == 9 and corpus.dropped == []
    write(tmp_path / "mine" / "train.jsonl", [post("a")])
    with pytest.raises(SettingsError, match=r"data\.root"):
        read_corpus(dataclasses.replace(settings, root=str(tmp_path / "mine")), LABELS)
    with pytest.raises(RunError, match="cannot write the postcards"):
        read_corpus(dataclasses.replace(settings, root=str(tmp_path / "mine" / "train.jsonl" / "below")), LABELS)
