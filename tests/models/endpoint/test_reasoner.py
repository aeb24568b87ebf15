"""The endpoint: requests, classification with and without log-probabilities, reviews, and costs."""

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.models.endpoint import Endpoint, EndpointSettings
from distill.models.reasoner import Sampling
from distill.task.prompts import EarlierAnswers, render
from distill.task.rationale import check
from distill.task.sample import Sample
from distill.task.wording import Wording
from tests.models.openai_server import (
    COLOURS,
    LABELS,
    ChatRequest,
    Server,
    answers,
    endpoint,
    posts,
    token,
    write_image,
)

# ---- requests ----


FIELDS = Wording().names


def test_the_server_continues_the_forced_prefix_if_it_can(tmp_path: Path) -> None:
    def logprobs(request: ChatRequest) -> list[dict[str, Any]]:
        return [token(" positive", **{" positive": 0.7, " neutral": 0.2, " negative": 0.1})]

    def refuse(body: dict[str, Any]) -> tuple[int, str] | None:
        return (400, "continue_final_message is not a field") if "continue_final_message" in body else None

    samples = posts(tmp_path, 1)
    with Server(answer=lambda request: " positive", logprobs=logprobs) as server:
        student = Endpoint(EndpointSettings(server.url, "big-vl"), LABELS, forced_prefix=True)
        scores = student.classify(samples)
        answers(student, samples)
        classified, reasoned = (request.body for request in server.received)
    np.testing.assert_allclose(scores.probabilities, [[0.1, 0.2, 0.7]])
    assert classified["messages"][1:] == [{"role": "assistant", "content": '"Prediction":'}]
    assert (classified["continue_final_message"], classified["add_generation_prompt"]) == (True, False)
    assert len(reasoned["messages"]) == 1 and "continue_final_message" not in reasoned
    with Server(refuse=refuse) as server:
        student = Endpoint(EndpointSettings(server.url, "big-vl"), LABELS, forced_prefix=True)
        assert student.classify(samples).probabilities.argmax() == 0
        assert [len(request.body["messages"]) for request in server.received][:2] == [2, 1]
    assert student.given_up[0] == "continue_final_message is not taken; labels are read from whole answers"


def test_the_answer_changes_with_the_image(tmp_path: Path) -> None:
    samples = [Sample(label, "the same words", (write_image(tmp_path / f"{label}.png", label),)) for label in COLOURS]
    with Server() as server:
        found = [check(answer.text, LABELS).prediction for answer in answers(endpoint(server.url), samples)]
    assert found == list(COLOURS)


