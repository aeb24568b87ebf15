"""One question to a server that speaks the OpenAI chat protocol: asked, asked again, asked for less, or given up."""

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

_LONGEST_PAUSE_S = 60.0
_FEWER = 5  # log-probabilities, where a server refuses to give more
_PATIENCE = 8  # answers given up in a row before the server is; never fewer than are in flight at once


class ChatClient:
    """A conversation of one question and one answer; threads may share it.

    `top_logprobs` is how many log-probabilities the server gives, as far as is known; 0: none.

    Raises:
        SettingsError: the environment variable that `api_key_env` names is not set.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        self.settings = settings
        self.top_logprobs = settings.top_logprobs
        self._sends_token_ids = True
        self._sends_schema = settings.json_schema
        self._sends_seed = True
        self._connection = HttpClient(settings)
        self._lock = threading.Lock()
        self._served = False  # whether any answer ever came
        self._given_up = 0  # answers in a row
        self._not_before = 0.0  # when the server wants to be asked again, by all

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()

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
        """One answer with all its retries: exponential back-off with full jitter, and never before `Retry-After`.

        Its seconds count from the first request to the end of the last reply.

        Args:
            content: of the user's message, as pieces of JSON: a text, or a list of picture and text parts.
            stop: set when nobody waits for the answer any more.
            schema: JSON schema of the answer, sent while the server is not known to refuse it.
            logprobs: ask for the tokens; they stay empty where the server gives none.
            token_ids: ask for the log-probabilities of just these tokens, instead of the likeliest; a server that does
                not know `logprob_token_ids` gives the likeliest.

        Raises:
            RunError: the server is not there, has stopped answering, refuses the key or does not serve the model.
        """
        begin = time.monotonic()
        answer, tokens = self._ask(content, sampling, stop, schema, logprobs, token_ids)
        return replace(answer, seconds=time.monotonic() - begin), tokens

    def tokenize(self, text: str) -> list[int] | None:
        """The tokens of a text by the server's own tokenizer; None where the server does not tell."""
        return self._connection.tokenize(text)

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
                    return self._give_up(RequestFailed("the server wants to be asked later"), failures), ()
                stop.wait(pause)
                continue
            body = self._body(sampling, schema, logprobs, token_ids)
            try:
                left_s = max(deadline - time.monotonic(), 0.001)
                answer = self._connection.send(body, content, min(self.settings.timeout_s, left_s))
            except RequestRefused as refusal:
                if not self._ask_for_less(body, refusal.reply):
                    self._count(refusal)
                    return unanswered(str(refusal)), ()
            except RequestFailed as failure:
                failures += 1
                attempts += not failure.busy
                ceiling = min(_LONGEST_PAUSE_S, self.settings.backoff_s * 2.0 ** min(failures - 1, 16))
                pause = max(failure.retry_after_s, random.uniform(0, ceiling))
                if attempts >= self.settings.max_attempts or time.monotonic() + pause >= deadline:
                    return self._give_up(failure, failures), ()
                self._not_before = max(self._not_before, time.monotonic() + failure.retry_after_s)
                stop.wait(pause)
            else:
                self._served, self._given_up = True, 0
                return answer
        return unanswered("nobody waits for this answer any more"), ()

    def _body(
        self, sampling: Sampling, schema: Mapping[str, Any] | None, logprobs: bool, token_ids: Sequence[int]
    ) -> dict[str, Any]:
        """A request, all but its message, with what the server is not known to refuse."""
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

    def without_logprobs(self, why: str) -> None:
        """Note once that the server gives no log-probabilities."""
        with self._lock:
            if self.top_logprobs:
                log.warning("%s %s: label probabilities come from agreement", self.settings.base_url, why)
            self.top_logprobs = 0

    def _give_up(self, failure: RequestFailed, attempts: int) -> Answer:
        """The end of one answer; and of the run, where the server is not there or answers nobody any more."""
        url = self.settings.base_url
        if failure.dead and not self._served:
            raise RunError(f"no server answers at base_url {url}: {failure}")
        self._count(failure)
        return unanswered(f"no answer after {attempts} attempts: {failure}")

    def _count(self, why: Exception) -> None:
        """Count an answer that never came: so many in a row are no fault of their questions, and end the run."""
        with self._lock:
            self._given_up += 1
            if self._given_up >= max(_PATIENCE, self.settings.concurrency):
                url, count = self.settings.base_url, self._given_up
                raise RunError(f"the endpoint {url} left {count} questions in a row unanswered: {why}")

    def _ask_for_less(self, body: Mapping[str, Any], refusal: str) -> bool:
        """Whether a refusal names something optional in the request; that is left out from now on, with a warning."""
        url, refusal = self.settings.base_url, refusal.lower()
        if "response_format" in body and any(word in refusal for word in ("response_format", "json_schema", "guided")):
            with self._lock:
                if self._sends_schema:
                    log.warning("%s takes no JSON schema: rationales are asked for in words alone", url)
                self._sends_schema = False
        elif "logprob_token_ids" in body and "logprob_token_ids" in refusal:
            self._sends_token_ids = False
        elif "logprobs" in body and "logprobs" in refusal:
            if body["top_logprobs"] <= _FEWER:
                self.without_logprobs("refuses log-probabilities")
            else:
                self.top_logprobs = min(self.top_logprobs, _FEWER)
        elif "seed" in body and re.search(r"\bseed\b", refusal):
            self._sends_seed = False
        else:
            return False
        return True


def unanswered(why: str) -> Answer:
    """What stands for an answer that never came: no call counts, for none was answered."""
    return Answer("", False, error=why, calls=0)
