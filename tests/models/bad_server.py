"""A server with the faults of real ones: each mode is a script for `openai_server.Server`."""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.models.openai_server import DROPPED, ChatRequest, answer, rationale

Reply = tuple[int, Any]
Script = Callable[[ChatRequest], Reply | None]


@dataclass
class Mode:
    """One fault.

    Attributes:
        script: creates the script of one server.
        ends: a pattern of the message that ends the run; empty if the run gets its answers.
        paid: whether the run that ends has paid answers.
        filtered: the number of posts that are refused by a filter; the first ones.
        endpoint: settings of the endpoint.
    """

    script: Callable[[], Script]
    ends: str = ""
    paid: bool = False
    filtered: int = 0
    endpoint: dict[str, Any] = field(default_factory=dict)


def completion(content: Any, finish: str = "stop", **message: Any) -> Reply:
    """A reply with one choice."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content} | message, "finish_reason": finish}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return 200, {"id": "x", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}


def error(message: str, status: int = 400, **fields: Any) -> Reply:
    """An error in OpenAI's format."""
    return status, {"error": {"message": message, "type": "invalid_request_error", **fields}}


THOUGHT = completion(None, "length", reasoning_content="Let me see. The words")


def always(reply: Reply) -> Callable[[], Script]:
    return lambda: lambda request: reply


def unless(accepts: Callable[[dict[str, Any]], Any], reply: Reply) -> Callable[[], Script]:
    """The reply to requests that the server does not accept."""
    return lambda: lambda request: None if accepts(request.body) else reply


def wrapped(wrap: Callable[[str], Reply]) -> Callable[[], Script]:
    """The usual answer in another form."""
    return lambda: lambda request: wrap(answer(request))


def first_attempts(reply: Reply, count: int = 1) -> Callable[[], Script]:
    """The reply to the first attempts of each request; afterwards the usual one."""

    def create() -> Script:
        seen: Counter[str] = Counter()
        lock = threading.Lock()

        def script(request: ChatRequest) -> Reply | None:
            with lock:
                seen[str(request.body)] += 1
                return reply if seen[str(request.body)] <= count else None

        return script

    return create


def filtering(reply: Reply, count: int) -> Callable[[], Script]:
    """The reply to the first posts that arrive."""

    def create() -> Script:
        refused: set[str] = set()
        lock = threading.Lock()

        def script(request: ChatRequest) -> Reply | None:
            post = str(request.body["messages"][0]["content"][0])  # its image
            with lock:
                if len(refused) < count:
                    refused.add(post)
                return reply if post in refused else None

        return script

    return create


def slow(seconds: float, count: float = math.inf) -> Callable[[], Script]:
    """The usual answer, late for the first requests."""

    def create() -> Script:
        late, lock = list[bool](), threading.Lock()

        def script(request: ChatRequest) -> None:
            with lock:
                late.append(len(late) < count)
                is_late = late[-1]
            time.sleep(seconds * is_late)

        return script

    return create


def parts(text: str) -> Reply:
    half = len(text) // 2
    return completion([{"type": "text", "text": text[:half]}, {"type": "text", "text": text[half:]}])


def extra_field(name: str) -> Reply:
    """A refusal by FastAPI, which names the field in `loc`."""
    return 422, {"detail": [{"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs", "input": 1}]}


_OPTIONAL = ("temperature", "seed", "response_format", "guided_json", "logprobs", "max_tokens")

