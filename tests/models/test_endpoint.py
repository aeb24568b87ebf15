"""The remote teacher: what it sends, what it reads, and what it makes of a server's failures."""

import logging
import math
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.errors import RunError, SettingsError
from distill.models.endpoint import Endpoint, EndpointSettings, agreement, label_probabilities
from distill.models.reasoner import Answer, Sampling
from distill.task.labels import LabelSpace
from distill.task.prompts import render
from distill.task.rationale import FIELDS, check
from distill.task.sample import Sample
from tests.models.openai_server import COLOURS, Question, Server, picture, rationale, token

LABELS = LabelSpace()


def endpoint(url: str, **settings: Any) -> Endpoint:
    return Endpoint(EndpointSettings(url, "big-vl", **({"backoff_s": 0.01, "concurrency": 4} | settings)), LABELS)


def posts(folder: Path, count: int) -> list[Sample]:
    names = list(COLOURS)
    pictures = [picture(folder / f"{name}.png", name) for name in names]
    return [Sample(f"s{i}", f"post {i}", (pictures[i % 3],), label=names[i % 3]) for i in range(count)]


def answers(
    teacher: Endpoint, samples: list[Sample], sampling: Sampling = Sampling(), template: Any = "predict"
) -> list[Answer]:
    found = dict(teacher.reason(samples, template, sampling))
    assert sorted(found) == list(range(len(samples)))
    return [found[i] for i in range(len(samples))]


def tops(*tokens: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    return [(t["token"], {o["token"]: o["logprob"] for o in t["top_logprobs"]}) for t in tokens]


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


# ---- failures ----


def test_busy_and_broken_servers_are_asked_again(tmp_path: Path) -> None:
    rates = {"429": 0.2, "500": 0.1, "broken": 0.1, "empty": 0.1}
    with Server(rates=rates, seed=3) as server:
        found = answers(endpoint(server.url, max_attempts=30, backoff_s=0.002), posts(tmp_path, 60))
    assert all(server.sent[kind] > 0 for kind in rates)
    assert [answer.error for answer in found] == [None] * 60
    assert server.sent["right"] == 60
    assert (found[0].prompt_tokens, found[0].completion_tokens) == (100, 10)


def test_retry_after_is_honoured(tmp_path: Path) -> None:
    with Server(headers={"Retry-After": "0.3"}) as server:
        server.refuse = lambda body: (429, "slow down") if server.requests == 1 else None
        begin = time.monotonic()
        found = answers(endpoint(server.url), posts(tmp_path, 1))
    assert found[0].error is None
    assert time.monotonic() - begin >= 0.3


def test_a_wait_beyond_the_deadline_is_not_begun(tmp_path: Path) -> None:
    with Server(rates={"429": 1.0}, headers={"Retry-After": "3600"}) as server:
        begin = time.monotonic()
        found = answers(endpoint(server.url, deadline_s=5.0), posts(tmp_path, 1))
    assert found[0].error is not None and "429" in found[0].error
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize("slowness", [{"delay_s": 1.0}, {"drip_s": 0.05}], ids=["silent", "dripping"])
def test_deadlines(tmp_path: Path, slowness: dict[str, float]) -> None:
    with Server(**slowness) as server:  # type: ignore[arg-type]
        begin = time.monotonic()
        found = answers(endpoint(server.url, timeout_s=0.15, deadline_s=0.4), posts(tmp_path, 1))
        assert time.monotonic() - begin < 5
    assert found[0].error is not None and "Timeout" in found[0].error
    assert (found[0].text, found[0].finished) == ("", False)
    assert server.requests >= 2


def test_a_cut_answer_is_unfinished(tmp_path: Path) -> None:
    with Server(rates={"truncated": 1.0}) as server:
        found = answers(endpoint(server.url), posts(tmp_path, 1))
    assert (found[0].finished, found[0].error) == (False, None)
    assert server.requests == 1


def test_a_refused_question_costs_only_its_sample(tmp_path: Path) -> None:
    def refuse(body: dict[str, Any]) -> tuple[int, str] | None:
        return (400, "content policy") if "post 2" in str(body["messages"]) else None

    with Server(refuse=refuse) as server:
        found = answers(endpoint(server.url), posts(tmp_path, 5))
        assert server.requests == 5
    assert [answer.error is None for answer in found] == [True, True, False, True, True]
    assert "content policy" in str(found[2].error)


def test_a_missing_picture_costs_only_its_sample(tmp_path: Path) -> None:
    samples = [*posts(tmp_path, 2), Sample("gone", "words", (tmp_path / "gone.png",))]
    with Server() as server:
        found = answers(endpoint(server.url), samples)
        scores = endpoint(server.url).classify(samples)
    assert [answer.error is None for answer in found] == [True, True, False]
    assert scores.probabilities[2] == pytest.approx([1 / 3] * 3) and scores.label_mass[2] == 0


def test_an_expired_key_ends_the_run_and_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "expired")
    with Server(refuse=lambda body: (401, "expired")) as server:
        with pytest.raises(RunError, match="TEACHER_KEY") as caught:
            answers(endpoint(server.url, api_key_env="TEACHER_KEY"), posts(tmp_path, 20))
        assert server.requests <= 8
    assert "expired" not in str(caught.value)
    with Server(refuse=lambda body: (403, "no")) as server, pytest.raises(RunError, match="api_key_env"):
        answers(endpoint(server.url), posts(tmp_path, 1))


