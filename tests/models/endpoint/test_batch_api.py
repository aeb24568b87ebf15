"""The client of the batch API: what it sends, and services that redirect, list differently or lack parts of the API."""

import json
from pathlib import Path
from typing import Any

import pytest

from distill.errors import RunError
from distill.models.endpoint import EndpointSettings
from distill.models.endpoint.batch_api import Batch, BatchService, NotThere
from tests.models.batch_server import BatchServer
from tests.models.openai_server import Server

REQUEST = {"custom_id": "ab" * 32, "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}


def service(url: str, **settings: Any) -> BatchService:
    return BatchService(EndpointSettings(url, "big", **({"backoff_s": 0.001, "max_attempts": 3} | settings)))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "requests-0001.jsonl"
    path.write_text(json.dumps(REQUEST) + "\n" + "é\n\r\n--x\n" * 300_000)  # more than one part of an upload
    return path


def test_a_file_arrives_as_it_is(file: Path) -> None:
    with BatchServer() as server:
        id = service(server.url).upload(file)
        assert server.files[id] == file.read_bytes()


def test_a_file_arrives_through_an_address_with_a_query(file: Path) -> None:
    with BatchServer() as server:
        api = service(f"{server.url}?api-version=1")
        made = api.create(api.upload(file), "24h", "mark", 0.0)
        assert api.find("another", "mark", 0.0) is None and api.find(server.batches[made.id]["input_file_id"], "", 0.0)
        assert server.batches[made.id]["metadata"] == {"distill": "mark"}
        assert server.batches[made.id]["completion_window"] == "24h"


def test_a_batch_is_found_on_a_later_page_and_without_the_id_of_its_file(file: Path) -> None:
    with BatchServer() as server:
        api = service(server.url)
        ids = [api.create(api.upload(file), "24h", f"mark {n}", 0.0).id for n in range(7)]
        found = api.find(server.batches[ids[0]]["input_file_id"], "mark 0", 0.0)
        assert found is not None and found.id == ids[0]
        server.batch_fields = {"input_file_id": None}
        found = api.find("file-x", "mark 3", 0.0)
        assert found is not None and found.id == ids[3]
        server.batch_fields = {"metadata": None}
        assert api.find("file-x", "mark 3", 0.0) is None


@pytest.mark.parametrize("reply", [{"data": 5}, {"data": None, "has_more": True}, {}, [], [5, {"status": "completed"}]])
def test_an_odd_list_has_no_batch(reply: Any) -> None:
    with BatchServer() as server:
        server.list_reply = reply
        assert service(server.url).find("file-x", "mark", 0.0) is None


def test_results_in_a_storage_elsewhere_are_fetched_without_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCH_TEST_KEY", "sk-1")
    with BatchServer() as storage, BatchServer() as server:
        id = storage.store(b"results")
        server.refuse_call = lambda method, path: 302 if path.endswith("/content") else None
        server.headers = {"Location": f"{storage.url}/files/{id}/content?signature=1"}
        service(server.url, api_key_env="BATCH_TEST_KEY").download("file-9", tmp_path / "results.jsonl")
        assert (tmp_path / "results.jsonl").read_bytes() == b"results"
        assert server.keys == ["Bearer sk-1"] and storage.keys == [None]


def test_a_download_that_breaks_off_is_repeated_and_leaves_no_part(tmp_path: Path) -> None:
    with BatchServer() as server:
        id, drops = server.store(b"results"), [True]
        server.drop_reply = lambda method, path: bool(drops and drops.pop())
        api = service(server.url)
        api.download(id, tmp_path / "results.jsonl")
        assert (tmp_path / "results.jsonl").read_bytes() == b"results"
        with pytest.raises(NotThere, match="does not know the file file-7"):
            api.download("file-7", tmp_path / "results.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


@pytest.mark.parametrize(
    ("reply", "batch"),
    [
        ({"id": "b"}, Batch("b", "")),
        ({"id": "b", "status": "COMPLETED", "output_file_id": "o"}, Batch("b", "completed", output_file="o")),
        (
            {"id": "b", "status": "in_progress", "request_counts": {"total": 9, "completed": 3, "failed": 1}},
            Batch("b", "in_progress", 4, 9, answered=3),
        ),
        (
            {"id": "b", "status": "failed", "errors": {"data": [{"message": "no\nmodel"}, {"line": 2}, "odd"]}},
            Batch("b", "failed", problem="no model"),
        ),
        ({"id": "b", "status": "Canceled", "errors": "cut \ud83d"}, Batch("b", "cancelled", problem="cut ?")),
        ({"id": "b", "status": "failed", "errors": "out of credit"}, Batch("b", "failed", problem="out of credit")),
        ({"id": "b", "status": None, "request_counts": [], "errors": {}}, Batch("b", "")),
    ],
)
def test_a_batch_is_read_liberally(reply: dict[str, Any], batch: Batch) -> None:
    with BatchServer() as server:
        server.batches["b"] = {"id": "b"}
        server.poll = lambda id: reply  # type: ignore[method-assign]
        assert service(server.url).get("b") == batch


@pytest.mark.parametrize("reply", [[], {"status": "completed"}, {"id": 7}])
def test_a_reply_that_is_no_batch_is_asked_for_again_and_explained(reply: Any) -> None:
    with BatchServer() as server:
        server.batches["b"] = {"id": "b"}
        server.poll = lambda id: reply  # type: ignore[method-assign]
        with pytest.raises(RunError, match="does not answer, after 3 attempts: a reply without an id"):
            service(server.url).get("b")


def test_the_words_of_a_service_do_not_repeat_a_login(file: Path) -> None:
    with BatchServer(refuse_call=lambda method, path: 400) as server, pytest.raises(RunError) as caught:
        service(server.url.replace("//", "//me:word@")).upload(file)
    assert "not here: Basic ***" in str(caught.value) and "word" not in str(caught.value)


def test_a_server_without_the_api(file: Path) -> None:
    with Server() as server, pytest.raises(RunError):
        service(server.url).upload(file)
    with pytest.raises(RunError, match=r"the batch API at http://127\.0\.0\.1:9/v1 does not answer"):
        service("http://127.0.0.1:9/v1").find("f", "m", 0.0)
