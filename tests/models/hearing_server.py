"""Answers of a server that sees and hears: it decodes the parts of the request and answers from them."""

import base64
import io
import wave
from typing import Any

import av
import numpy as np
from PIL import Image

from tests.models.openai_server import COLOURS, ChatRequest, rationale

NAMES = list(COLOURS)

PITCHES = {"negative": 200.0, "neutral": 500.0, "positive": 1200.0}
"""Tone of each label, in hertz."""


def parts(body: dict[str, Any], kind: str) -> list[Any]:
    """The content of the parts of a kind."""
    content = body["messages"][0]["content"]
    return [] if isinstance(content, str) else [part[kind] for part in content if part["type"] == kind]


def video(body: dict[str, Any]) -> list[Image.Image]:
    """The frames of the request's video part."""
    (part,) = parts(body, "video_url")
    head, _, data = part["url"].partition(",")
    assert head == "data:video/mp4;base64"
    with av.open(io.BytesIO(base64.b64decode(data, validate=True))) as container:
        assert not container.streams.audio
        return [frame.to_image() for frame in container.decode(video=0)]


def sound(body: dict[str, Any]) -> np.ndarray:
    """The sound [S] of the request's audio part."""
    (part,) = parts(body, "input_audio")
    assert part["format"] == "wav"
    with wave.open(io.BytesIO(base64.b64decode(part["data"], validate=True))) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16_000)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768


def label(request: ChatRequest) -> str:
    """The mean of what is seen in the colours and heard in the pitch; neutral without both."""
    shown = video(request.body) if parts(request.body, "video_url") else request.images
    found = [NAMES.index(ChatRequest({}, "", [image]).sentiment) for image in shown]
    found = [round(sum(found) / len(found))] if found else []
    if parts(request.body, "input_audio"):
        samples = sound(request.body)
        pitch = np.abs(np.fft.rfft(samples)).argmax() * 16_000 / len(samples)
        found.append(NAMES.index(min(PITCHES, key=lambda name: abs(np.log(PITCHES[name] / max(pitch, 1))))))
    return NAMES[int(sum(found) / len(found) + 0.5)] if found else "neutral"


def answer(request: ChatRequest) -> str:
    """Classify in one line, otherwise reason; explain the label given in the prompt."""
    hint = request.text.partition("\nThe sentiment is ")[2].partition(".")[0]
    if request.text.startswith("Classify"):
        return f'"Prediction": {label(request)}'
    return rationale(hint or label(request))
