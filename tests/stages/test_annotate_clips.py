"""Stage `annotate` on posts with video and sound: a server that sees and hears, and one that refuses a part."""

import json
from pathlib import Path
from typing import Any

import pytest

from distill import chain
from distill.errors import RunError
from distill.recipe import Recipe
from tests import micro
from tests.clip_files import write_clip
from tests.models.endpoint.test_message import refusing
from tests.models.hearing_server import PITCHES, answer, parts
from tests.models.openai_server import COLOURS, Server


def recipe_for(folder: Path, server: Server, **endpoint: Any) -> Recipe:
    """Posts whose words say nothing; the label is in the frames and in the sound of a file of its own."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    posts = []
    for number, (label, colour) in enumerate(COLOURS.items()):
        write_clip(data / f"{label}.mp4", [colour] * 8)
        write_clip(data / f"{label}.wav", pitch=PITCHES[label])
        media = {"video": f"{label}.mp4", "audio": f"{label}.wav"}
        posts += [{"id": f"{label}{n}", "text": f"post {number} {n}", "label": label} | media for n in range(6)]
    for name, part in (("train", posts[::2]), ("validation", posts[1::4]), ("test", posts[3::4])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(post) + "\n" for post in part))
    settings = {"base_url": server.url, "model": "big-vl", "backoff_s": 0.01} | endpoint
    content = micro.RECORDED | {
        "data": {"source": "jsonl", "validation": ["validation.jsonl"], "test": ["test.jsonl"]},
        "annotate": {"endpoint": settings},
        "assistant": micro.LEARNER | {"model": micro.MODEL | {"audio": "ignore"}},
        "student": micro.LEARNER | {"model": micro.MODEL | {"audio": "ignore"}},
    }
    return micro.read(micro.write(folder, content))


@pytest.mark.parametrize("way", ["video", "frames"])
def test_rationales_are_predicted_from_frames_and_sound(tmp_path: Path, way: str) -> None:
    with Server(answer=answer, refuse=refusing(*["video_url"] * (way == "frames"))) as server:
        recipe = recipe_for(tmp_path, server)
        chain.run(recipe, until="annotate")
        summary = json.loads((recipe.folder / "annotate" / "summary.json").read_text())
        assert (summary["n"], summary["predicted"], summary["quarantined"]["total"]) == (9, 9, 0)
        assert len(parts(server.received[-1].body, "image_url")) == (8 if way == "frames" else 0)
        paid = server.paid
        write_clip(tmp_path / "data" / "negative.wav", pitch=PITCHES["positive"])
        assert chain.run(recipe, until="annotate") == ["annotate"]
        summary = json.loads((recipe.folder / "annotate" / "summary.json").read_text())
    assert (summary["predicted"], summary["explained"]) == (6, 3)
    assert server.paid == paid + 2 * 3, "only the posts whose sound has changed are asked again"


def test_a_server_that_refuses_sound_ends_the_stage_before_an_answer_is_paid(tmp_path: Path) -> None:
    with Server(answer=answer, refuse=refusing("input_audio")) as server:
        with pytest.raises(RunError, match="does not take the sound of posts"):
            chain.run(recipe_for(tmp_path, server), until="annotate")
        assert server.paid == 0
        recipe = recipe_for(tmp_path, server, audio="ignore")
        chain.run(recipe, until="annotate")
    assert json.loads((recipe.folder / "annotate" / "summary.json").read_text())["predicted"] == 9
