"""Replicas of an endpoint: the least busy healthy one is asked, and one that fails loses no request."""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from distill.errors import RunError, SettingsError
from distill.models.endpoint import Endpoint, EndpointSettings
from tests.models.openai_server import DROPPED, Server, answers, endpoint, posts


def dead_url() -> str:
    """The address of a server that has ended."""
    with Server() as server:
        return server.url


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.01)


def healthy(teacher: Endpoint) -> list[bool]:
    return [state.healthy for state in teacher.replicas]


def test_requests_go_to_the_least_busy_replica(tmp_path: Path) -> None:
    with Server(delay_s=0.3) as slow, Server(delay_s=0.01) as fast:
        teacher = endpoint(slow.url, replicas=[fast.url], concurrency=4)
        assert all(answer.error is None for answer in answers(teacher, posts(tmp_path, 24)))
        assert fast.requests > 2 * slow.requests > 0
        states = teacher.replicas
    assert [state.url for state in states] == [slow.url, fast.url]
    assert [state.answered for state in states] == [slow.requests, fast.requests]
    assert [state.in_flight for state in states] == [0, 0] and healthy(teacher) == [True, True]


def test_idle_replicas_are_asked_in_turn(tmp_path: Path) -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(Server()) for _ in range(3)]
        first, *others = (server.url for server in servers)
        teacher = endpoint(first, replicas=others, concurrency=1)
        answers(teacher, posts(tmp_path, 9))
        assert [server.requests for server in servers] == [3, 3, 3]


@pytest.mark.parametrize(
    "failure",
    [
        {"script": lambda request: (DROPPED, "")},
        {"rates": {"500": 1.0}},
        {"rates": {"broken": 1.0}},
        {"rates": {"429": 1.0}, "headers": {"Retry-After": "60"}},
        {"delay_s": 5.0},
        None,
    ],
    ids=["dropped", "500", "broken", "busy", "hangs", "dead"],
)
def test_a_failing_replica_loses_no_request(tmp_path: Path, failure: dict[str, Any] | None) -> None:
    with Server() as good, Server(**(failure or {})) as bad:
        url = bad.url if failure else dead_url()
        teacher = endpoint(url, replicas=[good.url], max_attempts=1, timeout_s=0.5, deadline_s=8.0)
        found = answers(teacher, posts(tmp_path, 20))
        assert [answer.error for answer in found] == [None] * 20
        assert good.requests == 20
        failed, answered = teacher.replicas
        assert failed.failed > 0 and answered.failed == 0 and (failed.answered, answered.answered) == (0, 20)
        teacher.close()


def test_a_dead_replica_is_left_alone_until_it_is_healthy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sick = True

    def script(request: Any) -> tuple[int, Any] | None:
        return (503, {"error": {"message": "loading"}}) if sick else None

    with Server() as good, Server(script=script) as bad, caplog.at_level(logging.WARNING):
        bad.health = lambda: 503 if sick else 200
        teacher = endpoint(good.url, replicas=[bad.url], max_attempts=1, concurrency=1)
        found = answers(teacher, posts(tmp_path, 10))
        assert [answer.error for answer in found] == [None] * 10
        assert bad.requests == 1 and healthy(teacher) == [True, False]
        sick = False
        wait_until(lambda: healthy(teacher) == [True, True])
        answers(teacher, posts(tmp_path, 10))
        assert bad.requests == 6
    assert [record.getMessage() for record in caplog.records] == [
        f"{bad.url} does not answer and gets no requests until its health check succeeds: status 503: loading",
        f"{bad.url} answers again",
    ]


def test_if_no_replica_is_healthy_all_are_tried(tmp_path: Path) -> None:
    sick = True

    def script(request: Any) -> tuple[int, Any] | None:
        return (500, "not now") if sick else None

    with Server(script=script) as one, Server(script=script) as two:
        one.health = two.health = lambda: 503
        teacher = endpoint(one.url, replicas=[two.url], max_attempts=2, concurrency=1)
        (first,) = answers(teacher, posts(tmp_path, 1))
        assert "500" in str(first.error) and one.requests == two.requests == 2
        sick = False
        (second,) = answers(teacher, posts(tmp_path, 1))
        assert second.error is None
        teacher.close()


def test_refusals_and_unreachable_replicas_are_reported_as_those_of_one_server(tmp_path: Path) -> None:
    with Server(refuse=lambda body: (400, "content policy")) as one, Server() as two:
        (answer,) = answers(endpoint(one.url, replicas=[two.url]), posts(tmp_path, 1))
        assert answer.kind == "filtered" and two.requests == 0
    with pytest.raises(RunError, match="no server answers at base_url"):
        answers(endpoint(dead_url(), replicas=[dead_url()], max_attempts=1), posts(tmp_path, 1))
    with Server() as good, Server(refuse=lambda body: (404, "model big-vl not found")) as wrong:
        with pytest.raises(RunError, match="does not serve big-vl") as caught:
            answers(endpoint(wrong.url, replicas=[good.url], concurrency=1), posts(tmp_path, 1))
        assert wrong.url in str(caught.value)


def test_labels_are_tokenized_by_any_replica(tmp_path: Path) -> None:
    with Server(tokenize=lambda text: list(text.encode())) as good:
        teacher = endpoint(dead_url(), replicas=[good.url], max_attempts=1)
        teacher.classify(posts(tmp_path, 1))
        assert good.tokenized and good.received[0].body["logprob_token_ids"]
        teacher.close()


@pytest.mark.parametrize(
    ("replicas", "message"),
    [
        (["localhost:8001"], r"replicas\[0\] is 'localhost:8001'; it takes an address"),
        (["http://b/v1", "http://a/v1"], r"replicas\[1\] is the address of another server of this endpoint"),
        (["http://me:p@ss@b/v1@"], r"replicas\[0\] is not an address"),
    ],
)
def test_invalid_addresses_are_refused(replicas: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        EndpointSettings("http://a/v1", "m", replicas=replicas)
