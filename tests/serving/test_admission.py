"""Admission control: body size, body deadline, token and concurrency limit."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from distill.data.corpus import Corpus
from distill.errors import SettingsError
from distill.models.local import Local
from distill.serving.gateway import Gateway
from distill.serving.settings import ServeSettings
from tests.serving.conftest import message, metric, policy, running
from tests.serving.test_gateway import ask


def test_a_body_over_the_limit_is_refused_with_and_without_content_length(student: Local) -> None:
    with running(student, max_body_mb=0.01, rationale=False) as client:
        large = json.dumps({"text": "x" * 20_000}).encode()

        def chunks() -> Iterator[bytes]:  # chunked: no Content-Length
            for start in range(0, len(large), 500):
                yield large[start : start + 500]

        for content in (large, chunks()):
            assert "10,000" in message(client.post("/v1/sentiment", content=content), 413)
        assert ask(client, text="words").status_code == 200
        assert metric(client, "distill_queue_depth") == 0


def test_a_body_that_never_ends_times_out(student: Local) -> None:
    with running(student, deadline_s=0.5, rationale=False) as client:
        stop = threading.Event()

        def chunks() -> Iterator[bytes]:
            yield b'{"text": "'
            while not stop.wait(0.1):
                yield b"x"

        threading.Timer(5, stop.set).start()
        assert "in time" in message(client.post("/v1/sentiment", content=chunks()), 408)
        stop.set()


def test_requests_without_the_token_are_refused(student: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_KEY", "open sesame")
    with running(student, api_key_env="GATEWAY_KEY", rationale=False) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic open sesame"},
                        {"Authorization": "Bearer open sesamé".encode()}):  # fmt: skip
            for path in ("/v1/sentiment", "/v1/chat/completions", "/tokenize"):
                reply = client.post(path, json={"text": "a"}, headers=headers)
                assert "Bearer" in message(reply, 401) and "sesame" not in reply.text
            assert client.get("/v1/models", headers=headers).status_code == 401
        client.headers["Authorization"] = "Bearer open sesame"
        assert ask(client, text="a").status_code == 200
        assert client.get("/v1/models").status_code == 200


def test_a_missing_token_variable_is_refused_at_start(student: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GATEWAY_KEY", raising=False)
    with pytest.raises(SettingsError, match="GATEWAY_KEY"):
        Gateway(ServeSettings(api_key_env="GATEWAY_KEY"), policy(), student, None, "cascade")


def test_requests_beyond_the_queue_are_refused_immediately(student: Local, postcards: Corpus) -> None:
    with running(student, queue=8, batch_size=4) as client, ThreadPoolExecutor(100) as pool:
        texts = [sample.text for sample in postcards.test] * 3
        replies = list(pool.map(lambda text: ask(client, text=text), texts[:100]))
        statuses = Counter(reply.status_code for reply in replies)
        assert set(statuses) == {200, 429} and sum(statuses.values()) == 100
        assert all(int(reply.headers["retry-after"]) >= 1 for reply in replies if reply.status_code == 429)
        assert metric(client, 'distill_requests_total{route="/v1/sentiment",status="200"}') == statuses[200]
        assert metric(client, 'distill_requests_total{route="/v1/sentiment",status="429"}') == statuses[429]
        assert metric(client, "distill_queue_depth") == 0
