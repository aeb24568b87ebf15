"""Optional request fields: which ones a server takes, found out from its refusals, once per endpoint.

Each option is a ladder of dialects: the next one is used when the server refuses the current one, and after the last
one the option is left out. Steps are only taken upwards, so the negotiation ends.
"""

import json
import logging
import re
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from distill.errors import RunError
from distill.models.endpoint.replies import RequestRefused
from distill.models.endpoint.settings import EndpointSettings
from distill.models.reasoner import Sampling

log = logging.getLogger(__name__)

Option = Literal[
    "video", "sound", "thinking", "beginning", "token_ids", "seed", "schema", "temperature", "logprobs", "limit"
]  # fmt: skip
"""The options, the most dispensable first: the order in which they are left out if the server names none."""

_PARTS: tuple[Option, ...] = ("video", "sound")
"""Options that are parts of the message instead of fields of the request. They are never left out: the frames of a
video are sent as images instead, and without the sound the request is another one."""

Steps = Mapping[Option, int]
Fields = Mapping[Option, Mapping[str, Any]]
"""The fields of a request by option."""

_REDUCED_TOP_LOGPROBS = 5  # if the server refuses to return more
_MAX_THOUGHT = 8192  # tokens of an answer whose limit is raised because the model thinks
_WITHOUT_THINKING: tuple[tuple[dict[str, Any], int], ...] = (
    ({}, 1),
    ({"chat_template_kwargs": {"enable_thinking": False}}, 1),
    ({"reasoning_effort": "none"}, 1),
    ({"reasoning_effort": "low"}, 1),
    ({}, 8),
    ({}, 64),
)  # fields, and the factor of the token limit
_CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}
_TOKENS_ONLY = 4  # the first step without a field

_NAMES: dict[str, str] = {
    "max_tokens": r"\bmax_tokens\b",
    "max_completion_tokens": r"\bmax_completion_tokens\b",
    "temperature": r"\btemperature\b",
    "seed": r"\bseed\b",
    "response_format": r"response_format|json_schema|json_object|structured[ _]outputs?|guided|grammar",
    "guided_json": r"guided|grammar|structured[ _]outputs?",
    "logprobs": r"(?<!_)\b(?:top_)?log[ _-]?prob(?:s|\b|abilit)",
    "logprob_token_ids": r"logprob_token_ids",
    "continue_final_message": r"continue_final_message|add_generation_prompt|(?:final|last) message|assistant",
    "chat_template_kwargs": r"chat_template_kwargs|enable_thinking",
    "reasoning_effort": r"reasoning[_ ]effort",
    "video_url": r"video|content\W{0,4}(?:part|type)|unsupported content",
    "input_audio": r"audio|content\W{0,4}(?:part|type)|unsupported content",
}
"""How messages name the fields."""

_NOT_THE_FIELDS = re.compile(
    r"context (?:length|window|size)|too (?:long|large|many tokens)|reduce (?:the|your)", re.IGNORECASE
)


@dataclass(frozen=True)
class ChatRequest:
    """What a request asks for, before the server's abilities are taken into account.

    Attributes:
        schema: JSON schema of the answer; sent unless the server has refused schemas.
        logprobs: request the tokens with their log-probabilities; the tokens are empty if the server returns none.
        token_ids: request the log-probabilities of these tokens instead of the top-k tokens. A server that does not
            support `logprob_token_ids` returns the top-k tokens.
        beginning: of the answer, which the server continues; not sent if it does not take that.
        video, sound: whether the message has a part of this kind.
    """

    sampling: Sampling
    schema: Mapping[str, Any] | None = None
    logprobs: bool = False
    token_ids: Sequence[int] = ()
    beginning: str = ""
    video: bool = False
    sound: bool = False


