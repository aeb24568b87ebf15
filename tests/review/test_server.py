"""The server of the review: what it shows, which decisions it takes, and whom it refuses."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from distill import chain
from distill.annotation.curation import DECISIONS, Decision, append
from distill.recipe import Recipe
from tests import micro
from tests.commands import Command
from tests.models import openai_server
from tests.models.openai_server import rationale
from tests.review.conftest import MARKUP, Decide, answer, decisions, reviewing

ODD = "../odd id?&#"
ALL = ["plain", "other", ODD, "leaky", "broken", "last"]


def ids(client: httpx.Client, **wanted: str) -> list[str]:
    return client.get("/posts", params=wanted).json()["ids"]


# ---- what is shown ----


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({}, ALL),
        ({"status": "kept"}, ["plain", "other", ODD, "last"]),
        ({"status": "quarantined"}, ["leaky", "broken"]),
        ({"status": "disagreement"}, ["other"]),
        ({"status": "undecided"}, ALL),
        ({"status": "decided"}, []),
        ({"label": "negative"}, ["other", "broken", "last"]),
        ({"source": "explained"}, ["other"]),
        ({"reason": "leaks"}, ["leaky"]),
        ({"text": "ANOTHER mood"}, ["other"]),
        ({"text": "no fields"}, ["broken"]),
        ({"text": "camera", "label": "negative", "status": "kept"}, ["last"]),
        ({"text": "camera", "label": "neutral"}, []),
    ],
    ids=str,
)
def test_filters(wanted: dict[str, str], found: list[str], client: httpx.Client) -> None:
    assert ids(client, **wanted) == found


def test_a_post_is_shown_with_all_that_is_known(client: httpx.Client) -> None:
    post = client.get("/post", params={"id": "other"}).json()
    assert (post["gold"], post["label"], post["status"], post["source"]) == (
        "negative",
        "negative",
        "kept",
        "explained",
    )
    assert post["disagreement"] and post["grounded"] is None and post["decision"] is None
    assert dict(post["fields"])["Prediction"] == "negative"
    post = client.get("/post", params={"id": "last"}).json()
    assert post["grounded"] is False and post["aspect"] == "the camera"
    post = client.get("/post", params={"id": "broken"}).json()
    assert (post["status"], post["reason"], post["fields"]) == ("quarantined", "malformed", None)
    assert post["detail"] == "Text_analysis is missing" and post["rationale"] == f"No fields. {MARKUP}"
    overview = client.get("/posts").json()
    assert overview["labels"] == ["negative", "neutral", "positive"]
    assert (overview["sources"], overview["reasons"]) == (["explained", "predicted"], ["leaks", "malformed"])
    assert (overview["reviewed"], overview["total"], overview["waiting"]) == (0, 6, 0)


def test_images_come_from_the_posts_alone(client: httpx.Client, recipe: Recipe, tmp_path: Path) -> None:
    reply = client.get("/image", params={"id": ODD, "index": 1})
    assert reply.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(reply.content)).convert("RGB").getpixel((5, 5))[0] > 150
    for index in ("2", "x", "", "1/../../x", "9" * 5000):
        assert client.get("/image", params={"id": ODD, "index": index}).status_code == 404
    for name in ("../recipe.yaml", "/etc/passwd", "negative.png"):
        assert client.get("/image", params={"id": name, "index": 0}).status_code == 404
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    image = Path(recipe.data.root, "neutral.png")
    image.unlink()
    image.symlink_to(tmp_path / "secret.png")
    reply = client.get("/image", params={"id": ODD, "index": 0})
    assert (reply.status_code, reply.json()["error"]) == (404, "'neutral.png' lies outside the data root")


# ---- what is decided ----


def test_decisions_are_written_and_shown(client: httpx.Client, decide: Decide, recipe: Recipe) -> None:
    assert decide("plain", "keep").json()["post"]["decision"]["action"] == "keep"
    decide("other", "relabel", "positive")
    decide("last", "edit", "negative", rationale("negative", "It is sad."))
    found = decide("broken", "drop").json()
    assert (found["reviewed"], found["total"], found["waiting"]) == (4, 6, 3)
    assert decisions(recipe) == [
        ["plain", "keep", None], ["other", "relabel", "positive"],
        ["last", "edit", "negative"], ["broken", "drop", None],
    ]  # fmt: skip
    post = client.get("/post", params={"id": "last"}).json()
    assert dict(post["fields"])["Text_analysis"] == "It is sad." and post["decision"]["label"] == "negative"
    assert ids(client, status="decided") == ["plain", "other", "broken", "last"]
    assert ids(client, label="positive") == ["plain", "other", "leaky"]
    assert decide("broken", "reset").json()["post"]["decision"] is None
    assert decide("other", "relabel", "negative").json()["post"]["decision"] is None  # its gold label
    assert ids(client, status="decided") == ["plain", "last"]


def test_a_quarantined_answer_is_kept_as_an_edit_if_its_format_and_label_are_right(
    client: httpx.Client, decide: Decide, recipe: Recipe
) -> None:
    assert decide("leaky", "keep").json()["post"]["decision"]["action"] == "edit"
    assert decisions(recipe) == [["leaky", "edit", "positive"]]
    reply = decide("broken", "keep")
    assert (reply.status_code, reply.json()["error"]) == (422, "Text_analysis is missing.")


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (("plain", "edit", "positive", "hello"), "Text_analysis is missing."),
        (("plain", "edit", None, None), "Text_analysis is missing."),
        (("plain", "edit", None, rationale("neutral")), "The text predicts neutral, the label is positive."),
        (("plain", "edit", "neutral", rationale("positive")), "The text predicts positive, the label is neutral."),
        (("plain", "edit", None, rationale("glad")), "Prediction is 'glad', not one label."),
        (("plain", "relabel"), "A post is relabelled with a label."),
        (("plain", "relabel", "glad"), "'glad' is not a label; the labels are negative, neutral, positive."),
        (("nobody", "drop"), "There is no post 'nobody'."),
    ],
    ids=str,
)
def test_an_invalid_decision_is_one_sentence_and_not_written(
    body: tuple[Any, ...], error: str, decide: Decide, recipe: Recipe
) -> None:
    reply = decide(*body)
    assert (reply.status_code, reply.json()["error"]) == (422, error)
    assert decisions(recipe) == []


def test_hostile_characters_in_an_edit_are_stored_as_the_readers_store_them(decide: Decide, recipe: Recipe) -> None:
    text = rationale("positive", f"{MARKUP.replace(chr(34), '')} \u2028 \x00 😀 \ud800")
    body = json.dumps({"id": "plain", "action": "edit", "label": "positive", "rationale": text})
    with reviewing(recipe) as client:
        reply = client.post("/decide", content=body, headers={"Content-Type": "application/json"})
    shown = dict(reply.json()["post"]["fields"])["Text_analysis"]
    assert shown.startswith("<img src=x") and shown.endswith("😀 \ufffd") and "\x00" not in shown
    assert len(decisions(recipe)) == 1


def test_another_process_may_decide_and_run_meanwhile(client: httpx.Client, recipe: Recipe) -> None:
    append(recipe.folder / DECISIONS, Decision("last", "drop"))
    append(recipe.folder / DECISIONS, Decision("leaky", "relabel", "neutral"))
    assert ids(client, status="decided") == ["leaky", "last"]
    with openai_server.Server(answer=answer) as server:
        assert recipe.annotate is not None and recipe.annotate.endpoint is not None
        recipe.annotate.endpoint.base_url = server.url
        assert chain.run(recipe, until="annotate") == ["annotate"]
    assert client.get("/post", params={"id": "last"}).json()["status"] == "dropped"
    assert client.get("/posts").json()["waiting"] == 0 and ids(client) == ALL
    (recipe.folder / "annotate" / "rationales.jsonl").unlink()  # as while annotate runs
    assert ids(client) == ALL
    with (recipe.folder / DECISIONS).open("a") as file:
        file.write("{}\n")
    for _ in range(2):  # until it is corrected
        reply = client.get("/posts")
        assert reply.status_code == 500 and "curation.jsonl, row 3: id is missing" in reply.json()["error"]


# ---- who is refused ----


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Origin": "https://127.0.0.1"}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
        ({"Host": "evil.example:8100", "Origin": "http://evil.example:8100"}, 403),
        ({"Host": "127.0.0.1.evil.example", "Origin": "http://127.0.0.1.evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ],
    ids=str,
)
def test_another_page_cannot_send_a_decision(
    headers: dict[str, str], status: int, client: httpx.Client, recipe: Recipe
) -> None:
    body = json.dumps({"id": "plain", "action": "drop", "label": None, "rationale": None})
    reply = client.post("/decide", content=body, headers={"Content-Type": "application/json"} | headers)
    assert reply.status_code == status and reply.json()["error"]
    assert decisions(recipe) == []


def test_a_name_that_leads_here_cannot_read_posts(client: httpx.Client) -> None:
    for path in ("/", "/posts", "/post?id=plain", "/image?id=plain&index=0"):
        assert client.get(path, headers={"Host": "evil.example"}).status_code == 403
        assert client.get(path, headers={"Host": "localhost:1"}).status_code == 200
        assert client.get(path).headers["cross-origin-resource-policy"] == "same-origin"
    assert client.get("/posts", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert client.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200  # a link to the page


@pytest.mark.parametrize(
    "body",
    ["", "{", "[]", "3", '{"id": 3, "action": "drop"}', '{"id": "plain", "action": "delete"}', '{"id": "plain"}',
     '{"id": "plain", "action": "drop", "more": 1}', "[" * 100_000, "x" * 1_100_000],
    ids=lambda body: body[:30],
)  # fmt: skip
def test_a_body_that_is_no_decision_is_refused(body: str, client: httpx.Client, recipe: Recipe) -> None:
    reply = client.post("/decide", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code in (400, 413) and reply.json()["error"]
    assert decisions(recipe) == []


def test_unknown_filters_and_paths_are_refused(client: httpx.Client) -> None:
    assert client.get("/posts", params={"status": "x"}).status_code == 400
    assert client.get("/post", params={"id": "x"}).status_code == 404
    assert client.get("/../recipe.yaml").status_code == client.get("/docs").status_code == 404
    assert client.get("/decide").status_code == 405


def test_the_content_security_policy_allows_only_the_pages_own_code(client: httpx.Client) -> None:
    reply = client.get("/")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and reply.headers["cache-control"] == "no-store"
    assert not re.search(r"""(src|href)=["']?(https?:)?//|innerHTML|insertAdjacentHTML""", reply.text)


# ---- the command ----


def test_the_command_prints_its_address_and_ends_on_a_signal(recipe: Recipe, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distill", "review", "--config", str(tmp_path / "recipe.yaml"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.fullmatch(r"review of micro: (http://127\.0\.0\.1:\d+) \(stop with Ctrl-C\)\n", line)
        assert address, line
        assert httpx.get(f"{address[1]}/posts", timeout=60).json()["total"] == 6
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def test_what_cannot_be_reviewed_is_one_sentence(distill: Command, tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "x").mkdir()
    path = micro.write(tmp_path / "x", micro.RECORDED)
    result = distill("review", "--config", path)
    assert result.status == 2 and result.error.endswith("the stage annotate has not finished; run: distill annotate")
    result = distill("review", "--config", path, "--annotate", "null", "--assistant.tasks", "{classify: 1.0}",
                     "--student.tasks", "{classify: 1.0}", "--augment", "null")  # fmt: skip
    assert (result.status, result.error) == (2, "review needs an annotate section")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = distill("review", "--config", tmp_path / "recipe.yaml", "--port", port)
    assert result.error.startswith(f"--host and --port: cannot listen on 127.0.0.1:{port}: Address already in use")
