"""One question to a server that speaks the OpenAI chat protocol: sent, retried, given up, or its answer read."""

import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from distill.errors import RunError, SettingsError
from distill.models.reasoner import Answer, Sampling

log = logging.getLogger(__name__)

Tokens = Sequence[tuple[str, Mapping[str, float]]]
"""The tokens of an answer, each with the likeliest tokens at its place and their log-probabilities."""

_LONGEST_PAUSE_S = 60.0
_FEWER = 5  # log-probabilities, where a server refuses to give more
_PATIENCE = 8  # answers given up in a row before the server is; never fewer than are in flight at once


@dataclass
class EndpointSettings:
    """A server that speaks the OpenAI chat protocol."""

    base_url: str
    """Address of the server up to its version, such as http://localhost:8000/v1."""
    model: str
    """Name of the model, as the server knows it."""
    api_key_env: str = ""
    """Environment variable that holds the key; empty: the server wants none."""
    concurrency: int = 8
    """How many questions are in flight at once."""
    timeout_s: float = 120.0
    """Seconds that one request may take."""
    deadline_s: float = 600.0
    """Seconds that one answer may take with all its retries."""
    max_attempts: int = 6
    """How often a request is sent before its answer is given up."""
    backoff_s: float = 1.0
    """Longest wait before the first retry, in seconds; it doubles with each one, up to a minute."""
    json_schema: bool = True
    """Ask for rationales by JSON schema; dropped with a warning where the server cannot."""
    top_logprobs: int = 20
    """How many log-probabilities to ask for when classifying, 1 to 20; fewer or none where the server refuses."""
    agreement_samples: int = 5
    """Answers drawn for each classification where the server tells no log-probabilities."""
    max_image_side: int = 1024
    """Longest side of a picture as it is sent, in pixels; larger ones are scaled down."""
    prompt_price: float | None = None
    """Price of a million prompt tokens, in any currency."""
    completion_price: float | None = None
    """Price of a million completion tokens, in the same currency."""

    def __post_init__(self) -> None:
        try:
            url = httpx.URL(self.base_url)
        except httpx.InvalidURL:
            url = httpx.URL("")
        if url.scheme not in ("http", "https") or not url.host:
            raise SettingsError(f"base_url is {self.base_url!r}; it takes an address such as http://localhost:8000/v1")
        for name in ("concurrency", "timeout_s", "deadline_s", "max_attempts", "agreement_samples", "max_image_side"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} is {getattr(self, name)}; it takes a number above 0")
        if not 1 <= self.top_logprobs <= 20:
            raise SettingsError(f"top_logprobs is {self.top_logprobs}; it takes 1 to 20")


