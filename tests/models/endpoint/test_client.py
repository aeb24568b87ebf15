"""The chat client: retries, deadlines, fallbacks for unsupported request fields, and when the run ends."""

import logging
import re
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.errors import RunError
from tests.models.openai_server import Server, answers, endpoint, posts, token

# ---- failures ----


def test_requests_are_retried_after_busy_and_broken_replies(tmp_path: Path) -> None:
    rates = {"429": 0.2, "500": 0.1, "broken": 0.1, "empty": 0.1}
    with Server(rates=rates, seed=3) as server:
        found = answers(endpoint(server.url, max_attempts=30, backoff_s=0.002), posts(tmp_path, 60))
    assert all(server.sent[kind] > 0 for kind in rates)
    assert [answer.error for answer in found] == [None] * 60
    assert server.sent["valid"] == 60
    assert (found[0].prompt_tokens, found[0].completion_tokens) == (100, 10)


def test_retry_after_is_respected(tmp_path: Path) -> None:
    with Server(headers={"Retry-After": "0.3"}) as server:
        server.refuse = lambda body: (429, "slow down") if server.requests == 1 else None
        begin = time.monotonic()
        found = answers(endpoint(server.url), posts(tmp_path, 1))
    assert found[0].error is None
    assert time.monotonic() - begin >= 0.3


def test_no_wait_starts_that_would_pass_the_deadline(tmp_path: Path) -> None:
    with Server(rates={"429": 1.0}, headers={"Retry-After": "3600"}) as server:
        begin = time.monotonic()
        found = answers(endpoint(server.url, deadline_s=5.0), posts(tmp_path, 1))
    assert found[0].error is not None and "429" in found[0].error
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize("delays", [{"delay_s": 1.0}, {"chunk_delay_s": 0.05}], ids=["late reply", "slow reply"])
def test_time_limits(tmp_path: Path, delays: dict[str, float]) -> None:
    with Server(**delays) as server:  # type: ignore[arg-type]
        begin = time.monotonic()
        found = answers(endpoint(server.url, timeout_s=0.15, deadline_s=0.4), posts(tmp_path, 1))
        assert time.monotonic() - begin < 5
    assert found[0].error is not None and re.search("timed out|took longer", found[0].error)
    assert (found[0].text, found[0].finished) == ("", False)
    assert server.requests >= 2


def test_a_refused_request_affects_only_its_sample(tmp_path: Path) -> None:
    def refuse(body: dict[str, Any]) -> tuple[int, str] | None:
        return (400, "content policy") if "post 2" in str(body["messages"]) else None

    with Server(refuse=refuse) as server:
        found = answers(endpoint(server.url), posts(tmp_path, 5))
        assert server.requests == 5
    assert [answer.error is None for answer in found] == [True, True, False, True, True]
    assert "content policy" in str(found[2].error)


def test_an_unreachable_server_ends_the_run(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        begin = time.monotonic()
        with pytest.raises(RunError, match="base_url") as caught:
            answers(endpoint(url, max_attempts=3), posts(tmp_path, 50))
    assert url in str(caught.value)
    assert time.monotonic() - begin < 5


def test_a_server_that_stops_answering_ends_the_run(tmp_path: Path) -> None:
    with Server() as server:
        server.refuse = lambda body: (503, "gone") if server.requests > 20 else None
        teacher = endpoint(server.url, max_attempts=2, backoff_s=0.001)
        results = []
        with pytest.raises(RunError, match="in a row") as caught:
            results.extend(teacher.reason(posts(tmp_path, 200), "predict"))
        assert server.requests < 60
    assert server.url in str(caught.value)


def test_a_busy_server_is_retried_until_the_deadline_and_all_threads_respect_retry_after(tmp_path: Path) -> None:
    """Rate-limited replies do not count as attempts, so no answer is given up, and all threads wait."""
    begin = time.monotonic()
    with Server(headers={"Retry-After": "0.2"}) as server:
        server.refuse = lambda body: (429, "slow down") if time.monotonic() - begin < 1.0 else None
        found = answers(endpoint(server.url, max_attempts=2, deadline_s=20), posts(tmp_path, 12))
        refused = server.requests - 12
    assert [answer.error for answer in found] == [None] * 12
    assert refused <= 4 * 6, "four threads, at most six attempts each in one second"


def test_a_server_that_refuses_many_requests_in_a_row_ends_the_run(tmp_path: Path) -> None:
    with Server() as server:
        server.refuse = lambda body: (400, "model not found") if server.requests > 10 else None
        with pytest.raises(RunError, match=r"8 requests in a row unanswered: .*model not found"):
            answers(endpoint(server.url), posts(tmp_path, 100))
        assert server.requests < 30


def test_a_server_that_requires_payment_ends_the_run(tmp_path: Path) -> None:
    with Server(refuse=lambda body: (402, "insufficient credits")) as server:
        with pytest.raises(RunError, match=r"requires payment .*insufficient credits"):
            answers(endpoint(server.url), posts(tmp_path, 100))
        assert server.requests <= 8


# ---- servers without optional request fields ----


@pytest.mark.parametrize("message", ["Unknown field: response_format", "guided decoding is off", "no json_schema here"])
def test_the_schema_is_omitted_if_the_server_refuses_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, message: str
) -> None:
    with Server(refuse=lambda body: (400, message) if "response_format" in body else None) as server:
        teacher = endpoint(server.url)
        with caplog.at_level(logging.WARNING):
            found = answers(teacher, posts(tmp_path, 30)) + answers(teacher, posts(tmp_path, 3))
    assert [answer.error for answer in found] == [None] * 33
    assert len([record for record in caplog.records if "JSON schema" in record.message]) == 1
    assert sum("response_format" in request.body for request in server.received) <= 4


def test_the_schema_can_be_disabled(tmp_path: Path) -> None:
    with Server() as server:
        answers(endpoint(server.url, json_schema=False), posts(tmp_path, 1))
    assert "response_format" not in server.received[0].body


def test_the_seed_is_omitted_if_the_server_refuses_it(tmp_path: Path) -> None:
    with Server(refuse=lambda body: (422, "extra field seed") if "seed" in body else None) as server:
        found = answers(endpoint(server.url), posts(tmp_path, 6))
    assert [answer.error for answer in found] == [None] * 6


def test_fewer_log_probabilities_are_requested_if_the_server_refuses(tmp_path: Path) -> None:
    def refuse(body: dict[str, Any]) -> tuple[int, str] | None:
        return (400, "top_logprobs must be at most 5") if body.get("top_logprobs", 0) > 5 else None

    with Server(refuse=refuse, logprobs=lambda request: [token("neutral", neutral=0.8)]) as server:
        scores = endpoint(server.url).classify(posts(tmp_path, 3))
    assert {request.body["top_logprobs"] for request in server.received} == {20, 5}
    assert not np.isnan(scores.label_mass).any()
