"""The circuit breaker: when it opens, how it closes again, and what clients see meanwhile."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from distill.models.local import Local
from distill.serving.breaker import CircuitBreaker
from tests.models.openai_server import ChatRequest, Server, token
from tests.serving.conftest import DEFER_ALL, metric, running, wait_until
from tests.serving.test_cascade_service import ask, teacher_at


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def fail(breaker: CircuitBreaker, *, waited: bool = True) -> None:
    admitted = breaker.admit()
    assert admitted is not None
    breaker.report(admitted, answered=False, waited=waited)


def test_it_opens_after_failures_in_a_row() -> None:
    breaker = CircuitBreaker(3, 30, Clock())
    for _ in range(2):
        fail(breaker)
        fail(breaker)
        breaker.report("closed", answered=True, waited=True)
        assert breaker.state == "closed"
    for _ in range(10):
        fail(breaker, waited=False)  # quick failures are ignored
    for state in ("closed", "closed", "open"):
        fail(breaker)
        assert breaker.state == state
    assert breaker.admit() is None


def test_half_open_it_admits_one_request_at_a_time() -> None:
    clock = Clock()
    breaker = CircuitBreaker(1, 30, clock)
    fail(breaker)
    clock.seconds = 29.9
    assert (breaker.state, breaker.admit()) == ("open", None)
    clock.seconds = 30
    assert (breaker.state, breaker.admit(), breaker.admit()) == ("half-open", "half-open", None)
    breaker.report("closed", answered=False, waited=True)  # an older request; the trial is still in flight
    assert (breaker.state, breaker.admit()) == ("half-open", None)
    breaker.report("half-open", answered=False, waited=False)
    assert breaker.state == "open"
    clock.seconds = 60
    assert breaker.admit() == "half-open"
    breaker.report("half-open", answered=True, waited=True)
    assert (breaker.state, breaker.admit(), breaker.admit()) == ("closed", "closed", "closed")


def state(client: httpx.Client) -> tuple[Any, float]:
    """State of the breaker, which may change between two requests, but not twice so soon."""
    for _ in range(2):
        ready, health = client.get("/health/ready"), client.get("/health")
        if ready.json() == health.json():
            break
    assert ready.status_code == 200 and health.json() == ready.json()
    return ready.json().get("teacher_breaker"), metric(client, "distill_teacher_breaker")


def test_a_teacher_that_swallows_requests_is_suspended_and_tried_again(student: Local) -> None:
    swallows = True

    def reply(request: ChatRequest) -> list[dict[str, Any]]:
        if swallows:
            time.sleep(2.5)
        return [token("positive", positive=0.98, neutral=0.01, negative=0.01)]

    settings = {"deadline_s": 1.0, "breaker_failures": 2, "breaker_retry_s": 1.5, "rationale": False}
    with (
        Server(logprobs=reply) as server,
        running(student, teacher_at(server.url, 1.0), DEFER_ALL, **settings) as client,
        ThreadPoolExecutor(20) as pool,
    ):
        assert state(client) == ("closed", 0)
        assert [ask(client, f"post {n}")["reason"] for n in range(2)] == ["the teacher was late"] * 2
        assert state(client) == ("open", 2)
        asked, begin = server.requests, time.monotonic()
        found = list(pool.map(lambda n: ask(client, f"post {n}"), range(20)))
        assert time.monotonic() - begin < 0.9  # of 20 deadlines, none is waited for
        assert {answer["reason"] for answer in found} == {"the teacher is suspended"}
        assert all(
            answer["stage"] == "student" and answer["degraded"] and not answer["teacher_calls"] for answer in found
        )
        assert server.requests == asked
        wait_until(lambda: state(client) == ("half-open", 1))
        found = list(pool.map(lambda n: ask(client, f"post {n}"), range(20)))
        reasons = [answer["reason"] for answer in found]
        assert sorted(reasons) == ["the teacher is suspended"] * 19 + ["the teacher was late"]
        assert server.requests == asked + 1
        swallows = False
        wait_until(lambda: ask(client)["reason"] == "the teacher is certain")
        assert state(client) == ("closed", 0)
        assert not any(ask(client, f"post {n}")["degraded"] for n in range(3))


@pytest.mark.parametrize("timeout_s", [0.4, 60.0])
def test_the_time_limit_of_a_request_counts_as_the_deadline(student: Local, timeout_s: float) -> None:
    with (
        Server(delay_s=2.0) as server,
        running(
            student, teacher_at(server.url, 1.0, timeout_s=timeout_s), DEFER_ALL,
            deadline_s=1.0, breaker_failures=1, rationale=False,
        ) as client,
    ):  # fmt: skip
        assert ask(client)["reason"] == ("the teacher did not answer" if timeout_s < 1 else "the teacher was late")
        assert ask(client)["reason"] == "the teacher is suspended"


def test_without_a_teacher_there_is_no_breaker(student: Local) -> None:
    with running(student) as client:
        assert state(client) == (None, 0)