class OptionalFields:
    """The dialects that one server takes; thread-safe.

    `top_logprobs` is the number of log-probabilities requested; 0 if the server returns none.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        self._settings = settings
        top = settings.top_logprobs
        self._tops = [top, _REDUCED_TOP_LOGPROBS] if top > _REDUCED_TOP_LOGPROBS else [top]
        self._steps: dict[Option, int] = dict.fromkeys(get_args(Option), 0)
        self._accepted: set[tuple[Option, int]] = set()  # options of answered requests, with their steps
        self._tried: set[frozenset[Option]] = set()  # options that were left out one after the other, in vain
        self._lock = threading.Lock()
        self._trials = threading.Lock()  # held by the thread that leaves out fields

    @property
    def top_logprobs(self) -> int:
        step = self._steps["logprobs"]
        return self._tops[step] if step < len(self._tops) else 0

    @property
    def continues(self) -> bool:
        """Whether the server continues the beginning of an answer, as far as its refusals have shown."""
        return self._steps["beginning"] == 0

    def shows_frames(self, steps: Steps | None = None) -> bool:
        """Whether the frames of a video are sent as images; in the current dialect if no steps are given."""
        return self._settings.video == "frames" or (steps or self._steps)["video"] > 0

    def steps(self) -> dict[Option, int]:
        """The current dialect of each option."""
        with self._lock:
            return dict(self._steps)

    def fields(self, request: ChatRequest, steps: Steps) -> dict[Option, Mapping[str, Any]]:
        """The fields of a request by option; an option that is not asked for or left out has none."""
        ladders = self._ladders(request, steps)
        fields = {option: ladder[steps[option]] for option, ladder in ladders.items() if steps[option] < len(ladder)}
        if "logprobs" not in fields:
            fields.pop("token_ids", None)
        return {option: fields[option] for option in fields if fields[option]}

    def body(self, fields: Fields) -> dict[str, Any]:
        """A request without `messages`."""
        body: dict[str, Any] = {"model": self._settings.model}
        for option, part in fields.items():
            body |= {} if option in _PARTS else part
        return body

    def accept(self, fields: Fields, steps: Steps) -> None:
        """Record that a request with these fields was answered."""
        self._accepted |= {(option, steps[option]) for option in fields}

    def names_field(self, request: ChatRequest, steps: Steps, refusal: RequestRefused) -> bool:
        """Whether a refusal names an optional field of the request."""
        return self._named(self.fields(request, steps), steps, refusal) is not None

    def may_mean_another(self, request: ChatRequest, steps: Steps, refusal: RequestRefused) -> bool:
        """Whether a refusal names the sound and may mean the video: servers list what they take."""
        named = self._named(self.fields(request, steps), steps, refusal)
        return named == "sound" and steps["video"] == 0 and "video" in self._suspects(request, steps)

    def drop_named(self, fields: Fields, steps: Steps, refusal: RequestRefused) -> bool:
        """If a refusal names a field of the request, send its option in the next dialect from now on; return True.

        Raises:
            RunError: it names the sound.
        """
        option = self._named(fields, steps, refusal)
        if option is None:
            return False
        if option == "sound":
            raise RunError(
                f"the endpoint {self._settings.shown_url} does not take the sound of posts (status {refusal.status}: "
                f"{refusal.error.words}); use a model that hears, or set audio: ignore in the settings of the endpoint"
            )
        self._advance(option, steps[option], steps[option] + 1, refusal.error.words)
        return True

    def trials(self, request: ChatRequest, steps: Steps, refusal: RequestRefused) -> Generator[Steps, None, None]:
        """Steps to try after a refusal that names no field, until the server accepts one of them (`settle`).

        First one option is changed alone, then more and more are left out; after a refusal that names the sound, only
        the video is. Options that the server has taken before are not at fault. There is nothing to try if another
        thread has changed the steps, or has tried the same in vain. The iterator holds a lock; close it.
        """
        ladders, suspects = self._ladders(request, steps), self._suspects(request, steps)
        if self.may_mean_another(request, steps, refusal):
            suspects = ["video"]
        if refusal.status == 413 or _NOT_THE_FIELDS.search(refusal.error.words) or not suspects:
            return
        with self._trials:
            if self.steps() != dict(steps) or frozenset(suspects) in self._tried:
                return
            for option in suspects:
                for step in range(steps[option] + 1, len(ladders[option]) + (option not in ("video", "thinking"))):
                    yield {**steps, option: step}
            without = dict(steps)
            for option in suspects:
                last = _TOKENS_ONLY if option == "thinking" else len(ladders[option]) - (option == "video")
                for step in (1, last) if option == "limit" and steps[option] == 0 else (last,):
                    without[option] = step
                    yield dict(without)
            self._tried.add(frozenset(suspects))

    def settle(self, steps: Steps, accepted: Steps, refusal: RequestRefused) -> None:
        """Use the accepted steps of a trial from now on."""
        for option in get_args(Option):
            if accepted[option] != steps[option]:
                self._advance(option, steps[option], accepted[option], refusal.error.words)

    def think_less(self, request: ChatRequest, steps: Steps, why: str) -> bool:
        """After a reply that is only a thought: turn thinking off, or raise the token limit. False if that is done."""
        step, before = steps["thinking"], self.body(self.fields(request, steps))
        while (step := step + 1) < len(_WITHOUT_THINKING):
            fields = self.fields(request, {**steps, "thinking": step})
            if self.body(fields) != before:
                self._advance("thinking", steps["thinking"], step, why)
                return True
        return False

    def disable_logprobs(self, reason: str) -> None:
        """Stop requesting log-probabilities; logs a warning the first time."""
        if self.top_logprobs:
            step = self._steps["logprobs"]
            self._advance("logprobs", step, len(self._tops), reason)

    @property
    def given_up(self) -> list[str]:
        """What happens instead of the first dialect of each option that the server has not taken."""
        return [self._consequence(option, step) for option, step in self.steps().items() if step]

    def _ladders(self, request: ChatRequest, steps: Steps) -> dict[Option, Sequence[Mapping[str, Any]]]:
        sampling = request.sampling
        _, factor = _WITHOUT_THINKING[min(steps["thinking"], len(_WITHOUT_THINKING) - 1)]
        limit = max(sampling.max_new_tokens, min(sampling.max_new_tokens * factor, _MAX_THOUGHT))
        schemas: list[dict[str, Any]] = []
        if request.schema and self._settings.json_schema:
            named = {"name": "rationale", "strict": True, "schema": request.schema}
            schemas = [
                {"response_format": {"type": "json_schema", "json_schema": named}},
                {"guided_json": request.schema},
                {"response_format": {"type": "json_object"}},
            ]
        tops = [{"logprobs": True, "top_logprobs": top} for top in self._tops] if request.logprobs else []
        as_video = request.video and self._settings.video == "auto"
        return {
            "video": [{"video_url": True}, {"image_url": True}] if as_video else [],
            "sound": [{"input_audio": True}] if request.sound else [],
            "temperature": [{"temperature": sampling.temperature}],
            "limit": [{"max_tokens": limit}, {"max_completion_tokens": limit}],
            "seed": [{"seed": sampling.seed + sampling.attempt}],
            "schema": schemas,
            "logprobs": tops,
            "beginning": [dict(_CONTINUE)] if request.beginning else [],
            "token_ids": [{"logprob_token_ids": list(request.token_ids)}] if request.token_ids else [],
            "thinking": [fields for fields, _ in _WITHOUT_THINKING],
        }

    def _suspects(self, request: ChatRequest, steps: Steps) -> list[Option]:
        """The options of a request, without the sound, that the server has not taken before."""
        fields = self.fields(request, steps)
        return [
            option
            for option in get_args(Option)
            if option in fields and option != "sound" and (option, steps[option]) not in self._accepted
        ]

    def _named(self, fields: Fields, steps: Steps, refusal: RequestRefused) -> Option | None:
        """The option that a refusal names; never a part that the server has taken before: then the post is at fault."""
        own = {
            option: part
            for option, part in fields.items()
            if option not in _PARTS or (option, steps[option]) not in self._accepted
        }
        return _named(own, refusal, self._settings.model)

    def _advance(self, option: Option, seen: int, step: int, words: str) -> None:
        """Go on to a step of an option, unless another thread has changed it since `seen`; log it once."""
        with self._lock:
            if self._steps[option] != seen:
                return
            self._steps[option] = step
        log.warning("%s: %s (%s)", self._settings.shown_url, self._consequence(option, step), words)

    def _consequence(self, option: Option, step: int) -> str:
        if option == "limit":
            return [
                "max_tokens is not taken; max_completion_tokens is sent instead",
                "no token limit is taken; the length of answers is not limited",
            ][step - 1]
        if option == "schema":
            return [
                "JSON schemas are not taken in response_format; guided_json is sent instead",
                "guided_json is not taken; response_format json_object is sent instead",
                "no response_format is taken; only the prompt asks for the format",
            ][step - 1]
        if option == "logprobs" and step < len(self._tops):
            return f"fewer log-probabilities are requested: {self._tops[step]}"
        if option == "thinking":
            extra, factor = _WITHOUT_THINKING[step]
            remedy = f"{json.dumps(extra)} is sent" if extra else f"up to {factor} times as many tokens are allowed"
            return f"to get an answer after a thought, {remedy}"
        return {
            "video": "videos are not taken; their frames are sent as images instead",
            "logprobs": "no log-probabilities; label probabilities are estimated from the agreement of sampled answers",
            "beginning": "continue_final_message is not taken; labels are read from whole answers",
            "token_ids": "logprob_token_ids is not taken; the top-k tokens are read",
            "temperature": "temperature is not taken and left out: answers are sampled as the server likes",
            "seed": "seed is not taken and left out",
        }[option]


def _named(fields: Fields, refusal: RequestRefused, model: str) -> Option | None:
    """The option whose field a refusal names, in a field of its own or first in its message.

    Args:
        model: its name may be in the message, and contain a word such as audio.
    """
    if refusal.status == 413 or _NOT_THE_FIELDS.search(refusal.error.words):
        return None
    for text in (refusal.error.param, refusal.error.words.replace(model, "")):
        found = [
            (match.start(), get_args(Option).index(option), option)
            for option, part in fields.items()
            for name in part
            if name in _NAMES and (match := re.search(_NAMES[name], text, re.IGNORECASE))
        ]
        if found:
            return min(found)[2]
    return None
