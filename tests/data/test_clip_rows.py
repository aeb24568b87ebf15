"""Videos and sounds of rows and of posts from a program: fields, checks, duplicates, splits, fingerprints."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.data import jsonl
from distill.data.clips import ClipReader, VideoSettings
from distill.data.corpus import read_corpus
from distill.data.posts import as_samples, sample
from distill.data.source import data_digest, data_fingerprint
from distill.data.split import stratified_split
from distill.digests import Digests
from distill.task.labels import LabelSpace
from distill.task.sample import Sample
from tests.data.clip_files import save_clip, save_wav
from tests.data.test_corpus import post, valid_settings, write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save_clip(tmp_path / "clips" / "a.mp4", 5)
    save_clip(tmp_path / "clips" / "silent.mp4", 5, tracks=0)
    save_wav(tmp_path / "clips" / "a.wav", np.ones(800))
    (tmp_path / "clips" / "words.mp4").write_text("words")
    return tmp_path


def test_a_row_has_the_sound_of_its_video_or_another(root: Path) -> None:
    own = jsonl.to_sample({"id": "1", "video": "clips/a.mp4"}, root)
    assert own.video == own.audio == root / "clips" / "a.mp4" and own.text == ""
    other = jsonl.to_sample({"id": "1", "video": "clips/a.mp4", "audio": "clips/a.wav"}, root)
    assert other.audio == root / "clips" / "a.wav"
    assert other.media.files == (other.video, other.audio) and own.media.files == (own.video,)
    heard = jsonl.to_sample({"id": "1", "audio": "clips/a.wav", "video": ""}, root)
    assert (heard.video, heard.audio) == (None, root / "clips" / "a.wav")
    muted = jsonl.to_sample({"id": "1", "video": "clips/a.mp4", "audio": False}, root)
    assert (muted.video, muted.audio) == (root / "clips" / "a.mp4", None)
    for found in (own, other, heard, muted):
        row = jsonl.to_row(found, root)
        assert jsonl.to_sample(json.loads(json.dumps(row)), root) == found
    assert "audio" not in jsonl.to_row(own, root) and "video" not in jsonl.to_row(heard, root)
    assert not {"video", "audio"} & jsonl.to_row(Sample("1", "x"), root).keys()


def test_a_silent_video_has_no_sound(root: Path) -> None:
    write(root / "train.jsonl", [post(name, video=f"clips/{name}.mp4") for name in ("a", "silent")])
    corpus = read_corpus(valid_settings(root), LabelSpace())
    assert [found.modalities for found in corpus.train] == [("text", "video", "audio"), ("text", "video")]
    given = sample({"text": "words", "video": root / "clips" / "silent.mp4"}, "0", root)
    assert given.audio is None and given.video is not None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"video": 3}, "video must be a file name"),
        ({"audio": ["a"]}, "audio must be a file name"),
        ({"video": "../a.mp4"}, "'../a.mp4' lies outside the data root"),
        ({"audio": "http://h/a.mp3"}, "is an address; store the file in the data root"),
        ({"video": "a\ue000.mp4"}, "the id or a file name has control characters"),
        ({"video": " "}, "there is no text, image, video or audio"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        jsonl.to_sample({"id": "a", **fields}, tmp_path)


def test_every_clip_of_a_corpus_is_checked(root: Path) -> None:
    rows = [
        post("good", video="clips/a.mp4"),
        post("silent", video="clips/silent.mp4"),
        post("heard", audio="clips/a.wav"),
        post("gone", video="clips/gone.mp4"),
        post("words", video="clips/words.mp4"),
        post("deaf", video="clips/a.mp4", audio="clips/silent.mp4"),
        post("blind", video="clips/a.wav"),
    ]
    write(root / "train.jsonl", rows)
    settings = valid_settings(root)
    corpus = read_corpus(settings, LabelSpace())
    assert [found.id for found in corpus.train] == ["good", "silent", "heard"]
    assert {found.id: found.reason for found in corpus.dropped} == {
        "gone": "clip clips/gone.mp4 is missing",
        "words": "clip clips/words.mp4 is none of MP4, MOV, Matroska, WebM, AVI, WAV, MP3, FLAC and Ogg",
        "deaf": "clip clips/silent.mp4 has no sound",
        "blind": "clip clips/a.wav has no video",
    }
    limited = replace(settings, video=VideoSettings(max_seconds=0.15))
    assert read_corpus(limited, LabelSpace()).dropped[0].reason == (
        "clip clips/a.mp4 lasts 0.2 s, more than 0.15 (data.video.max_seconds)"
    )


def test_the_same_clip_in_another_split_is_a_duplicate(root: Path) -> None:
    write(root / "train.jsonl", [post("1", text="x", video="clips/a.mp4"), post("2", text="x", video="clips/a.mp4")])
    write(root / "test.jsonl", [post("1", text="x", video="clips/a.mp4"), post("2", text="x", audio="clips/a.mp4")])
    corpus = read_corpus(valid_settings(root), LabelSpace())
    assert [found.id for found in corpus.test] == ["2"] and len(corpus.dropped) == 1


def test_posts_that_share_a_clip_stay_in_one_split(root: Path) -> None:
    copy = root / "clips" / "copy.mp4"
    copy.write_bytes((root / "clips" / "a.mp4").read_bytes())
    shared = [root / "clips" / "a.mp4", copy]
    samples = [
        Sample(f"p{n}", f"text {n}", label="ab"[n % 2], video=shared[n // 2] if n < 4 else None) for n in range(80)
    ]
    for seed in range(5):
        parts = stratified_split(samples, {"test": 0.5}, seed)
        assert len({part for part, found in parts.items() for one in found if one.video is not None}) == 1


def test_the_fingerprint_and_the_digest_cover_the_clips(root: Path) -> None:
    missing = post("b", images=float("nan"), video=float("nan"), audio="clips/a.wav")
    write(root / "train.jsonl", [post("a", video="clips/a.mp4", audio=float("nan")), missing])
    settings = valid_settings(root)

    def state() -> tuple[str, str | None]:
        return data_fingerprint(settings), data_digest(settings, Digests(root / "cache.json"))

    before = state()
    assert state() == before
    content = bytearray((root / "clips" / "a.wav").read_bytes())
    content[-1] ^= 1
    (root / "clips" / "a.wav").write_bytes(content)
    assert state()[0] == before[0] and state()[1] != before[1], "the size is the same"
    save_clip(root / "clips" / "a.mp4", 9)
    assert state()[0] != before[0]


def test_posts_from_a_program_have_clips_as_paths_or_bytes(root: Path) -> None:
    clip, sound = root / "clips" / "a.mp4", root / "clips" / "a.wav"
    given = [{"video": clip}, {"video": str(clip), "audio": sound.read_bytes()}, {"audio": {"path": str(sound)}}]
    with as_samples([*given, {"text": "x", "video": clip.read_bytes()}]) as samples:
        assert [one.video == clip for one in samples] == [True, True, False, False]
        assert samples[0].audio == clip and samples[2].audio == sound and samples[3].audio == samples[3].video
        assert samples[1].audio is not None and samples[1].audio.read_bytes() == sound.read_bytes()
        assert len(ClipReader().frames(samples[3].video).images) == 5  # type: ignore[arg-type]


def test_a_clip_of_a_program_is_decoded_as_a_whole(root: Path) -> None:
    path = save_wav(root / "late.wav", np.append(np.zeros(16_000), np.nan))
    assert ClipReader().check(path, video=False)
    with (
        pytest.raises(ValueError, match=r"^post 0: clip late.wav has a sound with samples"),
        as_samples([{"audio": path}]),
    ):
        pass


def test_nan_is_a_missing_value_of_a_post(root: Path) -> None:
    nan = float("nan")
    given = {"text": "x", "images": nan, "video": nan, "audio": nan, "id": nan}
    with as_samples([given, given | {"video": root / "clips" / "a.mp4"}]) as (words, clip):
        assert (words.modalities, words.id) == (("text",), "0") and clip.modalities == ("text", "video", "audio")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"video": 3}, "post 0: video must be a path or bytes, not int"),
        ({"text": "x", "video": 0}, "post 0: video must be a path or bytes, not int"),
        ({"text": "x", "video": np.zeros((2, 2))}, "post 0: video must be a path or bytes, not ndarray"),
        ({"audio": b"noise"}, "post 0: clip 0.audio is none of MP4"),
        ({"video": "gone.mp4"}, "post 0: clip gone.mp4 is missing"),
    ],
)
def test_a_bad_clip_of_a_program_is_named_with_its_post(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), as_samples([given]):
        pass


def test_a_post_takes_the_limits_of_its_reader_and_the_folder_of_its_files(root: Path) -> None:
    reader = ClipReader(VideoSettings(max_seconds=0.1))
    with pytest.raises(ValueError, match=r"more than 0\.1"):
        sample({"video": "clips/a.mp4"}, "1", root, root, reader)
    with pytest.raises(ValueError, match="lies outside"):
        sample({"video": "../a.mp4"}, "1", root, root)
