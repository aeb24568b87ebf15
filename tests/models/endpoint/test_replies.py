"""Replies that are no answer, replies in other forms, and refused fields: one endpoint against each kind of server."""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.errors import RunError
from distill.models.endpoint.logprobs import label_probabilities
from distill.models.reasoner import Answer
from distill.task.labels import LabelSpace
from distill.task.rationale import check
from tests.models.bad_server import MODES, THOUGHT, completion, error, extra_field, unless
from tests.models.openai_server import LABELS, ChatRequest, Server, answers, endpoint, posts, rationale, token

RATIONALE = rationale("negative")


def ask(server: Server, folder: Path, **settings: Any) -> Answer:
    return answers(endpoint(server.url, **({"concurrency": 1} | settings)), posts(folder, 1))[0]


# ---- no answer ----

NO_ANSWER = {
    "null content": (THOUGHT, "thought and no answer"),
    "an open thought": (completion("<think>\nThe words", "length"), "thought and no answer"),
    "only a thought": (completion("<think>hm</think>\n"), "thought and no answer"),
    "reasoning parts": (completion([{"type": "reasoning", "text": "hm"}], "length"), "thought and no answer"),
    "empty content beside reasoning": (completion("", reasoning="hm"), "thought and no answer"),
    "no message": ((200, {"choices": [{"index": 0, "finish_reason": "stop"}]}), "malformed"),
    "only a tool call": (completion(None, "tool_calls", tool_calls=[{"id": "1"}]), "is empty"),
    "null": ((200, None), "malformed"),
    "thought parts": (completion([{"type": "thinking", "thinking": []}], "length"), "thought and no answer"),
    "finish_reason error": (completion("", "error"), "ends with an error"),
    "finish_reason error after some text": (completion('"Prediction": pos', "error"), "ends with an error"),
    "empty": (completion("  "), "is empty"),
    "null content, no thought": (completion(None), "is empty"),
    "no choices": ((200, {"choices": []}), "no choices"),
    "null choices": ((200, {"choices": None}), "no choices"),
    "error in a 200": ((200, {"error": {"message": "upstream overloaded", "code": 529}}), "upstream overloaded"),
    "error text in a 200": ((200, {"error": "no capacity"}), "no capacity"),
    "error in a choice": (
        (200, {"choices": [{"message": {"content": "pos"}, "error": {"message": "provider died", "code": 502}}]}),
        "provider died",
    ),
    "an error object": ((200, {"object": "error", "message": "engine dead", "code": 500}), "engine dead"),
    "a list": ((200, []), "malformed"),
}


@pytest.mark.parametrize("case", NO_ANSWER)
def test_a_reply_without_an_answer_is_retried_and_then_unanswered(tmp_path: Path, case: str) -> None:
    reply, words = NO_ANSWER[case]
    with Server(script=lambda request: reply) as server:
        found = ask(server, tmp_path)
        scores = endpoint(server.url).classify(posts(tmp_path, 1))
    assert found.error is not None and words in found.error
    assert (found.text, found.kind, found.calls) == ("", "unanswered", 0)
    assert 3 <= server.requests <= 2 * 6, "retried, within max_attempts"
    assert not scores.answered.any()


def test_a_status_inside_a_200_is_treated_as_that_status(tmp_path: Path) -> None:
    with Server(script=lambda request: (200, {"error": {"message": "slow down", "code": 429}})) as server:
        found = ask(server, tmp_path, max_attempts=1, deadline_s=0.3)
        assert "status 429: slow down" in str(found.error) and server.requests > 1
    with (
        Server(script=lambda request: (200, {"error": {"message": "who are you", "code": 401}})) as server,
        pytest.raises(RunError, match="who are you"),
    ):
        ask(server, tmp_path)


@pytest.mark.parametrize(
    "reply",
    [
        error("The response was filtered", code="content_filter", param="prompt"),
        error("Input was flagged", 403, code=403),
        error("Output data may contain inappropriate content.", code="data_inspection_failed"),
        completion("", "content_filter"),
        completion("The po", "content_filter"),
        completion(None, "SAFETY"),
        completion(None, "content_filter: SAFETY"),
        (200, {"choices": [{"index": 0, "finish_reason": "content_filter: OTHER"}]}),
        completion(None, refusal="I cannot help with that."),
    ],
)
def test_a_filtered_post_does_not_count_against_the_server(tmp_path: Path, reply: tuple[int, Any]) -> None:
    with Server(
        script=lambda request: reply if int(request.text.split("post ")[-1][:2].strip('"')) < 20 else None
    ) as s:
        found = answers(endpoint(s.url, concurrency=1), posts(tmp_path, 22))
        assert s.requests == 22, "not retried"
    assert [answer.kind for answer in found[:20]] == ["filtered"] * 20
    assert all(answer.error and "filter" in answer.error for answer in found[:20])
    assert [answer.error for answer in found[20:]] == [None] * 2


def test_answers_that_name_no_label_are_no_label(tmp_path: Path) -> None:
    with Server(answer=lambda request: "I cannot judge this post.") as server:
        scores = endpoint(server.url).classify(posts(tmp_path, 2))
    assert not scores.answered.any() and scores.costs[0].calls == 5


