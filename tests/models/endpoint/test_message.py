"""Posts with video and sound at a server that sees and hears, and at servers that refuse a part."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill.data.clips import ClipReader, VideoSettings
from distill.data.images import resized
from distill.errors import RunError
from distill.models.endpoint import Endpoint, EndpointSettings
from distill.task.rationale import check
from distill.task.sample import Sample
from tests.clip_files import write_clip
from tests.models.hearing_server import PITCHES, answer, parts, sound, video
from tests.models.openai_server import COLOURS, LABELS, Server, answers, endpoint, write_image

Refusal = tuple[int, str] | None

NO_VIDEO = "Invalid value: 'video_url'. Supported values are: 'text', 'image_url', 'input_audio', 'refusal' and 'file'."
NO_AUDIO = "At most 0 audio(s) may be provided in one prompt. Set --limit-mm-per-prompt to increase this limit."


def refusing(*kinds: str, status: int = 400, words: str = "") -> Any:
    """Refuses requests with such parts."""

    def refuse(body: dict[str, Any]) -> Refusal:
        found = [kind for kind in kinds if parts(body, kind)]
        return (status, words or {"video_url": NO_VIDEO, "input_audio": NO_AUDIO}[found[0]]) if found else None

    return refuse


def clip(folder: Path, seen: str, heard: str | None, name: str = "") -> Sample:
    """A post with a video in the colour of a label and a tone of another one; heard None: it is silent."""
    path = folder / f"{name or f'{seen}-{heard}'}.mp4"
    write_clip(
        path, [COLOURS[seen]] * 10, PITCHES[heard] if heard else None, metadata={"comment": "secret", "title": "t"}
    )
    return Sample(path.stem, "the same words", video=path, audio=path)


def predictions(teacher: Endpoint, samples: list[Sample]) -> list[str]:
    return [check(answer.text, LABELS).prediction for answer in answers(teacher, samples)]


@pytest.mark.parametrize("way", ["video", "frames after a refusal", "frames"])
def test_the_answer_changes_with_the_frames_and_with_the_sound(tmp_path: Path, way: str) -> None:
    pairs = [("negative", "negative"), ("negative", "neutral"), ("negative", "positive"), ("positive", "positive")]
    samples = [clip(tmp_path, *pair) for pair in pairs]
    samples += [replace(samples[3], audio=None), replace(samples[0], video=None)]
    samples.append(replace(samples[0], audio=samples[3].audio))  # the sound of another file
    with Server(answer=answer) as server:
        server.refuse = refusing("video_url") if way == "frames after a refusal" else server.refuse
        teacher = endpoint(server.url, video="frames" if way == "frames" else "auto")
        found = predictions(teacher, samples)
    assert found == ["negative", "neutral", "neutral", "positive", "positive", "negative", "neutral"]
    assert bool(parts(server.received[-1].body, "image_url")) == (way != "video")


def test_a_video_is_its_sampled_frames_without_sound_and_metadata_and_the_sound_is_a_part_of_its_own(
    tmp_path: Path,
) -> None:
    sample = clip(tmp_path, "positive", "negative")
    sample = replace(sample, images=(write_image(tmp_path / "a.png", "neutral"),))
    with Server(answer=answer) as server:
        answers(endpoint(server.url, max_image_side=32), [sample])
    body = server.received[0].body
    assert [part["type"] for part in body["messages"][0]["content"]] == [
        "image_url", "video_url", "input_audio", "text"
    ]  # fmt: skip
    frames = video(body)
    assert len(frames) == 8 and frames[0].size == (32, 24)
    assert frames[3].getpixel((9, 9)) == pytest.approx(COLOURS["positive"], abs=8)
    assert len(sound(body)) == pytest.approx(16_000, abs=2048)
    assert b"secret" not in json.dumps(body).encode()
    assert set(body) == {"model", "temperature", "max_tokens", "seed", "response_format", "messages"}


def test_frames_are_sampled_as_the_data_says_and_at_most_as_many_as_the_endpoint_takes(tmp_path: Path) -> None:
    sample = clip(tmp_path, "positive", None)
    with Server(answer=answer) as server:
        for sampled, limit in ((3, None), (5, 2)):
            settings = EndpointSettings(server.url, "big-vl", frames=limit)
            answers(Endpoint(settings, LABELS, clips=ClipReader(VideoSettings(frames=sampled))), [sample])
    assert [len(video(request.body)) for request in server.received] == [3, 2]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, NO_VIDEO),
        (400, "At most 0 video(s) may be provided in one prompt."),
        (422, "Unknown part type: video_url"),
        (501, "Unknown part type: video_url"),
        (500, "unsupported content[].type"),
        (500, "This model does not support video inputs"),
        (500, "video_url parts are not supported"),
        (422, "Input should be 'text', 'image_url' or 'input_audio'"),
        (400, "invalid request"),
    ],
)
def test_frames_are_sent_where_the_server_refuses_videos_and_this_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, status: int, words: str
) -> None:
    samples = [clip(tmp_path, "positive", "positive", f"v{n}") for n in range(12)]
    with Server(answer=answer, refuse=refusing("video_url", status=status, words=words)) as server:
        teacher = endpoint(server.url, concurrency=3)
        with caplog.at_level(logging.WARNING):
            assert predictions(teacher, samples) == ["positive"] * 12
        asked = server.requests
        assert predictions(teacher, samples) == ["positive"] * 12
        assert server.requests == asked + 12, "remembered for the run"
    content = server.received[-1].body["messages"][0]["content"]
    assert [part["type"] for part in content] == [*["text", "image_url"] * 8, "input_audio", "text"]
    assert [part["text"] for part in content[:4:2]] == ["The video at 0.0 s:", "The video at 0.1 s:"]
    (said,) = [record.message for record in caplog.records]
    assert "videos are not taken; their frames are sent as images instead" in said and words in said
    assert any("videos are not taken" in change for change in teacher.given_up)
    assert all("seed" in request.body for request in server.received), "no field is given up"


@pytest.mark.parametrize(
    ("refused", "status"), [(("input_audio",), 400), (("input_audio",), 404), (("video_url", "input_audio"), 400)]
)
def test_a_server_that_takes_no_sound_ends_the_run_before_an_answer_is_paid(
    tmp_path: Path, refused: tuple[str, ...], status: int
) -> None:
    samples = [clip(tmp_path, "positive", "positive", f"v{n}") for n in range(12)]
    with Server(answer=answer, refuse=refusing(*refused, status=status)) as server:
        with pytest.raises(RunError) as caught:
            answers(endpoint(server.url, concurrency=2), samples)
        assert server.paid == 0 and server.requests <= 4
        assert str(caught.value) == (
            f"the endpoint {server.url} does not take the sound of posts (status {status}: {NO_AUDIO}); "
            "use a model that hears, or set audio: ignore in the settings of the endpoint"
        )
        assert predictions(endpoint(server.url, audio="ignore"), samples[:2]) == ["positive"] * 2
        assert not parts(server.received[-1].body, "input_audio")


def test_a_part_that_was_taken_before_is_refused_for_its_post_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = [clip(tmp_path, "positive", "positive", f"v{n}") for n in range(4)]
    samples[2] = replace(samples[2], text="too much")

    def refuse(body: dict[str, Any]) -> Refusal:
        return (400, "the audio of the video cannot be decoded") if "too much" in str(body["messages"]) else None

    with Server(answer=answer, refuse=refuse) as server:
        found = answers(endpoint(server.url, concurrency=1), samples)
    assert [found.error is None for found in found] == [True, True, False, True]
    assert not caplog.records and server.requests == 4


def test_the_name_of_the_model_is_no_refusal_of_sound(tmp_path: Path) -> None:
    def refuse(body: dict[str, Any]) -> Refusal:
        return (400, "gpt-audio-video does not support json_schema") if "response_format" in body else None

    with Server(answer=answer, refuse=refuse) as server:
        teacher = Endpoint(EndpointSettings(server.url, "gpt-audio-video"), LABELS)
        assert predictions(teacher, [clip(tmp_path, "positive", "positive")]) == ["positive"]
    assert parts(server.received[-1].body, "video_url")


def test_ignored_media_are_not_sent_nor_read(tmp_path: Path) -> None:
    sample = Sample("s", "words", video=tmp_path / "gone.mp4", audio=tmp_path / "gone.mp4")
    with Server(answer=answer) as server:
        assert predictions(endpoint(server.url, video="ignore", audio="ignore"), [sample]) == ["neutral"]
    assert isinstance(server.received[0].body["messages"][0]["content"], str)


def test_a_broken_clip_affects_only_its_sample(tmp_path: Path) -> None:
    good = clip(tmp_path, "positive", "positive")
    (tmp_path / "broken.mp4").write_bytes(b"\0" * 2000)
    broken = replace(good, id="broken", video=tmp_path / "gone.mp4")
    with Server(answer=answer) as server:
        teacher = endpoint(server.url)
        found = answers(teacher, [good, broken])
        scores = teacher.classify([good, broken])
    assert [found.error is None for found in found] == [True, False]
    assert scores.probabilities[1] == pytest.approx([1 / 3] * 3) and scores.label_mass[1] == 0
    assert "gone.mp4" in str(found[1].error)


def test_classifications_are_sampled_with_the_frames_after_a_refusal(tmp_path: Path) -> None:
    samples = [clip(tmp_path, label, label) for label in COLOURS]
    with Server(answer=answer, refuse=refusing("video_url")) as server:
        scores = endpoint(server.url, agreement_samples=3, concurrency=1).classify(samples)
    assert [LABELS.names[i] for i in scores.probabilities.argmax(1)] == list(COLOURS)
    assert server.sent["refused"] == 1
    assert all(isinstance(image, Image.Image) for image in server.received[-1].images)


def test_images_are_sent_as_a_local_student_is_given_them(tmp_path: Path) -> None:
    Image.effect_noise((60, 40), 80).convert("RGB").save(path := tmp_path / "noise.png")
    with Server() as server:
        settings = EndpointSettings(server.url, "student")
        for size in (28, 0):
            student = Endpoint(settings, LABELS, image_size=size)
            answers(student, [Sample("s", "words", (path,))])
            student.close()
        squares, none = (request.images for request in server.received)
    assert none == [] and [image.format for image in squares] == ["PNG"]
    assert squares[0].tobytes() == resized(path, 28).tobytes()
