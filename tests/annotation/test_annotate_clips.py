"""Annotation of posts with video and sound by a server that sees and hears; their keys in the ledger."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.annotation.cached_teacher import CachedTeacher
from distill.annotation.ledger import Ledger
from distill.data.clips import ClipReader, VideoSettings
from distill.errors import RunError
from distill.models.endpoint import Endpoint, EndpointSettings
from distill.models.reasoner import Sampling
from distill.task.sample import Sample
from tests.annotation.test_annotate import run
from tests.annotation.test_annotate_endpoint import remote
from tests.clip_files import write_clip
from tests.models.endpoint.test_message import refusing
from tests.models.hearing_server import PITCHES, answer, parts
from tests.models.openai_server import COLOURS, LABELS, Server, posts


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Posts whose frames and sound say their label."""
    folder, samples = tmp_path_factory.mktemp("clips"), []
    for label in COLOURS:
        path = write_clip(folder / f"{label}.mp4", [COLOURS[label]] * 10, PITCHES[label])
        samples.append(Sample(label, f"a post, {label}", label=label, video=path, audio=path))
    return samples


@pytest.mark.parametrize("way", ["video", "frames"])
def test_annotation_sees_and_hears(tmp_path: Path, clips: list[Sample], way: str) -> None:
    with Server(answer=answer, refuse=refusing(*["video_url"] * (way == "frames"))) as server:
        done, summary = run(tmp_path, clips, remote(server.url))
        assert [item.source for item in done.kept] == ["predicted"] * 3
        assert bool(parts(server.received[-1].body, "image_url")) == (way == "frames")
        requests = server.requests
        assert run(tmp_path, clips, remote(server.url))[0] == done and server.requests == requests
        misleading = [replace(clips[0], audio=clips[2].audio)]
        assert [item.source for item in run(tmp_path, misleading, remote(server.url))[0].kept] == ["explained"]
    assert summary["paid"]["answers"] == 3


def test_annotation_ends_where_sound_is_refused_and_goes_on_without_it(tmp_path: Path, clips: list[Sample]) -> None:
    with Server(answer=answer, refuse=refusing("input_audio")) as server:
        with pytest.raises(RunError, match="set audio: ignore"):
            run(tmp_path, clips, remote(server.url))
        assert (tmp_path / "ledger.jsonl").read_bytes() == b"" and server.paid == 0
        done, _ = run(tmp_path, clips, remote(server.url, audio="ignore"))
    assert len(done.kept) == 3


def asked(
    server: Server, folder: Path, samples: list[Sample], sampling: VideoSettings | None = None, /, **settings: Any
) -> int:
    """The number of requests for the rationales of posts with the ledger of a folder."""
    before = server.requests
    teacher = Endpoint(EndpointSettings(server.url, "big-vl", **settings), LABELS, clips=ClipReader(sampling))
    with Ledger(folder / "ledger.jsonl") as ledger:
        found = dict(CachedTeacher(teacher, LABELS, ledger, chunk=8).reason(samples, "predict", Sampling()))
    assert all(answer.error is None for answer in found.values())
    return server.requests - before


def test_other_content_and_another_sampling_are_other_requests(tmp_path: Path, clips: list[Sample]) -> None:
    first = clips[:1]
    copy = tmp_path / "copy.mp4"
    copy.write_bytes((first[0].video or copy).read_bytes())
    with Server(answer=answer) as server:
        assert asked(server, tmp_path, first) == 1
        assert asked(server, tmp_path, [replace(first[0], video=copy, audio=copy)]) == 0, "the name does not count"
        for changed in (
            replace(first[0], video=clips[1].video), replace(first[0], audio=clips[1].audio),
            replace(first[0], audio=None), replace(first[0], video=None),
        ):  # fmt: skip
            assert [asked(server, tmp_path, [changed]) for _ in range(2)] == [1, 0]
        assert [asked(server, tmp_path, first, frames=3) for _ in range(2)] == [1, 0]
        assert asked(server, tmp_path, first, VideoSettings(frames=3)) == 0, "the same frames"
        assert asked(server, tmp_path, first, VideoSettings(fps=2.0)) == 1
        assert asked(server, tmp_path, first, max_image_side=32) == 1
        assert asked(server, tmp_path, first, frames=20) == asked(server, tmp_path, first) == 0


def test_a_video_and_its_frames_are_the_same_request(tmp_path: Path, clips: list[Sample]) -> None:
    with Server(answer=answer) as server:
        assert asked(server, tmp_path, clips, video="frames") == 3
        assert asked(server, tmp_path, clips) == 0
        assert asked(server, tmp_path, clips, audio="ignore") == 3
        assert asked(server, tmp_path, [replace(clip, audio=None) for clip in clips]) == 0, "nothing else is shown"
        assert asked(server, tmp_path, clips, audio="ignore", video="ignore") == 3
        assert asked(server, tmp_path, [Sample(clip.id, clip.text) for clip in clips]) == 0


def test_a_post_without_clips_keeps_its_key_whatever_is_said_about_clips(tmp_path: Path) -> None:
    samples = posts(tmp_path, 3)
    with Server() as server:
        assert asked(server, tmp_path, samples) == 3
        settings = {"frames": 2, "video": "frames", "audio": "ignore"}
        assert asked(server, tmp_path, samples, VideoSettings(fps=1.0), **settings) == 0


def test_a_missing_clip_gives_an_error(tmp_path: Path) -> None:
    gone = Sample("s", "words", video=tmp_path / "gone.mp4")
    with Server() as server, Ledger(tmp_path / "ledger.jsonl") as ledger:
        cached = CachedTeacher(remote(server.url), LABELS, ledger, chunk=8)
        (answer,) = dict(cached.reason([gone], "predict", Sampling())).values()
    assert answer.error is not None and "gone.mp4" in answer.error and server.requests == 0