def test_a_request_has_images_then_text_the_sampling_settings_and_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "secret-1")
    two = (write_image(tmp_path / "a.png", "positive"), write_image(tmp_path / "b.png", "negative"))
    sample = Sample("s", "words", two, aspect="it", label="neutral")
    with Server() as server:
        teacher = endpoint(server.url, api_key_env="TEACHER_KEY")
        answers(teacher, [sample], Sampling(0.6, 77, attempt=2, seed=5), "explain")
    body = server.received[0].body
    parts = body["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "image_url", "text"]
    assert parts[2]["text"] == render("explain", sample, LABELS)
    assert (body["model"], body["temperature"], body["max_tokens"], body["seed"]) == ("big-vl", 0.6, 77, 7)
    schema = body["response_format"]["json_schema"]["schema"]
    assert tuple(schema["required"]) == FIELDS
    assert schema["properties"]["Prediction"]["enum"] == ["negative", "neutral", "positive"]
    assert server.keys == ["Bearer secret-1"]
    assert server.received[0].images[1].convert("RGB").getpixel((4, 4)) == pytest.approx(COLOURS["negative"], abs=4)


def test_a_large_image_is_scaled_down_and_a_post_without_image_is_plain_text(tmp_path: Path) -> None:
    samples = [Sample("a", "big", (write_image(tmp_path / "big.png", "positive", 300),)), Sample("b", "bare")]
    with Server() as server:
        answers(endpoint(server.url, max_image_side=50, concurrency=1), samples)
    assert server.received[0].images[0].size == (50, 50)
    assert server.received[1].body["messages"][0]["content"] == render("predict", samples[1], LABELS)


def test_concurrency_bounds_the_requests_in_flight(tmp_path: Path) -> None:
    with Server(delay_s=0.02) as server:
        answers(endpoint(server.url, concurrency=3), posts(tmp_path, 20))
    assert server.max_in_flight == 3


def test_a_consumer_that_stops_early_loses_only_requests_in_flight(tmp_path: Path) -> None:
    with Server(delay_s=0.01) as server:
        stream = endpoint(server.url, concurrency=4).reason(posts(tmp_path, 100), "predict")
        taken = [next(stream) for _ in range(10)]
        stream.close()  # type: ignore[attr-defined]
        time.sleep(0.2)
        assert len(taken) == 10
        assert server.requests <= 10 + 4


def test_a_missing_image_affects_only_its_sample(tmp_path: Path) -> None:
    samples = [*posts(tmp_path, 2), Sample("gone", "words", (tmp_path / "gone.png",))]
    with Server() as server:
        found = answers(endpoint(server.url), samples)
        scores = endpoint(server.url).classify(samples)
    assert [answer.error is None for answer in found] == [True, True, False]
    assert scores.probabilities[2] == pytest.approx([1 / 3] * 3) and scores.label_mass[2] == 0


# ---- label probabilities ----


def test_classify_reads_log_probabilities(tmp_path: Path) -> None:
    def logprobs(request: ChatRequest) -> list[dict[str, Any]]:
        rest = dict.fromkeys(COLOURS, 0.1) | {request.sentiment: 0.7}
        return [token('"Prediction":'), token(request.sentiment, **rest)]

    samples = posts(tmp_path, 9)
    with Server(logprobs=logprobs) as server:
        scores = endpoint(server.url).classify(samples)
    assert server.requests == 9
    assert [LABELS.names[i] for i in scores.probabilities.argmax(1)] == [sample.label for sample in samples]
    assert scores.probabilities.max(1) == pytest.approx([0.7 / 0.9] * 9) and scores.label_mass == pytest.approx(
        [0.9] * 9
    )
    asked = server.received[0].body
    assert (asked["logprobs"], asked["top_logprobs"], asked["temperature"]) == (True, 20, 0.0)
    assert asked["messages"][0]["content"][1]["text"].startswith(render("classify", samples[0], LABELS)[:20])


# ---- servers with log-probabilities of given tokens ----

VOCABULARY = ['"Prediction":', " negative", " neutral", " positive", "negative", "neutral", "positive", "The"]


def tokenize(text: str) -> list[int]:
    found = []
    while text:
        word = max((word for word in VOCABULARY if text.startswith(word)), key=len)
        found.append(VOCABULARY.index(word))
        text = text[len(word) :]
    return found


def requested_logprobs(request: ChatRequest) -> list[dict[str, Any]]:
    """The tokens named by the request, otherwise the top-k tokens, which miss two labels."""
    words = [" positive", "The"]
    if "logprob_token_ids" in request.body:
        words = [VOCABULARY[token_id] for token_id in request.body["logprob_token_ids"]]
    probabilities = {" positive": 0.9, " neutral": 0.0004, " negative": 0.0001, "The": 0.05}
    return [token('"Prediction":'), token(" positive", **{word: probabilities.get(word, 1e-9) for word in words})]


def test_log_probabilities_of_the_label_tokens_are_requested(tmp_path: Path) -> None:
    with Server(logprobs=requested_logprobs, tokenize=tokenize) as server:
        teacher = endpoint(server.url)
        scores = teacher.classify(posts(tmp_path, 9))
        teacher.classify(posts(tmp_path, 2))
    assert {tuple(request.body["logprob_token_ids"]) for request in server.received} == {(1, 4, 2, 5, 3, 6)}
    assert len(server.tokenized) == 1 + 2 * 3  # once for all samples
    expected = np.array([0.0001, 0.0004, 0.9])
    assert scores.probabilities == pytest.approx(np.tile(expected / expected.sum(), (9, 1)), abs=1e-6)
    assert scores.label_mass == pytest.approx([expected.sum()] * 9, abs=1e-6)


@pytest.mark.parametrize("support", ["none", "refused", "ignored"])
def test_without_support_for_token_ids_the_top_k_tokens_are_used(tmp_path: Path, support: str) -> None:
    def refuse(body: dict[str, Any]) -> tuple[int, str] | None:
        refused = support == "refused" and "logprob_token_ids" in body
        return (400, "extra inputs are not permitted: logprob_token_ids; logprobs are") if refused else None

    def top(request: ChatRequest) -> list[dict[str, Any]]:
        return requested_logprobs(replace(request, body={}))

    with Server(logprobs=top, tokenize=None if support == "none" else tokenize, refuse=refuse) as server:
        scores = endpoint(server.url).classify(posts(tmp_path, 9))
    bodies = [request.body for request in server.received]
    assert {body["top_logprobs"] for body in bodies} == {20}
    assert len(bodies) <= 9 + 4
    assert sum("logprob_token_ids" in body for body in bodies) <= (9 if support == "ignored" else 4)
    assert len(server.tokenized) == (1 if support == "none" else 7)
    # Both other labels get the probability of the least likely token as their bound.
    assert scores.label_mass == pytest.approx([0.9 + 0.05 + 0.05] * 9)
    assert {cost.calls for cost in scores.costs} == {1}


# ---- reviews and costs ----


def test_only_a_review_contains_the_earlier_answers(tmp_path: Path) -> None:
    samples = posts(tmp_path, 4)
    earlier = [EarlierAnswers("neutral", 0.1 * i, "positive", 0.5) for i in range(4)]
    spread = {"positive": 0.5, "negative": 0.3, "neutral": 0.2}
    with Server(logprobs=lambda request: [token("positive", **spread)]) as server:
        teacher = endpoint(server.url, concurrency=1)
        scores = teacher.classify(samples, earlier)
        teacher.classify(samples)
    texts = [request.text for request in server.received]
    reviews = [render("review", sample, LABELS, item) for sample, item in zip(samples, earlier, strict=True)]
    assert texts[:4] == reviews
    assert texts[4:] == [render("classify", sample, LABELS) for sample in samples]
    assert scores.probabilities == pytest.approx(np.tile([0.3, 0.2, 0.5], (4, 1)))


def test_costs_are_the_tokens_of_the_server_and_the_time_with_retries(tmp_path: Path) -> None:
    spread = {"positive": 0.5, "negative": 0.3, "neutral": 0.2}
    with Server(headers={"Retry-After": "0.2"}, logprobs=lambda request: [token("positive", **spread)]) as server:
        server.refuse = lambda body: (429, "slow down") if server.requests == 1 else None
        teacher = endpoint(server.url)
        scores = teacher.classify(posts(tmp_path, 1))
        (answer,) = answers(teacher, posts(tmp_path, 1))
    (cost,) = scores.costs
    assert (cost.calls, cost.prompt_tokens, cost.completion_tokens) == (1, 100, 10)
    assert cost.seconds >= 0.2 > 0 < answer.seconds
    assert (answer.cost.calls, answer.cost.prompt_tokens) == (1, 100)


@pytest.mark.parametrize("refuses", [True, False], ids=["refused", "ignored"])
def test_without_log_probabilities_answers_are_sampled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, refuses: bool
) -> None:
    samples = posts(tmp_path, 12)
    refusal = (400, "logprobs are not available") if refuses else None
    with Server(refuse=lambda body: refusal if "logprobs" in body else None) as server:
        teacher = endpoint(server.url, agreement_samples=5)
        with caplog.at_level(logging.WARNING):
            scores = teacher.classify(samples)
            teacher.classify(samples[:2])
    sampled = [request.body for request in server.received if request.body["temperature"] == 1.0]
    assert len(sampled) == 14 * 4  # the first of the five answers is greedy
    assert len({body["seed"] for body in sampled}) == 4
    assert sum("logprobs" in request.body for request in server.received) <= 2 * 4
    assert len([record for record in caplog.records if "agreement" in record.message]) == 1
    assert np.isnan(scores.label_mass).all()
    assert {(cost.calls, cost.prompt_tokens, cost.completion_tokens) for cost in scores.costs} == {(5, 500, 50)}
    # Five answers that agree: (5 + 1/3) / 6.
    assert scores.probabilities.max(1) == pytest.approx([(5 + 1 / 3) / 6] * 12)
    assert [LABELS.names[i] for i in scores.probabilities.argmax(1)] == [sample.label for sample in samples]


