"""The review of posts with videos and sounds: its page plays them, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from distill import chain
from distill.recipe import Recipe
from distill.task.labels import LabelSpace
from distill.task.rationale import Rationale, render
from tests import micro
from tests.clip_files import write_clip
from tests.review.conftest import reviewing

CLIPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "spoken": {"video": "spoken.mp4"},
    "muted": {"video": "spoken.mp4", "audio": False},
    "dubbed": {"video": "spoken.mp4", "audio": "tone.wav"},
    "sound": {"audio": "tone.wav"},
}


@pytest.fixture
def recorded(tmp_path: Path) -> Recipe:
    """A run with recorded rationales of posts with clips, whose stage annotate has finished."""
    data = tmp_path / "data"
    data.mkdir()
    write_clip(data / "spoken.mp4", [(200, 0, 0), (0, 200, 0)], pitch=440)
    write_clip(data / "tone.wav", pitch=880)
    names = LabelSpace().wording.names
    text = render(Rationale(tuple(f"{name} is calm here." for name in names[:-1]), "neutral", names))
    for split in ("train", "validation", "test"):
        rows = [
            {"id": name if split == "train" else f"{split}-{name}", "text": f"{split} {name}"} | clips
            for name, clips in CLIPS.items()
            if split == "train" or name == "plain"
        ]
        lines = [json.dumps(row | {"label": "neutral", "rationale": text}) + "\n" for row in rows]
        (data / f"{split}.jsonl").write_text("".join(lines))
    content = {name: micro.RECORDED[name] for name in ("name", "seed", "trainer", "tracking")} | {
        "data": {"source": "jsonl", "validation": ["validation.jsonl"]}, "annotate": {"recorded": True},
    }  # fmt: skip
    recipe = micro.read(micro.write(tmp_path, content))
    assert chain.run(recipe) == ["annotate"]
    return recipe


def test_the_page_plays_the_clips_of_the_posts_alone(recorded: Recipe, tmp_path: Path) -> None:
    root = Path(recorded.data.root)
    with reviewing(recorded) as client:
        posts = {name: client.get("/post", params={"id": name}).json() for name in CLIPS}
        assert {name: (post["players"], post["muted"]) for name, post in posts.items()} == {
            "plain": ([], False),
            "spoken": (["video"], False),
            "muted": (["video"], True),
            "dubbed": (["video", "audio"], True),
            "sound": (["audio"], False),
        }
        video = client.get("/clip", params={"id": "muted", "kind": "video"})
        assert (video.headers["content-type"], video.content) == ("video/mp4", (root / "spoken.mp4").read_bytes())
        part = client.get("/clip", params={"id": "dubbed", "kind": "audio"}, headers={"Range": "bytes=0-3"})
        assert (part.status_code, part.content) == (206, b"RIFF")
        assert part.headers["content-type"].startswith("audio/")
        for post, kind in (
            ("plain", "video"),
            ("spoken", "audio"),
            ("spoken", "images"),
            ("x", "video"),
            ("sound", ""),
        ):
            assert client.get("/clip", params={"id": post, "kind": kind}).status_code == 404
        assert "media-src 'self'" in client.get("/").headers["content-security-policy"]
        (tmp_path / "secret").write_text("secret")
        (root / "tone.wav").unlink()
        assert client.get("/clip", params={"id": "sound", "kind": "audio"}).status_code == 404
        (root / "tone.wav").symlink_to(tmp_path / "secret")
        assert client.get("/clip", params={"id": "sound", "kind": "audio"}).status_code == 404
