"""Chat requests with retries, back-off, and fallbacks for optional request fields that a server does not support."""

import logging
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from distill.errors import RunError
from distill.models.endpoint.http import HttpClient, RequestFailed, RequestRefused, Tokens
from distill.models.endpoint.settings import EndpointSettings
from distill.models.reasoner import Answer, Sampling

log = logging.getLogger(__name__)

_MAX_BACKOFF_S = 60.0
_REDUCED_TOP_LOGPROBS = 5  # if the server refuses to return more
_MAX_CONSECUTIVE_FAILURES = 8  # unanswered requests in a row that end the run; at least `concurrency`


class ChatClient:
    """Client for single-turn chat requests; thread-safe.

    `top_logprobs` is the number of log-probabilities requested; it is lowered if the server refuses, to 0 if the
    server returns none.

    Raises:
        SettingsError: the environment variable named by `api_key_env` is not set.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        self.settings = settings
        self.top_logprobs = settings.top_logprobs
        self._sends_token_ids = True
        self._sends_schema = settings.json_schema
        self._sends_seed = True
        self._http = HttpClient(settings)
        self._lock = threading.Lock()
        self._has_answered = False  # whether the server has ever answered
        self._consecutive_failures = 0
        self._not_before = 0.0  # time.monotonic() before which no thread sends a request, from `Retry-After`

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def ask(
        self,
        content: Sequence[bytes],
        sampling: Sampling,
        stop: threading.Event,
        *,
        schema: Mapping[str, Any] | None = None,
        logprobs: bool = False,
        token_ids: Sequence[int] = (),
    ) -> tuple[Answer, Tokens]:
        """Request one answer, with retries: exponential back-off with full jitter that respects `Retry-After`.

        `seconds` of the answer is the time from the first request to the end of the last reply.

        Args:
            content: JSON fragments of the user message's content: a string, or a list of image and text parts.
            stop: set when the answer is no longer needed.
            schema: JSON schema of the answer; sent unless the server has refused schemas.
            logprobs: request the tokens with their log-probabilities; the tokens are empty if the server returns none.
            token_ids: request the log-probabilities of these tokens instead of the top-k tokens. A server that does
                not support `logprob_token_ids` returns the top-k tokens.

        Returns:
            The answer and its tokens. If no answer was received, `error` of the answer says why.

        Raises:
            RunError: the server cannot be reached, no longer answers, refuses the key or does not serve the model.
        """
        begin = time.monotonic()
        answer, tokens = self._ask(content, sampling, stop, schema, logprobs, token_ids)
        return replace(answer, seconds=time.monotonic() - begin), tokens

    def tokenize(self, text: str) -> list[int] | None:
        """Token ids of a text from the server's tokenizer; None if the server does not return them."""
        return self._http.tokenize(text)

    def _ask(
        self,
        content: Sequence[bytes],
        sampling: Sampling,
        stop: threading.Event,
        schema: Mapping[str, Any] | None,
        logprobs: bool,
        token_ids: Sequence[int],
    ) -> tuple[Answer, Tokens]:
        deadline = time.monotonic() + self.settings.deadline_s
        attempts = failures = 0
        while not stop.is_set():
            if (pause := self._not_before - time.monotonic()) > 0:
                if self._not_before >= deadline:
                    reason = RequestFailed("the server asks to wait until after the deadline")
                    return self._give_up(reason, failures), ()
                stop.wait(pause)
                continue
            body = self._body(sampling, schema, logprobs, token_ids)
            try:
                remaining_s = max(deadline - time.monotonic(), 0.001)
                answer = self._http.send(body, content, min(self.settings.timeout_s, remaining_s))
            except RequestRefused as refusal:
                if not self._drop_optional_field(body, refusal.reply):
                    self._record_failure(refusal)
                    return unanswered(str(refusal)), ()
            except RequestFailed as failure:
                failures += 1
                attempts += not failure.busy
                ceiling = min(_MAX_BACKOFF_S, self.settings.backoff_s * 2.0 ** min(failures - 1, 16))
                pause = max(failure.retry_after_s, random.uniform(0, ceiling))
                if attempts >= self.settings.max_attempts or time.monotonic() + pause >= deadline:
                    return self._give_up(failure, failures), ()
                self._not_before = max(self._not_before, time.monotonic() + failure.retry_after_s)
                stop.wait(pause)
            else:
                self._has_answered, self._consecutive_failures = True, 0
                return answer
        return unanswered("the request was cancelled"), ()

    def _body(
        self, sampling: Sampling, schema: Mapping[str, Any] | None, logprobs: bool, token_ids: Sequence[int]
    ) -> dict[str, Any]:
        """A request without `messages`, with those optional fields that the server has not refused."""
        body: dict[str, Any] = {
            "model": self.settings.model,
            "temperature": sampling.temperature,
            "max_tokens": sampling.max_new_tokens,
        }
        if self._sends_seed:
            body["seed"] = sampling.seed + sampling.attempt
        if schema and self._sends_schema:
            named = {"name": "rationale", "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        if logprobs and (top := self.top_logprobs):
            body |= {"logprobs": True, "top_logprobs": top}
            if token_ids and self._sends_token_ids:
                body["logprob_token_ids"] = list(token_ids)
        return body

    def disable_logprobs(self, reason: str) -> None:
        """Stop requesting log-probabilities; logs a warning the first time."""
        with self._lock:
            if self.top_logprobs:
                log.warning(
                    "%s %s; label probabilities are estimated from the agreement of sampled answers",
                    self.settings.base_url,
                    reason,
                )
            self.top_logprobs = 0

    def _give_up(self, failure: RequestFailed, attempts: int) -> Answer:
        """Stop retrying one answer. Raises RunError if the server cannot be reached or no longer answers."""
        url = self.settings.base_url
        if failure.unreachable and not self._has_answered:
            raise RunError(f"no server answers at base_url {url}: {failure}")
        self._record_failure(failure)
        return unanswered(f"no answer after {attempts} attempts: {failure}")

    def _record_failure(self, reason: Exception) -> None:
        """Count an unanswered request. Raises RunError after too many in a row: then the server is at fault."""
        with self._lock:
            self._consecutive_failures += 1
            if self._consecutive_failures >= max(_MAX_CONSECUTIVE_FAILURES, self.settings.concurrency):
                url, count = self.settings.base_url, self._consecutive_failures
                raise RunError(f"the endpoint {url} left {count} requests in a row unanswered: {reason}")

    def _drop_optional_field(self, body: Mapping[str, Any], refusal: str) -> bool:
        """If a refusal names an optional field of the request, omit or reduce it from now on and return True."""
        url, refusal = self.settings.base_url, refusal.lower()
        if "response_format" in body and any(word in refusal for word in ("response_format", "json_schema", "guided")):
            with self._lock:
                if self._sends_schema:
                    log.warning("%s does not support JSON schemas; only the prompt asks for the format", url)
                self._sends_schema = False
        elif "logprob_token_ids" in body and "logprob_token_ids" in refusal:
            self._sends_token_ids = False
        elif "logprobs" in body and "logprobs" in refusal:
            if body["top_logprobs"] <= _REDUCED_TOP_LOGPROBS:
                self.disable_logprobs("refuses log-probabilities")
            else:
                self.top_logprobs = min(self.top_logprobs, _REDUCED_TOP_LOGPROBS)
        elif "seed" in body and re.search(r"\bseed\b", refusal):
            self._sends_seed = False
        else:
            return False
        return True


def unanswered(reason: str) -> Answer:
    """An answer that was not received; `calls` is 0."""
    return Answer("", False, error=reason, calls=0)