MODES: dict[str, Mode] = {
    "no log-probabilities": Mode(lambda: lambda request: None),
    "tokens spent on thinking": Mode(always(THOUGHT), r"in a row unanswered: .*thought and no answer"),
    "thinking unless told not to": Mode(unless(lambda body: "chat_template_kwargs" in body, THOUGHT)),
    "thinking unless effort is none": Mode(
        lambda: (
            lambda request: (
                extra_field("chat_template_kwargs")
                if "chat_template_kwargs" in request.body
                else None
                if request.body.get("reasoning_effort") == "none"
                else THOUGHT
            )
        )
    ),
    "thinking with more tokens": Mode(unless(lambda body: body["max_tokens"] >= 256, THOUGHT)),
    "thoughts in the answer": Mode(wrapped(lambda text: completion(f"<think>\nnegative?\n</think>\n{text}"))),
    "thoughts without end": Mode(always(completion("<think>\nThe words", "length")), r"in a row unanswered"),
    "answer tags and fences": Mode(wrapped(lambda text: completion(f"<answer>\n```\n{text}\n```\n</answer>"))),
    "empty answers": Mode(always(completion("")), r"in a row unanswered: .*empty"),
    "error as a finish reason": Mode(always(completion("", "error")), r"in a row unanswered: .*ends with an error"),
    "error as a finish reason, once": Mode(first_attempts(completion("", "error"))),
    "error in a 200": Mode(
        always((200, {"error": {"message": "upstream overloaded", "code": 529}})), r"upstream overloaded"
    ),
    "error in a 200, once": Mode(first_attempts((200, {"error": {"message": "upstream overloaded", "code": 529}}))),
    "empty choices": Mode(always((200, {"object": "chat.completion", "choices": []})), r"in a row unanswered"),
    "filtered posts": Mode(
        filtering(error("The response was filtered", code="content_filter", param="prompt"), 20), filtered=20
    ),
    "filtered answers": Mode(filtering(completion("", "content_filter"), 20), filtered=20),
    "max_tokens": Mode(
        unless(
            lambda body: "max_tokens" not in body,
            error("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", param="max_tokens"),
        )
    ),
    "temperature": Mode(
        unless(
            lambda body: body.get("temperature", 1) == 1,
            error("Unsupported value: 'temperature' does not support 0 with this model.", param="temperature"),
        )
    ),
    "log-probabilities forbidden": Mode(
        unless(
            lambda body: "logprobs" not in body,
            error("You are not allowed to request logprobs from this model", 403),
        )
    ),
    "nothing can route it": Mode(
        unless(
            lambda body: "response_format" not in body,
            error("No endpoints found that support the requested parameters", 404),
        )
    ),
    "seed": Mode(unless(lambda body: "seed" not in body, extra_field("seed"))),
    "no optional field, unnamed": Mode(
        unless(lambda body: not any(name in body for name in _OPTIONAL), error("Bad request"))
    ),
    "content in parts": Mode(wrapped(parts)),
    "an expired key": Mode(always(error("Incorrect API key provided", 401)), r"status 401\): Incorrect API key"),
    "an unknown model": Mode(
        always(error("The model `big-vl` does not exist", 404)), r"does not serve big-vl .*does not exist"
    ),
    "prose without fields": Mode(
        wrapped(lambda text: completion("This post is " + text.rpartition(" ")[2])),
        r"^annotate: the first 20 answers are all invalid, .*'This post is negative' \(Text_analysis is missing\)",
        paid=True,
    ),
    "a label outside the set": Mode(
        always(completion(rationale("happy"))), r"all invalid.*\(Prediction is 'happy', not one label\)", paid=True
    ),
    "an apology": Mode(
        always(completion("I'm sorry, but I can't help with that.")),
        r'such as "I\'m sorry, but I can\'t help with that." \(Text_analysis is missing\)',
        paid=True,
    ),
    "cut answers": Mode(
        wrapped(lambda text: completion(text[:40], "length")), r"all invalid.*raise annotate\.max_new_tokens", paid=True
    ),
    "slow": Mode(slow(0.6), r"in a row unanswered: .*[Tt]imed out", endpoint={"timeout_s": 0.3, "max_attempts": 2}),
    "slow at first": Mode(slow(1.5, 6), endpoint={"timeout_s": 1.0}),
    "drops connections": Mode(
        always((DROPPED, None)), r"in a row unanswered: .*closed connection", endpoint={"max_attempts": 2}
    ),
    "drops connections at first": Mode(first_attempts((DROPPED, None))),
}
