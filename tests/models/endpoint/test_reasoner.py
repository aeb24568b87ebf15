"""The remote teacher: what it sends, how it classifies with what the server tells, and what that costs."""

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.models.reasoner import Sampling
from distill.task.prompts import EarlierAnswers, render
from distill.task.rationale import FIELDS, check
from distill.task.sample import Sample
from tests.models.openai_server import COLOURS, LABELS, Question, Server, answers, endpoint, picture, posts, token

# ---- what is sent ----


def test_the_answer_changes_with_the_picture(tmp_path: Path) -> None:
    shown = [Sample(label, "the very same words", (picture(tmp_path / f"{label}.png", label),)) for label in COLOURS]
    with Server() as server:
        found = [check(answer.text, LABELS).prediction for answer in answers(endpoint(server.url), shown)]
    assert found == list(COLOURS)


def test_a_request_is_pictures_then_text_with_the_sampling_and_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "secret-1")
    two = (picture(tmp_path / "a.png", "positive"), picture(tmp_path / "b.png", "negative"))
    sample = Sample("s", "words", two, aspect="it", label="neutral")
    with Server() as server:
        teacher = endpoint(server.url, api_key_env="TEACHER_KEY")
        answers(teacher, [sample], Sampling(0.6, 77, attempt=2, seed=5), "explain")
    body = server.questions[0].body
    parts = body["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "image_url", "text"]
    assert parts[2]["text"] == render("explain", sample, LABELS)
    assert (body["model"], body["temperature"], body["max_tokens"], body["seed"]) == ("big-vl", 0.6, 77, 7)
    schema = body["response_format"]["json_schema"]["schema"]
    assert tuple(schema["required"]) == FIELDS
    assert schema["properties"]["Prediction"]["enum"] == ["negative", "neutral", "positive"]
    assert server.keys == ["Bearer secret-1"]
    assert server.questions[0].images[1].convert("RGB").getpixel((4, 4)) == pytest.approx(COLOURS["negative"], abs=4)


def test_a_large_picture_is_scaled_down_and_a_post_without_one_is_plain_text(tmp_path: Path) -> None:
    samples = [Sample("a", "big", (picture(tmp_path / "big.png", "positive", 300),)), Sample("b", "bare")]
    with Server() as server:
        answers(endpoint(server.url, max_image_side=50, concurrency=1), samples)
    assert server.questions[0].images[0].size == (50, 50)
    assert server.questions[1].body["messages"][0]["content"] == render("predict", samples[1], LABELS)


def test_no_more_questions_at_once_than_allowed(tmp_path: Path) -> None:
    with Server(delay_s=0.02) as server:
        answers(endpoint(server.url, concurrency=3), posts(tmp_path, 20))
    assert server.most_at_once == 3


def test_a_consumer_that_stops_early_loses_only_what_is_in_flight(tmp_path: Path) -> None:
    with Server(delay_s=0.01) as server:
        stream = endpoint(server.url, concurrency=4).reason(posts(tmp_path, 100), "predict")
        taken = [next(stream) for _ in range(10)]
        stream.close()  # type: ignore[attr-defined]
        time.sleep(0.2)
        assert len(taken) == 10
        assert server.requests <= 10 + 4


def test_a_missing_picture_costs_only_its_sample(tmp_path: Path) -> None:
    samples = [*posts(tmp_path, 2), Sample("gone", "words", (tmp_path / "gone.png",))]
    with Server() as server:
        found = answers(endpoint(server.url), samples)
        scores = endpoint(server.url).classify(samples)
    assert [answer.error is None for answer in found] == [True, True, False]
    assert scores.probabilities[2] == pytest.approx([1 / 3] * 3) and scores.label_mass[2] == 0


# ---- label probabilities ----


def test_classify_reads_log_probabilities(tmp_path: Path) -> None:
    def logprobs(question: Question) -> list[dict[str, Any]]:
        rest = dict.fromkeys(COLOURS, 0.1) | {question.sentiment: 0.7}
        return [token('"Prediction":'), token(question.sentiment, **rest)]

    samples = posts(tmp_path, 9)
    with Server(logprobs=logprobs) as server:
        scores = endpoint(server.url).classify(samples)
    assert server.requests == 9
    assert [LABELS.names[i] for i in scores.probabilities.argmax(1)] == [sample.label for sample in samples]
    assert scores.probabilities.max(1) == pytest.approx([0.7 / 0.9] * 9) and scores.label_mass == pytest.approx(
        [0.9] * 9
    )
    asked = server.questions[0].body
    assert (asked["logprobs"], asked["top_logprobs"], asked["temperature"]) == (True, 20, 0.0)
    assert asked["messages"][0]["content"][1]["text"].startswith(render("classify", samples[0], LABELS)[:20])


# ---- servers that tell the log-probabilities of given tokens ----

VOCABULARY = ['"Prediction":', " negative", " neutral", " positive", "negative", "neutral", "positive", "The"]


def tokenize(text: str) -> list[int]:
    found = []
    while text:
        word = max((word for word in VOCABULARY if text.startswith(word)), key=len)
        found.append(VOCABULARY.index(word))
        text = text[len(word) :]
    return found


def asked_about(question: Question) -> list[dict[str, Any]]:
    """The likeliest tokens, among which two labels are not; or those that the request names."""
    words = [" positive", "The"]
    if "logprob_token_ids" in question.body:
        words = [VOCABULARY[token_id] for token_id in question.body["logprob_token_ids"]]
    held = {" positive": 0.9, " neutral": 0.0004, " negative": 0.0001, "The": 0.05}
    return [token('"Prediction":'), token(" positive", **{word: held.get(word, 1e-9) for word in words})]


def test_a_server_is_asked_about_the_labels_own_tokens(tmp_path: Path) -> None:
    with Server(logprobs=asked_about, tokenize=tokenize) as server:
        teacher = endpoint(server.url)
        scores = teacher.classify(posts(tmp_path, 9))
        teacher.classify(posts(tmp_path, 2))
    assert {tuple(question.body["logprob_token_ids"]) for question in server.questions} == {(1, 4, 2, 5, 3, 6)}
    assert len(server.tokenized) == 1 + 2 * 3  # once for all samples
    expected = np.array([0.0001, 0.0004, 0.9])
    assert scores.probabilities == pytest.approx(np.tile(expected / expected.sum(), (9, 1)), abs=1e-6)
    assert scores.label_mass == pytest.approx([expected.sum()] * 9, abs=1e-6)


@pytest.mark.parametrize("known", ["nothing", "refused", "left out"])
def test_a_server_that_cannot_tell_them_gives_the_likeliest(tmp_path: Path, known: str) -> None:
    def refuse(body: dict[str, Any]) -> tuple[int, str] | None:
        refused = known == "refused" and "logprob_token_ids" in body
        return (400, "extra inputs are not permitted: logprob_token_ids; logprobs are") if refused else None

    def top(question: Question) -> list[dict[str, Any]]:
        return asked_about(replace(question, body={}))

    with Server(logprobs=top, tokenize=None if known == "nothing" else tokenize, refuse=refuse) as server:
        scores = endpoint(server.url).classify(posts(tmp_path, 9))
    bodies = [question.body for question in server.questions]
    assert {body["top_logprobs"] for body in bodies} == {20}
    assert len(bodies) <= 9 + 4 and sum("logprob_token_ids" in body for body in bodies) <= {"left out": 9}.get(known, 4)
    assert len(server.tokenized) == (1 if known == "nothing" else 7)
    assert scores.label_mass == pytest.approx([0.9 + 0.05 + 0.05] * 9)  # both labels have the least likely one's bound
    assert {cost.calls for cost in scores.costs} == {1}


# ---- reviews and costs ----


def test_a_review_asks_with_the_earlier_answers_and_no_other_question_does(tmp_path: Path) -> None:
    samples = posts(tmp_path, 4)
    earlier = [EarlierAnswers("neutral", 0.1 * i, "positive", 0.5) for i in range(4)]
    spread = {"positive": 0.5, "negative": 0.3, "neutral": 0.2}
    with Server(logprobs=lambda question: [token("positive", **spread)]) as server:
        teacher = endpoint(server.url, concurrency=1)
        scores = teacher.classify(samples, earlier)
        teacher.classify(samples)
    texts = [question.text for question in server.questions]
    assert texts[:4] == [render("review", sample, LABELS, said) for sample, said in zip(samples, earlier, strict=True)]
    assert texts[4:] == [render("classify", sample, LABELS) for sample in samples]
    assert scores.probabilities == pytest.approx(np.tile([0.3, 0.2, 0.5], (4, 1)))


def test_costs_are_what_the_server_counted_and_the_wait_with_its_retries(tmp_path: Path) -> None:
    spread = {"positive": 0.5, "negative": 0.3, "neutral": 0.2}
    with Server(headers={"Retry-After": "0.2"}, logprobs=lambda question: [token("positive", **spread)]) as server:
        server.refuse = lambda body: (429, "slow down") if server.requests == 1 else None
        teacher = endpoint(server.url)
        scores = teacher.classify(posts(tmp_path, 1))
        (answer,) = answers(teacher, posts(tmp_path, 1))
    (cost,) = scores.costs
    assert (cost.calls, cost.prompt_tokens, cost.completion_tokens) == (1, 100, 10)
    assert cost.seconds >= 0.2 > 0 < answer.seconds
    assert (answer.cost.calls, answer.cost.prompt_tokens) == (1, 100)


@pytest.mark.parametrize("refuses", [True, False], ids=["refused", "silently left out"])
def test_without_log_probabilities_answers_are_drawn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, refuses: bool
) -> None:
    samples = posts(tmp_path, 12)
    refusal = (400, "logprobs are not available") if refuses else None
    with Server(refuse=lambda body: refusal if "logprobs" in body else None) as server:
        teacher = endpoint(server.url, agreement_samples=5)
        with caplog.at_level(logging.WARNING):
            scores = teacher.classify(samples)
            teacher.classify(samples[:2])
    drawn = [question.body for question in server.questions if question.body["temperature"] == 1.0]
    assert len(drawn) == 14 * 4  # the greedy answer is the first of the five
    assert len({body["seed"] for body in drawn}) == 4
    assert sum("logprobs" in question.body for question in server.questions) <= 2 * 4
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