def test_a_missing_variable_is_refused_before_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with Server() as server:
        with pytest.raises(SettingsError, match="TEACHER_KEY"):
            endpoint(server.url, api_key_env="TEACHER_KEY")
        assert server.requests == 0


def test_an_unknown_model_ends_the_run(tmp_path: Path) -> None:
    with Server() as server:
        wrong_path = server.url.removesuffix("/v1")
        with pytest.raises(RunError, match="big-vl") as caught:
            answers(endpoint(wrong_path), posts(tmp_path, 1))
    assert wrong_path in str(caught.value)


def test_a_dead_endpoint_ends_the_run(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        begin = time.monotonic()
        with pytest.raises(RunError, match="base_url") as caught:
            answers(endpoint(url, max_attempts=3), posts(tmp_path, 50))
    assert url in str(caught.value)
    assert time.monotonic() - begin < 5


def test_an_endpoint_that_dies_midway_ends_the_run(tmp_path: Path) -> None:
    with Server() as server:
        server.refuse = lambda body: (503, "gone") if server.requests > 20 else None
        teacher = endpoint(server.url, max_attempts=2, backoff_s=0.001)
        taken = []
        with pytest.raises(RunError, match="in a row") as caught:
            taken.extend(teacher.reason(posts(tmp_path, 200), "predict"))
        assert server.requests < 60
    assert server.url in str(caught.value)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"base_url": "localhost:8000"}, "base_url"),
        ({"base_url": "http://host:port/v1"}, "base_url"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout_s": math.nan}, "timeout_s"),
        ({"top_logprobs": 21}, "top_logprobs"),
    ],
)
def test_impossible_settings(change: dict[str, Any], names: str) -> None:
    with pytest.raises(SettingsError, match=names):
        EndpointSettings(**({"base_url": "http://localhost/v1", "model": "m"} | change))


# ---- servers that know less ----


@pytest.mark.parametrize("words", ["Unknown field: response_format", "guided decoding is off", "no json_schema here"])
def test_a_server_without_json_schema_is_asked_in_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, words: str
) -> None:
    with Server(refuse=lambda body: (400, words) if "response_format" in body else None) as server:
        teacher = endpoint(server.url)
        with caplog.at_level(logging.WARNING):
            found = answers(teacher, posts(tmp_path, 30)) + answers(teacher, posts(tmp_path, 3))
    assert [answer.error for answer in found] == [None] * 33
    assert len([record for record in caplog.records if "JSON schema" in record.message]) == 1
    assert sum("response_format" in question.body for question in server.questions) <= 4


def test_schema_can_be_left_out_from_the_start(tmp_path: Path) -> None:
    with Server() as server:
        answers(endpoint(server.url, json_schema=False), posts(tmp_path, 1))
    assert "response_format" not in server.questions[0].body


def test_a_server_without_seeds(tmp_path: Path) -> None:
    with Server(refuse=lambda body: (422, "extra field seed") if "seed" in body else None) as server:
        found = answers(endpoint(server.url), posts(tmp_path, 6))
    assert [answer.error for answer in found] == [None] * 6


# ---- label probabilities ----


def test_label_probabilities_by_hand() -> None:
    tokens = tops(
        token('"Prediction'),
        token('":'),
        token(" "),
        token("pos", pos=0.6, **{" positive": 0.1, "Neg": 0.08, "ne": 0.05, "neu": 0.04, "The": 0.03}),
        token("itive"),
    )
    probabilities, mass = label_probabilities(tokens, LABELS)
    # "pos" and " positive" begin positive, "Neg" negative, "neu" neutral; "ne" begins two labels and counts for none.
    assert mass == pytest.approx(0.6 + 0.1 + 0.08 + 0.04)
    assert probabilities == pytest.approx(np.array([0.08, 0.04, 0.7]) / 0.82)


def test_a_label_outside_the_top_list_is_bounded_and_never_impossible() -> None:
    # The least likely of the list has 0.02, and 1 - 0.97 is left: the smaller of the two bounds neutral.
    probabilities, mass = label_probabilities(tops(token("positive", positive=0.9, negative=0.05, So=0.02)), LABELS)
    assert probabilities == pytest.approx(np.array([0.05, 0.02, 0.9]) / 0.97) and mass == pytest.approx(0.97)
    # Here only 0.001 is left.
    probabilities, _ = label_probabilities(tops(token("positive", positive=0.9, negative=0.099)), LABELS)
    assert probabilities[1] == pytest.approx(0.001 / 1.0)
    # Nothing is left, and yet no label is impossible.
    probabilities, mass = label_probabilities(tops(token("positive", positive=1.0)), LABELS)
    assert (probabilities > 0).all() and probabilities.sum() == pytest.approx(1) and mass == pytest.approx(1)