class Chat:
    """A conversation of one question and one answer; threads may share it.

    `top_logprobs` is how many log-probabilities the server gives, as far as is known; 0: none.

    Raises:
        SettingsError: the environment variable that `api_key_env` names is not set.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        key = os.environ.get(settings.api_key_env, "").strip() if settings.api_key_env else ""
        if settings.api_key_env and not key:
            raise SettingsError(f"api_key_env: the environment variable {settings.api_key_env} is not set")
        self.settings = settings
        self.top_logprobs = settings.top_logprobs
        self._sends_schema = settings.json_schema
        self._sends_seed = True
        self._client = httpx.Client(
            headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=settings.concurrency),
        )
        self._lock = threading.Lock()
        self._served = False  # whether any answer ever came
        self._given_up = 0  # answers in a row

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def ask(
        self,
        content: str | list[dict[str, Any]],
        sampling: Sampling,
        stop: threading.Event,
        *,
        schema: Mapping[str, Any] | None = None,
        logprobs: bool = False,
    ) -> tuple[Answer, Tokens]:
        """One answer with all its retries: exponential back-off with full jitter, and never before `Retry-After`.

        Args:
            content: the user's message: a text, or picture and text parts.
            stop: set when nobody waits for the answer any more.
            schema: JSON schema of the answer, sent while the server is not known to refuse it.
            logprobs: ask for the tokens; they stay empty where the server gives none.

        Raises:
            RunError: the server is not there, has stopped answering, refuses the key or does not serve the model.
        """
        deadline = time.monotonic() + self.settings.deadline_s
        attempts = 0
        while not stop.is_set():
            body: dict[str, Any] = {
                "model": self.settings.model,
                "messages": [{"role": "user", "content": content}],
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
            try:
                left_s = max(deadline - time.monotonic(), 0.001)
                answer = self._send(body, min(self.settings.timeout_s, left_s))
            except _Refused as refusal:
                if not self._ask_for_less(body, refusal.reply):
                    return Answer("", False, error=str(refusal)), ()
            except _Failed as failure:
                attempts += 1
                ceiling = min(_LONGEST_PAUSE_S, self.settings.backoff_s * 2.0 ** (attempts - 1))
                pause = max(failure.retry_after_s, random.uniform(0, ceiling))
                if attempts >= self.settings.max_attempts or time.monotonic() + pause >= deadline:
                    return self._give_up(failure, attempts), ()
                stop.wait(pause)
            else:
                self._served, self._given_up = True, 0
                return answer
        return Answer("", False, error="nobody waits for this answer any more"), ()

    def without_logprobs(self, why: str) -> None:
        """Note once that the server gives no log-probabilities."""
        with self._lock:
            if self.top_logprobs:
                log.warning("%s %s: label probabilities come from agreement", self.settings.base_url, why)
            self.top_logprobs = 0

    def _send(self, body: Mapping[str, Any], limit_s: float) -> tuple[Answer, Tokens]:
        """One request, however slowly the server drips its reply, and the answer that is in it."""
        url, end, content = self.settings.base_url.rstrip("/"), time.monotonic() + limit_s, bytearray()
        try:
            with self._client.stream(
                "POST", f"{url}/chat/completions", content=json.dumps(body), timeout=limit_s
            ) as response:
                for chunk in response.iter_bytes():
                    content += chunk
                    if time.monotonic() > end:
                        raise httpx.ReadTimeout(f"the reply took longer than {limit_s:.3g} s")
        except httpx.HTTPError as error:
            dead = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
            raise _Failed(f"{type(error).__name__} {error}".strip(), dead=dead) from error
        status, text = response.status_code, content.decode("utf-8", "replace")
        if status in (401, 403):
            name = self.settings.api_key_env
            refused = f"refuses the key in {name}" if name else "wants a key, and api_key_env names none"
            raise RunError(f"the endpoint {url} {refused} (status {status})")
        if status == 404 or 300 <= status < 400:
            raise RunError(f"the endpoint at base_url {url} does not serve {self.settings.model} (status {status})")
        if status in (408, 429) or status >= 500:
            raise _Failed(f"status {status}: {text[:200]}", _retry_after_s(response.headers.get("retry-after", "")))
        if status >= 400:
            raise _Refused(f"the endpoint refused the question (status {status}): {text[:200]}", text)
        try:
            return _read(json.loads(text))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _Failed(f"a malformed reply: {text[:200]!r}") from error

    def _give_up(self, failure: "_Failed", attempts: int) -> Answer:
        """The end of one answer; and of the run, where the server is not there or answers nobody any more."""
        url = self.settings.base_url
        if failure.dead and not self._served:
            raise RunError(f"no server answers at base_url {url}: {failure}")
        with self._lock:
            self._given_up += 1
            if self._given_up >= max(_PATIENCE, self.settings.concurrency):
                raise RunError(f"the endpoint {url} left {self._given_up} questions in a row unanswered: {failure}")
        return Answer("", False, error=f"no answer after {attempts} attempts: {failure}")

    def _ask_for_less(self, body: Mapping[str, Any], refusal: str) -> bool:
        """Whether a refusal names something optional in the request; that is left out from now on, with a warning."""
        url, refusal = self.settings.base_url, refusal.lower()
        if "response_format" in body and any(word in refusal for word in ("response_format", "json_schema", "guided")):
            with self._lock:
                if self._sends_schema:
                    log.warning("%s takes no JSON schema: rationales are asked for in words alone", url)
                self._sends_schema = False
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


class _Failed(Exception):
    """A request that may succeed when it is sent again."""

    def __init__(self, why: str, retry_after_s: float = 0.0, dead: bool = False) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s
        self.dead = dead  # there was no server at all


class _Refused(Exception):
    """A request that the server will never answer."""

    def __init__(self, why: str, reply: str) -> None:
        super().__init__(why)
        self.reply = reply


def _read(reply: Any) -> tuple[Answer, Tokens]:
    """The answer in a reply. Raises ValueError, LookupError, TypeError or AttributeError for any other shape."""
    choice = reply["choices"][0]
    text = choice["message"].get("content") or ""
    usage = reply.get("usage") or {}
    answer = Answer(
        text.encode("utf-8", "replace").decode(),  # no lone surrogates
        choice.get("finish_reason") not in ("length", "content_filter"),
        int(usage.get("prompt_tokens") or 0),
        int(usage.get("completion_tokens") or 0),
    )
    tokens = (choice.get("logprobs") or {}).get("content") or []
    likely = [
        {t["token"]: float(t["logprob"]) for t in [token, *(token.get("top_logprobs") or [])]} for token in tokens
    ]
    return answer, [(token["token"], top) for token, top in zip(tokens, likely, strict=True)]


def _retry_after_s(header: str) -> float:
    """Seconds to wait by a `Retry-After` header, which gives seconds or a date; 0 for anything else."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return 0.0
