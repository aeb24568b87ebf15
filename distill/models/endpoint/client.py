"""Chat requests with retries, back-off, and fallbacks for optional request fields that a server does not support."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace

from distill.errors import RunError
from distill.models.endpoint.http import backoff_s, request_body
from distill.models.endpoint.negotiation import ChatRequest, OptionalFields, Steps
from distill.models.endpoint.replicas import Replicas
from distill.models.endpoint.replies import (
    OnlyThought,
    RequestFailed,
    RequestFiltered,
    RequestRefused,
    Tokens,
)
from distill.models.endpoint.settings import EndpointSettings
from distill.models.reasoner import Answer, NoAnswer

log = logging.getLogger(__name__)

_MAX_CONSECUTIVE_FAILURES = 8  # unanswered requests in a row that end the run; at least `concurrency`


Content = Callable[[bool], Sequence[bytes]]
"""The JSON fragments of the content of a user message, with the frames of its video as images or with a video part."""


class ChatClient:
    """Client for single-turn chat requests; thread-safe.

    `optional` has the optional request fields that the server takes, `replicas` the servers.

    Raises:
        SettingsError: the environment variable named by `api_key_env` is not set.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        self.settings = settings
        self.optional = OptionalFields(settings)
        self.replicas = Replicas(settings)
        self._lock = threading.Lock()
        self._has_answered = False  # whether the server has ever answered
        self._consecutive_failures = 0
        self._not_before = 0.0  # time.monotonic() before which no thread sends a request, from `Retry-After`

    def close(self) -> None:
        """Close the connections."""
        self.replicas.close()

    def ask(self, content: Content, request: ChatRequest, stop: threading.Event) -> tuple[Answer, Tokens]:
        """Request one answer, with retries: exponential back-off with full jitter that respects `Retry-After`.

        `seconds` of the answer is the time from the first request to the end of the last reply.

        Args:
            stop: set when the answer is no longer needed.

        Returns:
            The answer and its tokens. If no answer was received, `error` and `kind` of the answer say why.

        Raises:
            RunError: the server cannot be reached, no longer answers, refuses the key, does not serve the model or does
                not take sound.
            Exception: what `content` raises.
        """
        begin = time.monotonic()
        answer, tokens = self._ask(content, request, stop)
        return replace(answer, seconds=time.monotonic() - begin), tokens

    def body(self, content: Content, request: ChatRequest) -> bytes:
        """The body of a request in the present dialect, as `ask` would send it. Raises what `content` raises."""
        return self._body(content, request, self.optional.steps())

    def read(self, status: int, text: str) -> tuple[Answer, Tokens]:
        """The answer in a reply to such a body, sent elsewhere. Raises what `HttpClient.send` raises."""
        return self.replicas.read(status, text)

    def tokenize(self, text: str) -> list[int] | None:
        """Token ids of a text from the server's tokenizer; None if the server does not return them."""
        return self.replicas.tokenize(text)

    def _ask(self, content: Content, request: ChatRequest, stop: threading.Event) -> tuple[Answer, Tokens]:
        deadline = time.monotonic() + self.settings.deadline_s
        attempts = failures = 0
        while not stop.is_set():
            if (pause := self._not_before - time.monotonic()) > 0:
                if self._not_before >= deadline:
                    reason = RequestFailed("the server asks to wait until after the deadline")
                    return self._give_up(reason, failures), ()
                stop.wait(pause)
                continue
            steps = self.optional.steps()
            try:
                return self._send(content, request, steps, deadline)
            except RequestRefused as refusal:
                named = self.optional.drop_named(self.optional.fields(request, steps), steps, refusal)
                if not named and self.optional.steps() == steps:
                    self._record_failure(refusal)
                    return unanswered(str(refusal)), ()
            except OnlyThought as thought:
                if not self.optional.think_less(request, steps, str(thought)):
                    why = f"{thought}; raise the token limit or turn the thinking of the model off"
                    self._record_failure(why)
                    return unanswered(why), ()
            except RequestFiltered as refusal:  # the fault of this post, so it does not count against the server
                return unanswered(str(refusal), "filtered"), ()
            except RequestFailed as failure:
                failures += 1
                attempts += 0 if failure.busy else 2 if failure.generated else 1  # generated replies may be paid
                pause = backoff_s(self.settings, failures, failure)
                if attempts >= self.settings.max_attempts or time.monotonic() + pause >= deadline:
                    return self._give_up(failure, failures), ()
                self._not_before = max(self._not_before, time.monotonic() + failure.retry_after_s)
                stop.wait(pause)
        return unanswered("the request was cancelled"), ()

    def _send(self, content: Content, request: ChatRequest, steps: Steps, deadline: float) -> tuple[Answer, Tokens]:
        """Send a request. If it is refused and no field is named, send it without optional fields, one after the other.

        Raises:
            RequestRefused: the refusal names a field, or the request is refused without the fields as well.
        """
        try:
            return self._send_once(content, request, steps, deadline)
        except RequestRefused as refusal:
            named = self.optional.names_field(request, steps, refusal)
            if named and not self.optional.may_mean_another(request, steps, refusal):
                raise
            first = refusal
        with closing(self.optional.trials(request, steps, first)) as trials:
            for trial in trials:
                try:
                    answer = self._send_once(content, request, trial, deadline)
                except RequestRefused:
                    continue
                except (OnlyThought, RequestFiltered):  # the fields are accepted
                    self.optional.settle(steps, trial, first)
                    raise
                self.optional.settle(steps, trial, first)
                return answer
        if first.status in (403, 404) and not (named or self._has_answered) and self.optional.steps() == steps:
            raise RunError(first.explained) from first
        raise first

    def _send_once(
        self, content: Content, request: ChatRequest, steps: Steps, deadline: float
    ) -> tuple[Answer, Tokens]:
        fields = self.optional.fields(request, steps)
        try:
            answer = self.replicas.send(self._body(content, request, steps), deadline)
        except (OnlyThought, RequestFiltered) as reply:
            self._has_answered = True
            if isinstance(reply, OnlyThought):
                self.optional.accept(fields, steps)
            raise
        self._has_answered, self._consecutive_failures = True, 0
        self.optional.accept(fields, steps)
        return answer

    def _body(self, content: Content, request: ChatRequest, steps: Steps) -> bytes:
        fields = self.optional.fields(request, steps)
        beginning = request.beginning if "beginning" in fields else ""
        return request_body(self.optional.body(fields), content(self.optional.shows_frames(steps)), beginning)

    def _give_up(self, failure: RequestFailed, attempts: int) -> Answer:
        """Stop retrying one answer. Raises RunError if the server cannot be reached or no longer answers."""
        if failure.unreachable and not self._has_answered:
            raise RunError(f"no server answers at base_url {self.settings.shown_url}: {failure}")
        self._record_failure(failure)
        return unanswered(f"no answer after {attempts} attempts: {failure}")

    def _record_failure(self, reason: Exception | str) -> None:
        """Count an unanswered request. Raises RunError after too many in a row: then the server is at fault."""
        with self._lock:
            self._consecutive_failures += 1
            if self._consecutive_failures >= max(_MAX_CONSECUTIVE_FAILURES, self.settings.concurrency):
                url, count = self.settings.shown_url, self._consecutive_failures
                raise RunError(f"the endpoint {url} left {count} requests in a row unanswered: {reason}")


def unanswered(reason: str, kind: NoAnswer = "unanswered") -> Answer:
    """An answer that was not received; `calls` is 0."""
    return Answer("", False, error=reason, calls=0, kind=kind)