def test_one_agreement_sample_is_one_request(tmp_path: Path) -> None:
    with Server() as server:
        scores = endpoint(server.url, agreement_samples=1).classify(posts(tmp_path, 5))
        assert server.requests == 5
    assert {cost.calls for cost in scores.costs} == {1}
    assert scores.probabilities.max(1) == pytest.approx([(1 + 1 / 3) / 2] * 5)


def test_refused_samples_are_excluded_from_the_agreement(tmp_path: Path) -> None:
    def refuse(body: dict[str, Any]) -> tuple[int, str] | None:
        return (400, "too hot") if body["temperature"] == 1.0 else None

    with Server(refuse=refuse) as server:
        scores = endpoint(server.url, agreement_samples=3).classify(posts(tmp_path, 1))
    assert scores.probabilities.max() == pytest.approx((1 + 1 / 3) / 2) and scores.costs[0].calls == 1


def test_without_any_answer_a_sample_is_undecided(tmp_path: Path) -> None:
    with Server(refuse=lambda body: (400, "content policy")) as server:
        teacher = endpoint(server.url)
        _, score = next(teacher.scores(posts(tmp_path, 1)))
        refused = teacher.classify(posts(tmp_path, 1))
        teacher.close()
    assert score.answer.error is not None and "content policy" in score.answer.error
    assert refused.costs[0].calls == refused.costs[0].prompt_tokens == 0 and not refused.answered.any()
    with Server(answer=lambda request: "", logprobs=lambda request: []) as server:
        scores = endpoint(server.url).classify(posts(tmp_path, 1))
        assert server.requests == 3, "an empty answer is retried"
    assert scores.label_mass[0] == score.label_mass == 0
    assert scores.probabilities[0] == pytest.approx([1 / 3] * 3) and score.probabilities == pytest.approx([1 / 3] * 3)


def test_cost_of_tokens() -> None:
    settings = {"prompt_price": 2.0, "completion_price": 8.0}
    assert endpoint("http://localhost/v1", **settings).cost(1_000_000, 500_000) == pytest.approx(6.0)
    assert endpoint("http://localhost/v1").cost(1, 1) is None
