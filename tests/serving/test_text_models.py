"""The gateway of a student that reads text only."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from distill.models.backbone import ModelSettings, create
from distill.models.local import Local
from distill.task.labels import LabelSpace
from tests.models.text_folders import write
from tests.serving.conftest import message, running
from tests.serving.test_media import png, uri

LABELS = LabelSpace()


def chat(client: httpx.Client, model: str, *parts: dict[str, Any]) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": list(parts)}], "max_tokens": 4}
    return client.post("/v1/chat/completions", json=body)


@pytest.mark.parametrize("images", [True, False])
def test_images_are_refused_or_left_out(images: bool, tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = write(tmp_path, "llama", tokenizer_folder)
    settings = ModelSettings(str(folder), images=images, batch_size=4)
    picture = uri(png())
    part = {"type": "image_url", "image_url": {"url": picture}}
    with running(Local(create(settings, LABELS, tmp_path, train=False), "text"), rationale=False) as client:
        plain = client.post("/v1/sentiment", json={"text": "A fine day."})
        assert plain.status_code == 200
        replies = [
            client.post("/v1/sentiment", json={"text": "A fine day.", "image": picture}),
            chat(client, "cascade", part, {"type": "text", "text": "A fine day."}),
            chat(client, "cascade-student", part, {"type": "text", "text": "A fine day."}),
        ]
        alone = [
            client.post("/v1/sentiment", json={"text": "", "image": picture}),
            chat(client, "cascade-student", part),
        ]
    if images:
        for reply in [*replies, *alone]:
            assert message(reply, 400) == "the student reads text only; send the post without images"
    else:
        assert [reply.status_code for reply in replies] == [200] * 3
        probabilities = [reply.json()["probabilities"] for reply in (plain, replies[0])]
        assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-6)
        assert message(alone[0], 400).startswith("text is empty")
        assert message(alone[1], 400).startswith("the message is empty")
