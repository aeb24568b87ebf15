"""The remote teacher: what it sends, what it reads, and what it makes of a server's failures."""

import logging
import math
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.errors import RunError, SettingsError
from distill.models.endpoint import Endpoint, EndpointSettings, agreement, label_probabilities
from distill.models.reasoner import Answer, Sampling
from distill.task.labels import LabelSpace, Scale
from distill.task.prompts import Earlier, render
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
    # "pos" and " positive" begin positive, "Neg" negative, "neu" neutral; "ne" begins two labels, which share it.
    assert mass == pytest.approx(0.6 + 0.1 + 0.08 + 0.05 + 0.04)
    assert probabilities == pytest.approx(np.array([0.105, 0.065, 0.7]) / 0.87)


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


# ---- labels that begin alike ----

SCALE = LabelSpace.from_scale(Scale())


def test_a_token_that_begins_several_labels_is_followed_where_it_was_generated() -> None:
    first = token(" -", **{" -": 0.5, "2": 0.2, "0": 0.1, "+": 0.2})
    second = token("2", **{"2": 0.6, "1": 0.3, "3": 0.1})
    probabilities, mass = label_probabilities(tops(token('"Prediction":'), first, second, token("<|im_end|>")), SCALE)
    left = 1e-12  # nothing is left over for 1 and 3, and yet they are possible
    assert mass == pytest.approx(0.8)
    assert probabilities * 0.8 == pytest.approx([0.05, 0.3, 0.15, 0.1, left, 0.2, left], abs=1e-9)


def test_a_token_that_begins_several_labels_is_shared_where_it_was_not_generated() -> None:
    probabilities, mass = label_probabilities(tops(token("2", **{"2": 0.6, "-": 0.3, "1": 0.05})), SCALE)
    bound = 0.05  # the least likely of the list, and as much is left
    expected = np.array([0.1, 0.1, 0.1, bound, 0.05, 0.6, bound])
    assert mass == pytest.approx(1) and probabilities == pytest.approx(expected / expected.sum())


def test_a_space_before_a_number_may_precede_any_and_is_followed() -> None:
    """As tokenizers write " 3" in two tokens and " -3" in two others."""
    first = token("\u0120", **{"\u0120": 0.6, "\u0120-": 0.3, "The": 0.1})
    second = token("3", **{"3": 0.5, "2": 0.25, "1": 0.15, "0": 0.1})
    probabilities, mass = label_probabilities(tops(first, second), SCALE)
    expected = np.array([0.1, 0.1, 0.1, 0.06, 0.09, 0.15, 0.3])
    assert mass == pytest.approx(0.9) and probabilities == pytest.approx(expected / 0.9, abs=1e-9)
    other = token("\u0120-", **{"\u0120-": 0.65, "\u0120": 0.35})
    probabilities, _ = label_probabilities(tops(other, token("1", **{"1": 0.8, "2": 0.1, "3": 0.1})), SCALE)
    assert probabilities == pytest.approx(np.array([0.115, 0.115, 0.57, 0.05, 0.05, 0.05, 0.05]), abs=1e-9)


@pytest.mark.parametrize("end", [[], [token("<|im_end|>")], [token("", **{"": 1.0})], [token('"')]])
def test_a_label_that_begins_another_one_ends_where_the_answer_does(end: list[dict[str, Any]]) -> None:
    halves = LabelSpace(("0", "1", "1.5"), (0, 1, 1))
    spread = token("1", **{"1": 0.8, "0": 0.2})
    assert label_probabilities(tops(spread, *end), halves)[0] == pytest.approx([0.2, 0.8, 0], abs=1e-9)
    going_on = [token(".", **{".": 0.75, "\n": 0.25}), token("5")]
    assert label_probabilities(tops(spread, *going_on), halves)[0] == pytest.approx([0.2, 0.2, 0.6], abs=1e-9)


def test_the_end_of_an_answer_within_what_labels_share_is_all_of_theirs() -> None:
    probabilities, mass = label_probabilities(tops(token("-", **{"-": 0.9, "0": 0.1})), SCALE)
    assert probabilities == pytest.approx([0.3, 0.3, 0.3, 0.1, 0, 0, 0], abs=1e-9) and mass == pytest.approx(1)


def test_quotes_that_were_not_taken_count_for_no_label() -> None:
    spread = {" positive": 0.6, ' "': 0.3, " negative": 0.06}
    probabilities, mass = label_probabilities(tops(token(" positive", **spread)), LABELS)
    assert mass == pytest.approx(0.7) and probabilities == pytest.approx(np.array([0.06, 0.04, 0.6]) / 0.7)


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
    earlier = [Earlier("neutral", 0.1 * i, "positive", 0.5) for i in range(4)]
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
