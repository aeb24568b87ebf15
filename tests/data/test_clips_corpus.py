"""The built-in corpus of videos: deterministic, balanced, and solvable only from words, face and voice together."""

import itertools
import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.clips_ceilings import ceilings
from distill import data
from distill.data import clips_corpus, synthetic_clips
from distill.data.clips import ClipReader
from distill.data.clips_corpus import LEVELS, RARE, ClipsSettings, corpus, value
from distill.data.corpus import read_corpus
from distill.data.source import DataSettings
from distill.errors import SettingsError
from distill.task.labels import LabelSpace, Scale
from distill.task.rationale import check

SMALL = ClipsSettings(labelled=54, unlabelled=27, validation=27, test=54)
LABELS = LabelSpace.from_scale(Scale())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips") / "data"
    corpus(SMALL).generate(folder)
    return folder


def rows(root: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / f"{split}.jsonl").read_text("utf-8").splitlines()]


def every(root: Path) -> list[dict[str, Any]]:
    return [row for split in ("train", "validation", "test") for row in rows(root, split)]


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_output_depends_on_the_seed_only(tmp_path: Path) -> None:
    few = ClipsSettings(labelled=3, unlabelled=2, validation=2, test=2)
    folders = [tmp_path / name for name in ("one", "two", "other")]
    for folder, seed in zip(folders, (7, 7, 8), strict=True):
        corpus(replace(few, seed=seed)).generate(folder)
    one, two, other = map(content, folders)
    assert one == two
    assert one.keys() == other.keys() and all(one[name] != other[name] for name in one)


def test_each_post_is_the_same_whatever_the_size_of_the_other_parts(root: Path, tmp_path: Path) -> None:
    corpus(replace(SMALL, labelled=2, unlabelled=0, validation=0, test=2)).generate(tmp_path / "data")
    small, large = content(tmp_path / "data"), content(root)
    assert rows(tmp_path / "data", "test") == rows(root, "test")[:2]
    assert all(small[name] == large[name] for name in small if name.endswith(".mp4"))


def test_counts_match_the_settings(root: Path) -> None:
    train = rows(root, "train")
    assert [row["label"] is not None for row in train] == [True] * 54 + [False] * 27
    assert all((row["label"] is None) == (row["rationale"] is None) for row in train)
    assert [len(rows(root, split)) for split in ("validation", "test")] == [27, 54]
    assert len({row["id"] for row in every(root)}) == len(every(root)) == 162
    assert {row["video"] for row in every(root)} == {f"clips/{path.name}" for path in (root / "clips").iterdir()}
    sizes = [path.stat().st_size for path in (root / "clips").iterdir()]
    assert np.mean(sizes) < 10_000


def test_every_cell_is_equally_frequent_in_each_part(root: Path) -> None:
    for part in (rows(root, "train")[:54], rows(root, "train")[54:], rows(root, "validation"), rows(root, "test")):
        cells = Counter(tuple(row["attributes"][name] for name in LEVELS) for row in part)
        assert set(cells) == set(itertools.product(*LEVELS.values()))
        assert set(cells.values()) == {len(part) // 27}


def test_labels_and_rationales_match_the_attributes(root: Path) -> None:
    for row in every(root):
        if row["label"] is None:
            continue
        assert row["label"] == value(row["attributes"])
        chain = check(row["rationale"], LABELS, LABELS.name(row["label"]))
        words = " ".join(chain.texts[:2])
        assert all(re.search(rf"\b{level}\b", words) for level in row["attributes"].values())


def test_words_do_not_reveal_face_or_voice(root: Path) -> None:
    shown = [*LEVELS["face"], *LEVELS["voice"]]
    assert not any(word in row["text"].lower() for row in every(root) for word in shown)


def best(posts: list[dict[str, Any]], shown: tuple[str, ...]) -> dict[str, float]:
    """The best possible figures of a predictor that is given these attributes of the posts."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for row in posts:
        groups.setdefault(tuple(row["attributes"][name] for name in shown), []).append(value(row["attributes"]))
    pairs = [(gold, np.mean(values)) for values in groups.values() for gold in values]
    gold, means = np.array(pairs).T
    return {
        "accuracy": sum(Counter(values).most_common(1)[0][1] for values in groups.values()) / len(posts),
        "mae": sum(np.abs(np.array(values) - np.median(values)).sum() for values in groups.values()) / len(posts),
        "correlation": np.corrcoef(gold, means)[0, 1] if np.ptp(means) else 0.0,
    }


def test_no_two_modalities_are_sufficient(root: Path) -> None:
    """The figures of docs/clips.md, on the generated posts and by enumeration."""
    stated = {
        0: (7 / 27, 10 / 9, 0),
        1: (1 / 3, 8 / 9, (1 / 3) ** 0.5),
        2: (1 / 3, 2 / 3, (2 / 3) ** 0.5),
        3: (1, 0, 1),
    }
    exact = ceilings()
    for count, figures in stated.items():
        for shown in itertools.combinations(LEVELS, count):
            expected = pytest.approx(dict(zip(("accuracy", "mae", "correlation"), figures, strict=True)), abs=1e-9)
            assert best(every(root), shown) == expected
            assert exact[shown] == expected


def mouth(image: np.ndarray) -> float:
    """Whether the mouth's ends are above (positive) or below its middle: the mean height of dark red pixels."""
    red = image[28:50, 10:46].astype(float)
    dark = (red[..., 0] - red[..., 1] > 60) & (red[..., 1] < 120)
    heights = np.array([np.flatnonzero(column).mean() if column.any() else np.nan for column in dark.T])
    return float(np.nanmean(heights[14:22]) - np.nanmean([*heights[:10], *heights[26:]]))


def pitch(sound: np.ndarray) -> float:
    """The strongest frequency of a part of a sound, in Hz."""
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound)), 16000))
    return float(spectrum.argmax())