def test_an_answer_off_its_format_has_a_low_mass() -> None:
    tokens = tops(token("The", The=0.9, It=0.07, positive=0.01), token(" post"))
    probabilities, mass = label_probabilities(tokens, LABELS)
    assert mass == pytest.approx(0.03) and probabilities == pytest.approx([1 / 3] * 3)
    nothing, mass = label_probabilities(tops(token('"Prediction":')), LABELS)
    assert mass == 0 and nothing == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    "before",
    [
        (),
        ('"', "Prediction", '":', ' "'),
        ('{"Prediction": "',),
        ('"Text', '_analysis": "It says \\"Prediction\\": negative"\n', '"Prediction', '": "'),
        ("\u2581", "**Prediction**:", " "),
    ],
)
def test_where_the_label_begins(before: tuple[str, ...]) -> None:
    spread = {"positive": 0.7, "negative": 0.2, "neutral": 0.1}
    tokens = tops(*map(token, before), token("positive", **spread), token('"}'))
    probabilities, mass = label_probabilities(tokens, LABELS)
    assert probabilities == pytest.approx([0.2, 0.1, 0.7]) and mass == pytest.approx(1)


def test_a_bare_label_is_not_overruled_by_what_is_quoted_after_it() -> None:
    spread = {"positive": 0.7, "negative": 0.2, "neutral": 0.1}
    tokens = tops(token("positive", **spread), token("\n"), token('"Prediction": '), token("negative"))
    assert label_probabilities(tokens, LABELS)[0] == pytest.approx([0.2, 0.1, 0.7])
    assert agreement(['positive\n"Prediction": negative'], LABELS).argmax() == 2


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


def test_a_server_with_fewer_log_probabilities(tmp_path: Path) -> None:
    def refuse(body: dict[str, Any]) -> tuple[int, str] | None:
        return (400, "top_logprobs must be at most 5") if body.get("top_logprobs", 0) > 5 else None

    with Server(refuse=refuse, logprobs=lambda question: [token("neutral", neutral=0.8)]) as server:
        scores = endpoint(server.url).classify(posts(tmp_path, 3))
    assert {question.body["top_logprobs"] for question in server.questions} == {20, 5}
    assert not np.isnan(scores.label_mass).any()


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
    assert len(drawn) == 14 * 5
    assert len({body["seed"] for body in drawn}) == 5
    assert sum("logprobs" in question.body for question in server.questions) <= 2 * 4
    assert len([record for record in caplog.records if "agreement" in record.message]) == 1
    assert np.isnan(scores.label_mass).all()
    # Five answers that agree: (5 + 1/3) / 6.
    assert scores.probabilities.max(1) == pytest.approx([(5 + 1 / 3) / 6] * 12)
    assert [LABELS.names[i] for i in scores.probabilities.argmax(1)] == [sample.label for sample in samples]


def test_without_any_answer_a_sample_is_undecided(tmp_path: Path) -> None:
    def refuse(body: dict[str, Any]) -> tuple[int, str] | None:
        return (400, "too hot") if body["temperature"] == 1.0 else None

    with Server(refuse=refuse) as server:
        teacher = endpoint(server.url, agreement_samples=2)
        _, scored = next(teacher.scores(posts(tmp_path, 1)))
        teacher.close()
    assert scored.answer.error is not None and "too hot" in scored.answer.error
    with Server(answer=lambda question: "", logprobs=lambda question: []) as server:
        scores = endpoint(server.url).classify(posts(tmp_path, 1))
        assert server.requests == 1
    assert scores.label_mass[0] == scored.label_mass == 0
    assert scores.probabilities[0] == pytest.approx([1 / 3] * 3) and scored.probabilities == pytest.approx([1 / 3] * 3)


def test_agreement_by_hand() -> None:
    found = agreement(['"Prediction": positive', "Positive.", '{"Prediction": "negative"}', "who knows"], LABELS)
    assert found == pytest.approx([(1 + 2 / 3) / 5, (2 / 3) / 5, (2 + 2 / 3) / 5])
    assert found.sum() == pytest.approx(1)


def test_what_tokens_cost() -> None:
    settings = {"prompt_price": 2.0, "completion_price": 8.0}
    assert endpoint("http://localhost/v1", **settings).cost(1_000_000, 500_000) == pytest.approx(6.0)
    assert endpoint("http://localhost/v1").cost(1, 1) is None


def test_hostile_text_in_both_directions(tmp_path: Path) -> None:
    with Server(answer=lambda question: rationale("neutral", "half a pair \ud83d")) as server:
        found = answers(endpoint(server.url), [Sample("s", "half a pair \ud83d")])
    assert found[0].error is None
    assert found[0].text.encode()