# ---- thinking ----


def test_thinking_is_turned_off_once_and_for_all_requests(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING),
        Server(script=MODES["thinking unless told not to"].script()) as server,
    ):
        found = answers(endpoint(server.url), posts(tmp_path, 20))
    assert [answer.error for answer in found] == [None] * 20
    assert sum("chat_template_kwargs" not in request.body for request in server.received) <= 4
    assert len([record for record in caplog.records if "enable_thinking" in record.message]) == 1


def test_the_token_limit_is_raised_within_bounds(tmp_path: Path) -> None:
    with Server(script=unless(lambda body: body["max_tokens"] >= 4096, THOUGHT)()) as server:
        assert ask(server, tmp_path).error is None
    assert [request.body["max_tokens"] for request in server.received] == [512] * 4 + [4096]
    with Server(script=lambda request: THOUGHT) as server:
        assert ask(server, tmp_path).error is not None
        limits = [request.body["max_tokens"] for request in server.received]
    assert limits == [512] * 4 + [4096, 8192]


# ---- other forms ----


def test_content_in_parts_is_joined(tmp_path: Path) -> None:
    with Server(script=MODES["content in parts"].script()) as server:
        assert check(ask(server, tmp_path).text, LABELS).prediction == "negative"


@pytest.mark.parametrize(
    "content",
    [
        [RATIONALE],
        [None, {"type": "text", "text": RATIONALE}],
        [{"type": None, "text": RATIONALE}],
        [{"type": "reasoning", "text": '"Prediction": positive'}, {"type": "text", "text": RATIONALE}],
        [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": RATIONALE}],
    ],
)
def test_parts_have_several_forms(tmp_path: Path, content: list[Any]) -> None:
    with Server(script=lambda request: completion(content)) as server:
        assert ask(server, tmp_path).text == RATIONALE


@pytest.mark.parametrize("usage", [None, [], {}, {"prompt_tokens": "many", "completion_tokens": -1}])
def test_an_answer_is_not_lost_because_its_usage_is_unreadable(tmp_path: Path, usage: Any) -> None:
    status, body = completion(RATIONALE)
    with Server(script=lambda request: (status, body | {"usage": usage})) as server:
        found = ask(server, tmp_path)
    assert (found.text, found.prompt_tokens, found.completion_tokens) == (RATIONALE, 0, 0) and server.requests == 1


@pytest.mark.parametrize(
    ("finish", "finished"),
    [("length", False), ("max_tokens", False), ("MAX_TOKENS", False), ("model_length", False), ("stop", True),
     ("eos_token", True), (None, True)],
)  # fmt: skip
def test_servers_name_the_end_at_the_token_limit_differently(tmp_path: Path, finish: Any, finished: bool) -> None:
    with Server(script=lambda request: completion(RATIONALE[:40], finish)) as server:
        assert ask(server, tmp_path).finished == finished


def test_a_label_in_pieces_of_characters_is_joined(tmp_path: Path) -> None:
    pieces = [("\\xe6\\xad", [230, 173], -0.1), ("\\xa3", [163], -0.01), ("面", [233, 157, 162], -0.02)]
    labels = LabelSpace(("负面", "中性", "正面"))
    for has_bytes in (True, False):  # without the field, bytes are read from the text
        content = [
            {"token": text, "bytes": data if has_bytes else None, "logprob": p, "top_logprobs": []}
            for text, data, p in pieces
        ]
        status, body = completion("正面")
        body["choices"][0]["logprobs"] = {"content": content}
        with Server(script=lambda request, reply=(status, body): reply) as server:  # type: ignore[misc]
            teacher = endpoint(server.url)
            teacher.labels = labels
            scores = teacher.classify(posts(tmp_path, 1))
        assert math.log(scores.probabilities[0, 2] * scores.label_mass[0]) == pytest.approx(-0.13)


def test_alternatives_in_pieces_of_characters_count_for_their_labels() -> None:
    first, other = "\udce6\udcad", "\udce8\udcb4"  # of 正 and of 负
    tokens = [(first, {first: math.log(0.7), other: math.log(0.2)}), ("\udca3面", {"\udca3面": 0.0})]
    probabilities, mass = label_probabilities(tokens, LabelSpace(("负面", "中性", "正面")))
    assert probabilities * mass == pytest.approx([0.2, 0.1, 0.7])


def test_labels_after_a_thought_are_read() -> None:
    spread = {"positive": 0.7, "negative": 0.2, "neutral": 0.1}
    thought = [("<think>", {"<think>": 0.0}), ("negative", {"negative": 0.0}), ("</think>", {"</think>": 0.0})]
    label = token("positive", **spread)
    top = {other["token"]: other["logprob"] for other in label["top_logprobs"]}
    probabilities, mass = label_probabilities([*thought, ("\n\n", {"\n\n": 0.0}), ("positive", top)], LABELS)
    assert probabilities == pytest.approx([0.2, 0.1, 0.7]) and mass == pytest.approx(1)


@pytest.mark.parametrize("value", [math.nan, None])
def test_a_log_probability_that_is_not_a_number_is_no_answer(tmp_path: Path, value: float | None) -> None:
    with Server(logprobs=lambda request: [token("positive") | {"logprob": value}]) as server:
        _, score = next(endpoint(server.url).scores(posts(tmp_path, 1)))
    assert score.label_mass == 0 and "not a number" in str(score.answer.error)


def test_probabilities_in_place_of_log_probabilities_are_not_used(tmp_path: Path) -> None:
    top = [{"token": "negative", "logprob": 0.3}]
    tokens = [token("positive") | {"logprob": 0.7, "top_logprobs": top}]
    with Server(answer=lambda request: "positive", logprobs=lambda request: tokens) as server:
        scores = endpoint(server.url).classify(posts(tmp_path, 1))
        assert server.requests == 5  # agreement of samples
    assert LABELS.names[scores.probabilities[0].argmax()] == "positive" and np.isnan(scores.label_mass).all()


# ---- optional fields ----


@pytest.mark.parametrize(
    ("status", "words"), [(400, "'{name}' is not supported"), (403, "no {name}"), (404, "nope"), (422, "loc")]
)
@pytest.mark.parametrize(
    "field", ["max_tokens", "temperature", "seed", "response_format", "logprobs", "logprob_token_ids"]
)
def test_a_refused_field_is_left_out_whatever_the_status_and_the_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, field: str, words: str, status: int
) -> None:
    reply = (status, extra_field(field)[1]) if words == "loc" else error(words.format(name=field), status)
    spread = {"positive": 0.5, "negative": 0.3, "neutral": 0.2}
    with (
        caplog.at_level(logging.WARNING),
        Server(
            script=unless(lambda body: field not in body, reply)(),
            logprobs=lambda request: [token("positive", **spread)],
            tokenize=lambda text: [len(text)],
        ) as server,
    ):
        teacher = endpoint(server.url)
        found = answers(teacher, posts(tmp_path, 6))
        scores = teacher.classify(posts(tmp_path, 6))
        refused = sum(field in request.body for request in server.received)
    assert [answer.error for answer in found] == [None] * 6 and scores.answered.all()
    assert refused <= 2 * 4 + 10, "negotiated once"
    kept = [name for name in ("temperature", "seed", "logprobs") if name != field]
    assert all(name in server.received[-1].body for name in kept), "only the refused field is given up"
    assert len(caplog.records) <= 2 and caplog.records
    assert all(server.url in record.message for record in caplog.records)
    if words == "nope":
        assert "nope" in caplog.records[0].message, "the server's own words"


