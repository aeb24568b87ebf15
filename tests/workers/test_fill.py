"""Shards: merged exactly once, whatever was cut or left; and a worker without Ray around it."""

import json
import logging
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from distill.annotation.cached_teacher import CachedTeacher, TeacherQuery
from distill.annotation.ledger import Ledger, LedgerInUse
from distill.errors import RunError
from distill.models.reasoner import Answer, Sampling
from distill.stages.prefill import asking
from distill.task.sample import Sample
from distill.workers import fill, pool
from distill.workers.settings import RaySettings
from tests.models.openai_server import Server
from tests.workers.annotating import LABELS, endpoint, posts


def answer(text: str) -> Answer:
    return Answer(text, True, 10, 5)


def put(path: Path, **texts: str) -> None:
    with Ledger(path) as ledger:
        ledger.put_all([(key, {"id": key, "base_url": "http://a"}, answer(text)) for key, text in texts.items()])


def lines(path: Path) -> list[tuple[str, str]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["key"], line["answer"]["text"]) for line in found]


def test_shards_are_merged_by_key_and_deleted(tmp_path: Path) -> None:
    put(tmp_path / "ledger.jsonl", a="one")
    put(tmp_path / "shards/x/1.jsonl", a="other", b="two")
    put(tmp_path / "shards/x/2.jsonl", b="two again", c="three")
    put(tmp_path / "shards/y/1.jsonl", d="four")
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        fill.merge(ledger, tmp_path)
        assert len(ledger) == 4 and ledger.paid.answers == 0, "they count when the stage uses them"
        assert ledger.get("b", "http://a") == answer("two") and ledger.paid.answers == 1
        fill.merge(ledger, tmp_path)
        ledger.put("e", {"base_url": "http://a"}, answer("five"))
    assert lines(tmp_path / "ledger.jsonl") == [
        ("a", "one"),
        ("b", "two"),
        ("c", "three"),
        ("d", "four"),
        ("e", "five"),
    ]
    assert not (tmp_path / "shards").exists()


def test_a_merge_that_was_interrupted_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "shards/x/1.jsonl", a="one", b="two", c="three")
    monkeypatch.setattr("distill.annotation.ledger._MERGED", 2)
    with Ledger(tmp_path / "ledger.jsonl") as ledger, monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fill.merge(ledger, tmp_path)
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        fill.merge(ledger, tmp_path)
    assert lines(tmp_path / "ledger.jsonl") == [("a", "one"), ("b", "two"), ("c", "three")]


def test_a_cut_line_of_a_shard_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = tmp_path / "shards/x/1.jsonl"
    put(shard, a="one", b="two")
    shard.write_bytes(shard.read_bytes()[:-20])
    with Ledger(tmp_path / "ledger.jsonl") as ledger, caplog.at_level(logging.WARNING):
        fill.merge(ledger, tmp_path)
    assert lines(tmp_path / "ledger.jsonl") == [("a", "one")]
    assert f"{shard} ends with a truncated line" in caplog.text


def test_a_shard_that_a_worker_still_writes_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = tmp_path / "shards/x/1.jsonl"
    worker = Ledger(shard)
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        monkeypatch.setattr(fill, "_LOCK_S", 0.0)
        with pytest.raises(LedgerInUse, match="another process uses the ledger"):
            fill.merge(ledger, tmp_path)
        monkeypatch.setattr(fill, "_LOCK_S", 60.0)
        worker.put("a", {}, answer("late"))
        threading.Timer(0.3, worker.close).start()
        fill.merge(ledger, tmp_path)
    assert lines(tmp_path / "ledger.jsonl") == [("a", "late")]


def started(
    monkeypatch: pytest.MonkeyPatch, folder: Path, url: str, root: Path, files: str = "", actor: str = "actor"
) -> fill._Worker:
    monkeypatch.setattr(pool, "actor_id", lambda: actor)
    start = asking(TeacherQuery("predict", Sampling(max_new_tokens=9)))
    settings = RaySettings(files=files)
    return fill._Worker(fill._Job(endpoint(url), LABELS, 4, (), [start], folder, settings, root))


def items(folder: Path, samples: list[Sample], url: str) -> list[fill._Post]:
    start = asking(TeacherQuery("predict", Sampling(max_new_tokens=9)))
    with Ledger(folder / "own.jsonl") as ledger:
        return list(fill._unanswered(CachedTeacher(endpoint(url), LABELS, ledger, 4), samples, [start]))


def test_a_restarted_worker_asks_only_what_its_shard_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = posts(tmp_path / "data", 12)
    with Server() as server:
        first = started(monkeypatch, tmp_path, server.url, tmp_path / "data")
        batch = items(tmp_path, samples, server.url)
        assert [len(post.samples) for post in batch] == [1, 2, *[1] * 9], "posts with the same content stay together"
        count, new = first(batch[:5])
        assert (count, len(new), server.requests) == (6, 5, 5)
        first.teacher.ledger.close()  # its process was killed
        count, new = started(monkeypatch, tmp_path, server.url, tmp_path / "data")(batch)
        assert (count, len(new), server.requests) == (12, 6, 11)
    assert len(lines(tmp_path / "actor.jsonl")) == 11


@pytest.fixture
def store(tmp_path: Path) -> Iterator[tuple[str, list[str], Path]]:
    """The address of a store of files, the paths that were read, and its folder."""
    folder, read = tmp_path / "store", list[str]()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            if self.command == "GET":
                read.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}", read, folder
        http.shutdown()


def test_workers_read_files_from_an_fsspec_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: tuple[str, list[str], Path]
) -> None:
    address, read, folder = store
    root = tmp_path / "data"
    samples = posts(root, 9)
    with Server() as server:
        batch = items(tmp_path, samples, server.url)
        root.rename(folder)  # a worker does not see the folder
        worker = started(monkeypatch, tmp_path, server.url, root, address)
        assert worker(batch)[0] == 9
        assert sorted(read) == ["/negative.png", "/neutral.png", "/positive.png"]
        assert len({request.sentiment for request in server.received}) == 3
        shutil.copy(folder / "positive.png", folder / "negative.png")
        with pytest.raises(RunError, match=r"post s\d is another one on a Ray worker: its files in ray\.files"):
            worker(batch)
        (folder / "negative.png").unlink()
        with pytest.raises(RunError, match=rf"post s\d: {address}/negative\.png cannot be read"):
            worker(batch)
        plain = started(monkeypatch, tmp_path, server.url, root, actor="another")
        with pytest.raises(RunError, match=r"a Ray worker cannot read a file of post s\d: .*; set ray\.files"):
            plain(batch)
        assert server.requests == 8