def test_draws_that_are_refused_are_left_out_of_the_agreement(tmp_path: Path) -> None:
    def refuse(body: dict[str, Any]) -> tuple[int, str] | None:
        return (400, "too hot") if body["temperature"] == 1.0 else None

    with Server(refuse=refuse) as server:
        scores = endpoint(server.url, agreement_samples=3).classify(posts(tmp_path, 1))
    assert scores.probabilities.max() == pytest.approx((1 + 1 / 3) / 2) and scores.costs[0].calls == 1


def test_without_any_answer_a_sample_is_undecided(tmp_path: Path) -> None:
    with Server(refuse=lambda body: (400, "content policy")) as server:
        teacher = endpoint(server.url)
        _, scored = next(teacher.scores(posts(tmp_path, 1)))
        refused = teacher.classify(posts(tmp_path, 1))
        teacher.close()
    assert scored.answer.error is not None and "content policy" in scored.answer.error
    assert refused.costs[0].calls == refused.costs[0].prompt_tokens == 0 and not refused.answered.any()
    with Server(answer=lambda question: "", logprobs=lambda question: []) as server:
        scores = endpoint(server.url).classify(posts(tmp_path, 1))
        assert server.requests == 1
    assert scores.label_mass[0] == scored.label_mass == 0
    assert scores.probabilities[0] == pytest.approx([1 / 3] * 3) and scored.probabilities == pytest.approx([1 / 3] * 3)


def test_what_tokens_cost() -> None:
    settings = {"prompt_price": 2.0, "completion_price": 8.0}
    assert endpoint("http://localhost/v1", **settings).cost(1_000_000, 500_000) == pytest.approx(6.0)
    assert endpoint("http://localhost/v1").cost(1, 1) is None
