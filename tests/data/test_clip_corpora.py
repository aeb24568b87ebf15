"""The layouts of MMSA and MELD, written in small and read back with real clips."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from distill.data import meld, mmsa
from distill.data.corpus import DataSettings, read_corpus
from distill.errors import SettingsError
from distill.task.labels import LabelSpace, Scale
from tests.data.clip_files import save_clip

COLUMNS = ("video_id", "clip_id", "text", "label", "label_T", "label_A", "label_V", "annotation", "mode")
LABEL_CSV = ["label.csv"]


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]], encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows([columns, *rows])


@pytest.fixture
def sims(tmp_path: Path) -> Path:
    """CH-SIMS in small: two clips of one video in training, one in each other split, a missing and a broken clip."""
    rows = [
        ("video_0001", "0001", "真好", -0.6, -0.4, -0.8, -0.2, "Negative", "train"),
        ("video_0001", "0002", "再来", 0.4, 0.2, 0.6, 0.0, "Positive", "train"),
        ("video_0002", "0001", "好", 1.0, 0.8, 0.2, 1.0, "Positive", "valid"),
        ("video_0003", "0007", "不", -1.0, -1, -1, -1, "Negative", "test"),
        ("video_0003", "0008", "gone", 0.0, 0, 0, 0, "Neutral", "test"),
        ("video_0004", "0001", "cut", 0.2, 0, 0, 0, "Neutral", "train"),
        ("video_0004", "0002", "odd", "much", 0, 0, 0, "Neutral", "train"),
        ("../video_0004", "0003", "out", 0.1, 0, 0, 0, "Neutral", "train"),
        ("", "0004", "none", 0.1, 0, 0, 0, "Neutral", "train"),
    ]
    write_table(tmp_path / "label.csv", COLUMNS, rows, "utf-8-sig")
    for number, row in enumerate(rows[:4]):
        save_clip(tmp_path / "Raw" / str(row[0]) / f"{row[1]}.mp4", 5 + number)
    broken = save_clip(tmp_path / "Raw" / "video_0004" / "0001.mp4", 5)
    broken.write_bytes(broken.read_bytes()[:700])
    return tmp_path


def settings(root: Path, **changes: str) -> DataSettings:
    files = {"train": LABEL_CSV, "validation": LABEL_CSV, "test": LABEL_CSV}
    return DataSettings("mmsa", str(root), **files, **changes)


def test_mmsa_has_its_splits_labels_and_clips(sims: Path) -> None:
    corpus = read_corpus(settings(sims), LabelSpace.from_scale(Scale(low=-1, high=1)))
    assert [post.id for post in corpus.train] == ["video_0001/0001", "video_0001/0002"]
    assert [post.id for post in corpus.validation] == ["video_0002/0001"]
    assert [post.id for post in corpus.test] == ["video_0003/0007"]
    first = corpus.train[0]
    assert (first.text, first.label, first.images) == ("真好", -0.6, ())
    assert first.video == first.audio == sims.resolve() / "Raw" / "video_0001" / "0001.mp4"
    assert {post.id: post.reason for post in corpus.dropped} == {
        "video_0003/0008": "clip Raw/video_0003/0008.mp4 is missing",
        "video_0004/0001": "clip Raw/video_0004/0001.mp4 is broken: Invalid data found when processing input",
        "video_0004/0002": "label 'much' is not a number",
        "../video_0004/0003": "clip video_0004/0003.mp4 is missing",
        "/0004": "video_id or clip_id is missing",
    }


def test_mmsa_has_labels_of_one_modality_and_needs_a_scale(sims: Path) -> None:
    corpus = read_corpus(settings(sims, label_column="label_A"), LabelSpace.from_scale(Scale(low=-1, high=1)))
    assert [post.label for post in corpus.train] == [-0.8, 0.6]
    with pytest.raises(SettingsError, match=r"^data\.source mmsa has continuous labels: add task\.scale"):
        read_corpus(settings(sims), LabelSpace())
    rows = list(mmsa.read(sims / "label.csv", sims, "test", "label_X"))
    assert rows[0].problem == "has no column label_X"


def test_mmsa_names_an_unknown_split(tmp_path: Path) -> None:
    write_table(tmp_path / "label.csv", COLUMNS, [("a", "1", "x", 1, 1, 1, 1, "", "other"), ("b", "1", "x")])
    rows = list(mmsa.read(tmp_path / "label.csv", tmp_path, "train"))
    assert [(row.fields["id"], row.problem) for row in rows] == [
        ("a/1", "unknown split 'other'; the splits are train, validation, test"),
        ("b/1", "has 3 cells instead of 9"),
    ]


def test_a_row_without_a_split_is_listed_once(sims: Path) -> None:
    with (sims / "label.csv").open("a", encoding="utf-8") as file:
        file.write("video_0009,0001,x,0,0,0,0,,\n")
    corpus = read_corpus(settings(sims), LabelSpace.from_scale(Scale(low=-1, high=1)))
    reasons = [post.reason for post in corpus.dropped if post.id == "video_0009/0001"]
    assert reasons == ["unknown split ''; the splits are train, validation, test"]


@pytest.mark.parametrize("missing", ["mode", "clip_id", "label"])
def test_mmsa_names_a_missing_column(tmp_path: Path, missing: str) -> None:
    columns = [name for name in COLUMNS if name != missing]
    write_table(tmp_path / "label.csv", columns, [("x",) * len(columns)])
    assert [row.problem for row in mmsa.read(tmp_path / "label.csv", tmp_path, "test")] == [f"has no column {missing}"]


MELD_COLUMNS = ("Sr No.", "Utterance", "Speaker", "Emotion", "Sentiment", "Dialogue_ID", "Utterance_ID")
MELD_FILES = {
    "train": [(1, "also I was", "A", "neutral", "neutral", 0, 0), (2, "Oh!", "B", "joy", "positive", 0, 1)],
    "dev": [(1, "No don\x92t I beg", "A", "fear", "negative", 0, 0), (2, "Why", "B", "anger", "negative", 9, 1)],
    "test": [(1, "Why do", "A", "surprise", "positive", 0, 0), (2, "x", "B", "joy", "positive", "", 1)],
}


@pytest.fixture(params=["beside", "below"])
def meld_root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    for part, rows in MELD_FILES.items():
        write_table(tmp_path / f"{part}_sent_emo.csv", MELD_COLUMNS, rows, "latin-1")
        folder = tmp_path / (meld.FOLDERS[part] if request.param == "beside" else f"{part}/{meld.FOLDERS[part]}")
        for number in range(2 if part == "train" else 1):
            save_clip(folder / f"dia0_utt{number}.mp4", 5)
    return tmp_path


@pytest.mark.parametrize(
    ("column", "labels"),
    [
        (None, ("negative", "neutral", "positive")),
        ("Emotion", ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise")),
    ],
)
def test_meld_has_its_splits_labels_and_clips(meld_root: Path, column: str | None, labels: tuple[str, ...]) -> None:
    files = {
        split: [f"{part}_sent_emo.csv"] for split, part in (("train", "train"), ("validation", "dev"), ("test", "test"))
    }
    space = LabelSpace(labels, (0,) * len(labels))
    corpus = read_corpus(DataSettings("meld", str(meld_root), **files, label_column=column), space)
    assert [post.id for post in corpus.train] == ["train_dia0_utt0", "train_dia0_utt1"]
    assert [post.label for post in corpus.train] == (["neutral", "positive"] if column is None else ["neutral", "joy"])
    assert [(post.id, post.text) for post in corpus.validation] == [("dev_dia0_utt0", "No don\u2019t I beg")]
    assert [post.video and post.video.name for post in corpus.test] == ["dia0_utt0.mp4"]
    folder = corpus.validation[0].video.parent.relative_to(meld_root.resolve()).as_posix()  # type: ignore[union-attr]
    reasons: Mapping[str, str] = {post.id: post.reason for post in corpus.dropped}
    assert reasons == {
        "dev_dia9_utt1": f"clip {folder}/dia9_utt1.mp4 is missing",
        "test_dia_utt1": "Dialogue_ID or Utterance_ID is no number",
    }


def test_a_file_that_is_none_of_melds_is_an_error(tmp_path: Path) -> None:
    write_table(tmp_path / "mine.csv", MELD_COLUMNS, [])
    with pytest.raises(SettingsError, match=r"^mine.csv is none of MELD's files, train_, dev_ and test_sent_emo.csv$"):
        list(meld.read(tmp_path / "mine.csv", tmp_path))


def test_meld_names_a_missing_column_and_clips_outside_the_root(tmp_path: Path) -> None:
    path = tmp_path / "dev_sent_emo.csv"
    write_table(path, MELD_COLUMNS[:-1], [row[:-1] for row in MELD_FILES["dev"]])
    assert {row.problem for row in meld.read(path, tmp_path)} == {"has no column Utterance_ID"}
    write_table(path, MELD_COLUMNS, MELD_FILES["dev"])
    (tmp_path / "root").mkdir()
    files = {"train": ["../dev_sent_emo.csv"], "validation": [], "test": []}
    with pytest.raises(
        SettingsError, match=r"row 2: '\.\./dev_splits_complete/dia0_utt0.mp4' lies outside the data root$"
    ):
        read_corpus(DataSettings("meld", str(tmp_path / "root"), **files), LabelSpace())
