"""The gateway on posts with video and sound: as JSON, as chat parts and as a form, and hostile files."""

import base64
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
import torch

from distill.models.backbone import ModelSettings, create
from distill.models.local import Local
from distill.models.tiny import TinySettings, train_tokenizer
from distill.task.labels import LabelSpace
from tests.clip_files import write_clip
from tests.models.hearing_server import PITCHES, answer, parts
from tests.models.openai_server import COLOURS, Server
from tests.serving.conftest import DEFER_ALL, message, running
from tests.serving.test_cascade_service import teacher_at

LABELS = LabelSpace()
TEXT = "A fine day."


def tiny(folder: Path, audio_hidden: int | None, **settings: Any) -> Local:
    """A tiny student with random weights, always the same; it hears if it has an audio tower."""
    torch.manual_seed(0)
    name = folder / f"tokenizer-{audio_hidden}"
    train_tokenizer(["a fine day, good words"] * 20, 600, audio_hidden is not None).save_pretrained(name)
    size = TinySettings(
        hidden=32, layers=1, vision_hidden=32, vision_depth=1, audio_hidden=audio_hidden, vocabulary=600
    )
    return Local(create(ModelSettings(tiny=size, image_size=28, **settings), LABELS, name), "tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos named after what is seen and heard."""
    folder = tmp_path_factory.mktemp("clips")
    for seen, heard in (("negative", "negative"), ("negative", "positive"), ("positive", "positive"), ("positive", "")):
        write_clip(folder / f"{seen}-{heard}.mp4", [COLOURS[seen]] * 10, PITCHES.get(heard))
    write_clip(folder / "positive.wav", pitch=PITCHES["positive"])
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    """A gateway of a student that hears."""
    with running(tiny(folder, 16), rationale=False, max_body_mb=1.0) as client:
        yield client


def uri(path: Path, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def ask(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    reply = client.post("/v1/sentiment", json={"text": TEXT} | fields)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def chat(client: httpx.Client, model: str, *given: dict[str, Any]) -> httpx.Response:
    content = [*given, {"type": "text", "text": TEXT}]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 4}
    return client.post("/v1/chat/completions", json=body)


def video_part(url: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def audio_part(path: Path) -> dict[str, Any]:
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def test_json_chat_and_form_are_the_same_post(client: httpx.Client, folder: Path) -> None:
    path, sound = folder / "negative-negative.mp4", folder / "positive.wav"
    as_json = ask(client, video=uri(path, "video/webm;codecs=vp8,opus"), audio=uri(sound, "audio/wav"))
    files = {"video": ("a.mp4", path.read_bytes(), "video/mp4"), "audio": ("b", sound.read_bytes())}
    form = client.post("/v1/sentiment", data={"text": TEXT, "rationale": "false"}, files=files)
    parts = chat(client, "cascade", video_part(uri(path)), audio_part(sound))
    assert form.status_code == parts.status_code == 200
    for found in (form.json(), parts.json()["distill"]):
        assert found["probabilities"] == pytest.approx(as_json["probabilities"], abs=1e-6)
    assert len(as_json["frames"]) == 8 and as_json["frames"] == sorted(as_json["frames"])
    assert "frames" not in ask(client) and 0 <= as_json["uncertainty"] <= 1
    alone = chat(client, "cascade-student", video_part(uri(path)), audio_part(sound)).json()
    silent = chat(client, "cascade-student", video_part(uri(folder / "positive-.mp4"))).json()
    assert alone["usage"]["prompt_tokens"] > silent["usage"]["prompt_tokens"]


def test_the_answer_depends_on_the_frames_and_on_the_sound(client: httpx.Client, folder: Path) -> None:
    names = ("negative-negative", "negative-positive", "positive-positive", "positive-")
    posts: list[dict[str, str]] = [{"video": uri(folder / f"{name}.mp4")} for name in names]
    posts += [{"audio": uri(folder / "positive.wav", "audio/wav")}, {}]
    assert len({tuple(ask(client, **post)["probabilities"].values()) for post in posts}) == 6
    assert ask(client, text="", audio=uri(folder / "positive.wav", "audio/wav"))["label"] in LABELS.names


def test_a_student_that_cannot_hear_refuses_sound_or_leaves_it_out(folder: Path) -> None:
    spoken, silent = uri(folder / "positive-positive.mp4"), uri(folder / "positive-.mp4")
    with running(tiny(folder, None), rationale=False) as client:
        for fields in ({"video": spoken}, {"audio": uri(folder / "positive.wav")}):
            reply = client.post("/v1/sentiment", json={"text": TEXT} | fields)
            assert message(reply, 400) == "the student cannot hear; send the post without sound"
        expected = ask(client, video=silent)["probabilities"]
    with running(tiny(folder, None, audio="ignore"), rationale=False) as client:
        assert ask(client, video=spoken)["probabilities"] == pytest.approx(expected, abs=0.02)
        reply = client.post("/v1/sentiment", json={"text": "", "audio": uri(folder / "positive.wav")})
        assert message(reply, 400).startswith("text is empty")


@pytest.mark.parametrize("refuses", [False, True])
def test_the_teacher_sees_and_hears_what_the_client_sent(folder: Path, refuses: bool) -> None:
    def refuse(body: dict[str, Any]) -> tuple[int, str] | None:
        return (400, "Unknown part type: video_url") if refuses and parts(body, "video_url") else None

    with Server(answer=answer, refuse=refuse) as server:
        teacher = teacher_at(server.url, 30.0)
        with running(tiny(folder, 16), teacher, DEFER_ALL, rationale=False) as client:
            labels = [
                ask(client, video=uri(folder / f"{name}.mp4"))["label"]
                for name in ("negative-negative", "negative-positive", "positive-positive")
            ]
    assert labels == ["negative", "neutral", "positive"]


HOSTILE = {
    "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    "concat": b"ffconcat version 1.0\nfile /etc/hostname\n",
    "session": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "text": b"hello" * 100,
    "nothing": b"",
    "zeros": bytes(5000),
    "truncated": b"the first half of a video",
}


@pytest.mark.parametrize("name", ["video", "audio"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_with_one_sentence(client: httpx.Client, folder: Path, kind: str, name: str) -> None:
    content = HOSTILE[kind]
    if kind == "truncated":
        whole = (folder / "positive-positive.mp4").read_bytes()
        content = whole[: len(whole) // 2]
    reply = client.post("/v1/sentiment", data={"text": TEXT}, files={name: ("a.mp4", content)})
    found = message(reply, 400)
    assert name in found and "send another file" in found and "/" not in found
    assert client.get("/health/ready").status_code == 200


@pytest.mark.parametrize(
    ("fields", "status", "expected"),
    [
        ({"video": "http://example.org/a.mp4"}, 400, "video: videos from example.org are refused; send a data: URI"),
        ({"audio": "https://example.org/a.wav"}, 400, "audio: sounds from example.org are refused; send a data: URI"),
        ({"video": "file:///etc/passwd"}, 400, "video: this file: URI is not supported"),
        ({"audio": "concat:a|b"}, 400, "audio: this concat: URI is not supported"),
        ({"video": "!!!"}, 400, "video is not valid base64; send a data: URI such as data:video/mp4;base64,..."),
        ({"video": "A" * 1_100_000}, 413, "the body has more than 1,000,000 bytes"),
        ({"video": 1}, 400, "video: "),
    ],
)
def test_unusable_addresses_and_sizes(client: httpx.Client, fields: dict[str, Any], status: int, expected: str) -> None:
    assert message(client.post("/v1/sentiment", json={"text": TEXT} | fields), status).startswith(expected)


def test_a_post_takes_one_video_and_one_sound(client: httpx.Client, folder: Path) -> None:
    video, sound = video_part(uri(folder / "positive-.mp4")), audio_part(folder / "positive.wav")
    assert message(chat(client, "cascade", video, video), 400) == "a post takes at most one video; send one"
    assert message(chat(client, "cascade", sound, sound), 400) == "a post takes at most one audio; send one"


def test_a_post_that_lacks_something_is_answered_with_its_uncertainty(client: httpx.Client, tmp_path: Path) -> None:
    black = write_clip(tmp_path / "black.mp4", [(0, 0, 0)] * 4)
    quiet = write_clip(tmp_path / "quiet.wav", pitch=0.0)
    for fields in ({"video": uri(black)}, {"video": uri(black), "audio": uri(quiet)}, {"audio": uri(quiet)}):
        assert 0 <= ask(client, **fields)["uncertainty"] <= 1


def test_without_pyav_a_video_is_refused(client: httpx.Client, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distill.data.decoding", None)
    monkeypatch.delattr("distill.data.decoding", raising=False)
    reply = client.post("/v1/sentiment", json={"text": TEXT, "video": uri(folder / "positive-.mp4")})
    assert message(reply, 400) == "video: this server does not read videos; send the post without"
    assert ask(client)["label"] in LABELS.names


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_a_video_from_an_allowed_host_is_fetched(folder: Path, kind: str) -> None:
    host = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder)))
    Thread(target=host.serve_forever, daemon=True).start()
    name, address = {"video": "positive-positive.mp4", "audio": "positive.wav"}[kind], f"127.0.0.1:{host.server_port}"
    with running(tiny(folder, 16), rationale=False, image_hosts=[address]) as client:
        found = ask(client, **{kind: f"http://{address}/{name}"})
        assert found["probabilities"] == pytest.approx(
            ask(client, **{kind: uri(folder / name)})["probabilities"], abs=1e-6
        )
    host.shutdown()
