"""The cascade as a service: decisions, and fallbacks if the teacher or the student is down or too slow."""

import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from distill.cascade.cascade import run_cascade
from distill.data.corpus import Corpus
from distill.models.backbone import Backbone
from distill.models.endpoint import Endpoint, EndpointSettings
from distill.models.local import Local
from distill.models.reasoner import ClassScores
from distill.serving.settings import endpoint_for_serving
from distill.task.labels import LabelSpace
from distill.task.prompts import EarlierAnswers
from distill.task.sample import Sample
from tests.models.openai_server import COLOURS, ChatRequest, Server, token, write_image
from tests.serving.conftest import DEFER_ALL, message, metric, policy, running, wait_until
from tests.serving.test_media import uri

LABELS = LabelSpace()
DEADLINE = 3.0


def teacher_at(url: str, deadline_s: float = DEADLINE, **settings: Any) -> Endpoint:
    return Endpoint(endpoint_for_serving(EndpointSettings(url, "big-vl", **settings), deadline_s), LABELS)


def ask(client: httpx.Client, text: str = "words", **fields: Any) -> dict[str, Any]:
    reply = client.post("/v1/sentiment", json={"text": text, "rationale": False} | fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


def with_confidence(probability: float) -> Any:
    """Log-probabilities of a teacher that gives this probability to the label of the image."""

    def logprobs(request: ChatRequest) -> list[dict[str, Any]]:
        rest = dict.fromkeys(COLOURS, (1 - probability) / 2) | {request.sentiment: probability}
        return [token('"Prediction": '), token(request.sentiment, **rest)]

    return logprobs


@pytest.fixture
def red(tmp_path: Path) -> str:
    return uri(write_image(tmp_path / "red.png", "negative", 56).read_bytes())


def test_a_certain_teacher_decides_posts_that_the_student_defers(student: Local, red: str) -> None:
    with Server(logprobs=with_confidence(0.98)) as server:
        teacher = teacher_at(server.url, deadline_s=30, prompt_price=1.0, completion_price=2.0)
        with running(student, teacher, DEFER_ALL) as client:
            found = ask(client, image=red)
            assert (found["label"], found["stage"], found["teacher_calls"]) == ("negative", "teacher_first", 1)
            assert found["reason"] == "the teacher is certain" and not found["degraded"]
            assert found["cost"]["price"] == pytest.approx((100 * 1.0 + 10 * 2.0) / 1e6)
            assert metric(client, "distill_teacher_calls_total") == 1
            assert metric(client, "distill_teacher_share") == 1
            assert metric(client, 'distill_posts_total{stage="teacher_first"}') == 1
        assert server.requests == 1
        assert [image.size for image in server.received[0].images] == [(56, 56)]


def test_an_uncertain_teacher_is_called_twice_and_never_three_times(student: Local, tmp_path: Path) -> None:
    cascade_policy = policy(student_threshold=-1.0, teacher_threshold=-1.0)
    images = [uri(write_image(tmp_path / f"{name}.png", name, 56).read_bytes()) for name in COLOURS]
    with Server(logprobs=with_confidence(0.6)) as server:
        with running(student, teacher_at(server.url, deadline_s=30), cascade_policy) as client:
            found = [ask(client, image=image) for image in images]
            assert {answer["stage"] for answer in found} == {"teacher_first", "teacher_review"}
            for answer in found:
                assert answer["teacher_calls"] == (2 if answer["stage"] == "teacher_review" else 1)
            calls = sum(answer["teacher_calls"] for answer in found)
            assert server.requests == calls == metric(client, "distill_teacher_calls_total")
        reviews = [request for request in server.received if "A first reader said" in request.text]
        assert len(reviews) == sum(answer["stage"] == "teacher_review" for answer in found)


def test_decisions_equal_those_of_the_cascade(student: Local, make_backbone: Any, postcards: Corpus) -> None:
    """Concurrent requests of the gateway and one run over a split give the same decisions; both models are local."""
    teacher = Local(make_backbone(7, batch_size=4), "teacher")
    samples = postcards.test[:30]
    scores = student.classify(samples)
    uncertainties = sorted(prediction.uncertainty for prediction in policy().student_predictions(scores))
    index = int(np.diff(uncertainties).argmax())  # the largest gap, so that rounding changes no decision
    threshold = (uncertainties[index] + uncertainties[index + 1]) / 2
    cascade_policy = policy(
        student_threshold=threshold, teacher_threshold=0.93, teacher_temperature=0.7, min_label_mass=0.0
    )
    expected = [decision.to_json() for decision in run_cascade(samples, scores, teacher, cascade_policy)]
    assert len({decision["stage"] for decision in expected}) >= 2
    with running(student, teacher, cascade_policy) as client, ThreadPoolExecutor(10) as pool:
        found = pool.map(lambda post: ask(client, post.text, image=uri(post.images[0].read_bytes())), samples)
        for answer, decision in zip(found, expected, strict=True):
            assert list(answer["probabilities"].values()) == pytest.approx(decision["probabilities"], abs=1e-4)
            for field in ("stage", "reason", "degraded", "teacher_calls"):
                assert answer[field] == decision[field]


# ---- teacher not available ----


def test_without_a_teacher_connection_the_student_answers_in_time(student: Local, postcards: Corpus) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        teacher = teacher_at(f"http://127.0.0.1:{unused.getsockname()[1]}/v1", deadline_s=5)
        with running(student, teacher, DEFER_ALL, deadline_s=5) as client, ThreadPoolExecutor(8) as pool:
            begin = time.monotonic()
            found = list(pool.map(lambda post: ask(client, post.text), postcards.test[:20]))
            assert time.monotonic() - begin < 20
            assert all(answer["degraded"] and answer["stage"] == "student" for answer in found)
            assert {answer["reason"] for answer in found} == {"the teacher did not answer"}
            assert metric(client, "distill_degraded_total") == 20


def test_a_slow_teacher_does_not_delay_responses(student: Local, postcards: Corpus) -> None:
    """With more requests than teacher threads, some requests time out and some never reach the teacher."""
    with Server(delay_s=3 * DEADLINE, logprobs=with_confidence(0.98)) as server:
        teacher = teacher_at(server.url)
        with running(student, teacher, DEFER_ALL, deadline_s=DEADLINE, teacher_concurrency=4) as client:
            expected = Local(student.backbone, "").classify(postcards.test[:12]).probabilities

            def timed(post: Sample) -> tuple[dict[str, Any], float]:
                begin = time.monotonic()
                return ask(client, post.text, image=uri(post.images[0].read_bytes())), time.monotonic() - begin

            with ThreadPoolExecutor(12) as pool:
                found = list(pool.map(timed, postcards.test[:12]))
            # measured by clients on the same cores; the teacher takes three times the deadline
            assert max(seconds for _, seconds in found) < 1.5 * DEADLINE
            for (answer, _), row in zip(found, expected, strict=True):
                assert answer["degraded"] and answer["stage"] == "student"
                assert list(answer["probabilities"].values()) == pytest.approx(list(row), abs=1e-4)
            reasons = [answer["reason"] for answer, _ in found]
            assert set(reasons) == {"the teacher was late", "the teacher is busy"}
            assert sum(answer["teacher_calls"] for answer, _ in found) == reasons.count("the teacher was late") <= 4
            assert metric(client, "distill_degraded_total") == 12
        assert server.requests <= 4


def test_a_slow_review_leaves_the_teachers_first_answer(student: Local, red: str) -> None:
    cascade_policy = policy(student_threshold=-1.0, teacher_threshold=-1.0)

    def slow_review(request: ChatRequest) -> list[dict[str, Any]]:
        if "A first reader said" in request.text:
            time.sleep(2 * DEADLINE)
        label = "negative" if student_label != "negative" else "positive"
        return [token(label, **(dict.fromkeys(COLOURS, 0.1) | {label: 0.8}))]

    with running(student, rationale=False) as client:
        student_label = ask(client, image=red)["label"]
    with (
        Server(logprobs=slow_review) as server,
        running(student, teacher_at(server.url), cascade_policy, deadline_s=DEADLINE) as client,
    ):
        found = ask(client, image=red)
    assert (found["stage"], found["degraded"], found["teacher_calls"]) == ("teacher_first", True, 2)
    assert found["label"] != student_label and found["probabilities"][found["label"]] == pytest.approx(0.8)


def test_without_a_teacher_deferred_posts_are_degraded(student: Local) -> None:
    with running(student, None, DEFER_ALL) as client:
        found = ask(client)
    assert (found["stage"], found["degraded"], found["reason"]) == ("student", True, "there is no teacher")


def test_the_student_reasons_while_the_teacher_classifies(student: Local, red: str) -> None:
    with (
        Server(logprobs=with_confidence(0.98), delay_s=0.3) as server,
        running(student, teacher_at(server.url, deadline_s=30), DEFER_ALL) as client,
    ):
        found = ask(client, image=red, rationale=True)
    assert found["stage"] == "teacher_first"
    assert found["rationale"] is None or found["rationale"]["Prediction"] == "negative"
    assert found["cost"]["completion_tokens"] > 10  # the teacher's and the student's


# ---- slow or remote student ----


class SlowStudent(Local):
    """A student with a configurable delay."""

    seconds = 0.0

    def classify(self, samples: Sequence[Sample], earlier: Sequence[EarlierAnswers] | None = None) -> ClassScores:
        time.sleep(self.seconds)
        return super().classify(samples, earlier)


def test_a_student_slower_than_the_deadline_gives_status_429(fluent: Backbone) -> None:
    student = SlowStudent(fluent, "slow")
    with running(student, deadline_s=0.5, rationale=False) as client:
        student.seconds = 1.0
        begin = time.monotonic()
        reply = client.post("/v1/sentiment", json={"text": "a"})
        assert time.monotonic() - begin < 0.9
        assert "try again" in message(reply, 429) and reply.headers["retry-after"]
        student.seconds = 0.0
        wait_until(lambda: client.post("/v1/sentiment", json={"text": "a"}).status_code == 200)


def test_a_student_behind_an_endpoint(red: str) -> None:
    with Server(logprobs=with_confidence(0.9)) as server:
        student = teacher_at(server.url, deadline_s=30)
        with running(student, None, rationale=True) as client:
            found = ask(client, image=red, rationale=True)
            assert (found["label"], found["stage"]) == ("negative", "student")
            assert found["rationale"]["Prediction"] == "negative"
            assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["cascade"]
            message(client.post("/tokenize", json={"prompt": "a"}), 404)
            server.rates = {"500": 1.0}
            for _ in range(10):  # including after the endpoint is marked as down
                reply = client.post("/v1/sentiment", json={"text": "a"})
                assert "did not answer" in message(reply, 503) and reply.headers["retry-after"]


def test_the_gateway_is_not_ready_before_the_student_answered(fluent: Backbone) -> None:
    class Broken(SlowStudent):
        def classify(self, samples: Sequence[Sample], earlier: Sequence[EarlierAnswers] | None = None) -> ClassScores:
            if self.seconds:
                raise RuntimeError("out of memory")
            return super().classify(samples, earlier)

    student = Broken(fluent, "broken")
    student.seconds = 1.0
    with running(student, ready=False) as client:
        time.sleep(0.2)
        assert client.get("/health/live").status_code == 200
        assert client.get("/health/ready").status_code == 503
        student.seconds = 0.0
        wait_until(lambda: client.get("/health/ready").status_code == 200)