def test_face_and_voice_are_in_the_files_and_need_both_ends_of_the_time(root: Path) -> None:
    """Simple signal processing finds the attributes; the start alone leaves the movement open."""
    reader, starts = ClipReader(), Counter[tuple[str, bool]]()
    for row in rows(root, "test"):
        frames, sound = reader.frames(root / row["video"]), reader.sound(root / row["video"])
        assert sound is not None and len(frames.images) == 8 and frames.images[0].shape == (56, 56, 3)
        assert len(sound) == pytest.approx(32_000, abs=2_000)
        smiles = [mouth(frames.images[0]) > 0, mouth(frames.images[-1]) > 0]
        assert LEVELS["face"][1 - (smiles[1] - smiles[0])] == row["attributes"]["face"]
        high = [pitch(sound[3200:8000]) > 220, pitch(sound[24000:28800]) > 220]
        assert LEVELS["voice"][1 - (high[1] - high[0])] == row["attributes"]["voice"]
        starts[row["attributes"]["face"], smiles[0]] += 1
    assert starts["still", True] and starts["still", False]


def test_the_teacher_alone_meets_every_rare_word() -> None:
    settings = ClipsSettings(labelled=900, unlabelled=0, rare=0.5, teacher=216)
    words = {word for words in RARE.values() for word in words}

    def met(part: str, count: int) -> Counter[str]:
        texts = [re.findall(r"\w+", row["text"]) for row in clips_corpus._posts(settings, part, count)]
        return Counter(word for text in texts for word in text if word in words)

    assert set(met("teacher", 216)) == words
    assert set(met("train", 900)) == {word for words in RARE.values() for word in words[::2]}


def test_without_pyav_or_an_encoder_one_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = DataSettings("clips", str(tmp_path / "data"), clips=ClipsSettings(3, 3, 0, 3, 3))
    with monkeypatch.context() as patch:
        patch.setattr(synthetic_clips, "VIDEO_CODEC", "libx999")
        with pytest.raises(SettingsError, match=r"^data\.source clips needs a PyAV with the encoder libx999"):
            read_corpus(clips, LABELS)
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.delitem(sys.modules, "distill.data.synthetic_clips")
    monkeypatch.delattr(data, "synthetic_clips")
    with pytest.raises(SettingsError, match=r"^data\.source clips needs PyAV: pip install 'distill\[media\]'$"):
        read_corpus(clips, LABELS)
    assert not list(tmp_path.iterdir())


def test_a_killed_generation_leaves_the_folder_as_it_was_and_the_next_completes_it(tmp_path: Path) -> None:
    few = ClipsSettings(labelled=2, unlabelled=0, validation=2, test=2)
    broken = replace(corpus(few), write=lambda root, counts: iter([("train", iter([{}])), 1 / 0]))
    with pytest.raises(ZeroDivisionError):
        broken.generate(tmp_path / "data")
    assert not list(tmp_path.iterdir())
    corpus(few).generate(tmp_path / "data")
    assert len(list((tmp_path / "data" / "clips").iterdir())) == 6
    (tmp_path / "data" / "clips" / "mine.mp4").write_text("mine")
    with pytest.raises(FileExistsError, match=r"contains clips/mine\.mp4; use a new or empty folder for the clips"):
        corpus(replace(few, test=3)).generate(tmp_path / "data")
