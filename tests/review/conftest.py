"""Fixtures: a run with rationales, a disagreement and a quarantined post, and the server of its review."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from distill import chain
from distill.annotation.curation import DECISIONS
from distill.recipe import Recipe
from distill.review.posts import Posts
from distill.review.server import Server, create_app
from tests import micro
from tests.models import openai_server
from tests.models.openai_server import COLOURS, ChatRequest, rationale
from tests.web_servers import in_thread

MARKUP = '<img src=x onerror="document.title=1"><b>"bold"</b>'
ANALYSIS = "<img src=x onerror='document.title=1'><script>document.title=1</script>"  # without quotes that end a field


def answer(request: ChatRequest) -> str:
    """Predict the colour; explain what is told; say too much about the post that asks for it, and nothing valid of
    another one."""
    hint = request.text.partition("The sentiment is ")[2].partition(".")[0]
    if "leaky" in request.text:
        return rationale(hint or request.sentiment, "it is labeled as that")
    if "broken" in request.text:
        return f"No fields. {MARKUP}"
    return rationale(hint or request.sentiment, ANALYSIS)


def make_run(folder: Path) -> Recipe:
    """A run whose stage annotate has finished: of six posts, one is a disagreement and two are quarantined."""
    (folder / "data").mkdir(parents=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 30), colour).save(folder / "data" / f"{name}.png")
    train = [
        {"id": "plain", "text": f"hello {MARKUP}", "label": "positive", "image": "positive.png"},
        {"id": "other", "text": "a picture of another mood", "label": "negative", "image": "positive.png"},
        {"id": "../odd id?&#", "text": "", "label": "neutral", "images": ["neutral.png", "negative.png"]},
        {"id": "leaky", "text": "a leaky post", "label": "positive", "image": "positive.png"},
        {"id": "broken", "text": "a broken post", "label": "negative", "image": "negative.png"},
        {"id": "last", "text": "the last one", "label": "negative", "image": "negative.png", "aspect": "the camera",
         "attributes": {"face": "sad"}},
    ]  # fmt: skip
    files = {"train": train} | {
        name: [{"id": f"{name}{n}", "text": f"{name} {n}", "label": label} for n, label in enumerate(COLOURS)]
        for name in ("validation", "test")
    }
    for name, rows in files.items():
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with openai_server.Server(answer=answer) as server:
        data = {"source": "jsonl", **{name: [f"{name}.jsonl"] for name in files}}
        endpoint = {"base_url": server.url, "model": "big-vl"}
        content = micro.RECORDED | {"data": data, "annotate": {"endpoint": endpoint, "retries": 0}}
        recipe = micro.read(micro.write(folder, content))
        assert chain.run(recipe, until="annotate") == ["annotate"]
    return recipe


@contextmanager
def reviewing(recipe: Recipe) -> Iterator[httpx.Client]:
    """A client of the server of a review on a free port, with the headers of its page."""
    with (
        in_thread(Server(create_app(Posts(recipe), "127.0.0.1"))) as url,
        httpx.Client(base_url=url, headers={"Origin": url}, timeout=60) as client,
    ):
        yield client


def decisions(recipe: Recipe) -> list[list[Any]]:
    """Id, action and label of every line of the file."""
    path = recipe.folder / DECISIONS
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [[json.loads(line)[name] for name in ("id", "action", "label")] for line in lines]


@pytest.fixture(scope="session")
def annotated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run, its recipe and its data; tests must not change it."""
    folder = tmp_path_factory.mktemp("review") / "of"
    make_run(folder)
    return folder


@pytest.fixture
def recipe(annotated: Path, tmp_path: Path) -> Recipe:
    """A copy of that run, which a test may change; `tmp_path` holds its recipe, runs and data."""
    shutil.copytree(annotated, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "recipe.yaml"
    path.write_text(path.read_text().replace(str(annotated), str(tmp_path)))
    return micro.read(path)


@pytest.fixture
def client(recipe: Recipe) -> Iterator[httpx.Client]:
    with reviewing(recipe) as client:
        yield client


Decide = Callable[..., httpx.Response]


@pytest.fixture
def decide(client: httpx.Client) -> Decide:
    """Send a decision as the page does."""

    def send(name: str, action: str, label: str | None = None, text: str | None = None) -> httpx.Response:
        return client.post("/decide", json={"id": name, "action": action, "label": label, "rationale": text})

    return send