def test_the_dialects_of_the_format_are_tried_in_turn(tmp_path: Path) -> None:
    def refuse(request: ChatRequest) -> tuple[int, Any] | None:
        kind = request.body.get("response_format", {}).get("type")
        if kind == "json_schema":
            return error("response_format json_schema is not supported")
        return error("unknown field guided_json") if "guided_json" in request.body else None

    with Server(script=refuse) as server:
        assert ask(server, tmp_path).error is None
    assert server.received[-1].body["response_format"] == {"type": "json_object"}


def test_all_fields_can_be_refused_without_a_name(tmp_path: Path) -> None:
    with Server(script=MODES["no optional field, unnamed"].script()) as server:
        teacher = endpoint(server.url)
        found = answers(teacher, posts(tmp_path, 12))
        negotiated = server.requests - 12
        scores = teacher.classify(posts(tmp_path, 3))
        again = server.requests
        answers(teacher, posts(tmp_path, 3))
        assert server.requests == again + 3, "negotiated once"
    assert [answer.error for answer in found] == [None] * 12 and negotiated < 30
    assert np.isnan(scores.label_mass).all()
    assert "max_completion_tokens" in server.received[-1].body


def test_a_request_that_is_refused_whatever_it_has_is_not_repeated_without_end(tmp_path: Path) -> None:
    with Server(script=lambda request: error("Bad request")) as server:
        with pytest.raises(RunError, match=r"in a row unanswered: .*Bad request"):
            answers(endpoint(server.url), posts(tmp_path, 100))
        assert server.requests < 50
    for status, words in ((403, "requires a key, but api_key_env is not set"), (404, "does not serve big-vl")):
        with Server(script=lambda request, status=status: error("Go away", status)) as server:  # type: ignore[misc]
            with pytest.raises(RunError, match=rf"{words} \(status {status}\): Go away"):
                answers(endpoint(server.url), posts(tmp_path, 100))
            assert server.requests < 50


def test_a_refusal_of_one_post_gives_up_no_field(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    too_long = "This model's maximum context length is 4096 tokens; reduce the messages or max_tokens"

    def refuse(request: ChatRequest) -> tuple[int, Any] | None:
        words = {"post 3": too_long, "post 5": "Bad post"}
        return next((error(said) for post, said in words.items() if post in request.text), None)

    with caplog.at_level(logging.WARNING), Server(script=refuse) as server:
        found = answers(endpoint(server.url, concurrency=1), posts(tmp_path, 8))
        assert server.requests == 8
    assert [bool(answer.error) for answer in found] == [i in (3, 5) for i in range(8)]
    assert not caplog.records
