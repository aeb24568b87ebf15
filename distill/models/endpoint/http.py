"""One request to a server that speaks the OpenAI chat protocol, and the answer in its reply."""

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NewConnectionError,
    ProxyError,
    SSLError,
)

from distill.connections import basic_auth, connection_pool, read_body
from distill.errors import RunError, SettingsError
from distill.models.endpoint.settings import EndpointSettings
from distill.models.reasoner import Answer

Tokens = Sequence[tuple[str, Mapping[str, float]]]
"""The tokens of an answer, each with the likeliest tokens at its place and their log-probabilities."""

_TOKENIZE_S = 10.0
_KEPT = 256  # idle connections, though fewer questions may be in flight: `distill serve` counts those by itself


class HttpClient:
    """A server with its key; threads may share it.

    Raises:
        SettingsError: the environment variable that `api_key_env` names is not set.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        key = os.environ.get(settings.api_key_env, "").strip() if settings.api_key_env else ""
        if settings.api_key_env and not key:
            raise SettingsError(f"api_key_env: the environment variable {settings.api_key_env} is not set")
        if not (key.isascii() and key.isprintable()):
            raise SettingsError(f"api_key_env: {settings.api_key_env} holds characters that no key has")
        self.settings = settings
        bearer = {"Authorization": f"Bearer {key}"} if key else basic_auth("Authorization", settings.base_url)
        self._headers = {"Content-Type": "application/json"} | bearer
        self._pool = connection_pool(settings.base_url, max(_KEPT, settings.concurrency))

    def close(self) -> None:
        """Close the connections that nobody uses just now."""
        self._pool.clear()

    def send(self, body: Mapping[str, Any], content: Sequence[bytes], limit_s: float) -> tuple[Answer, Tokens]:
        """One request, however slowly the server drips its reply, and the answer that is in it.

        Args:
            body: all but the message.
            content: of the message, as pieces of JSON.

        Raises:
            RequestFailed: it may succeed when it is sent again.
            RequestRefused: it never will.
            RunError: the server refuses the key or does not serve the model.
        """
        url = self.settings.base_url.rstrip("/")
        head = f'{json.dumps(body)[:-1]}, "messages": [{{"role": "user", "content": '.encode()
        whole = b"".join([head, *content, b"}]}"])  # in one piece: each write gives up the interpreter to others
        response, reply = self._post(f"{url}/chat/completions", whole, limit_s)
        status, text = response.status, reply.decode("utf-8", "replace")
        if status in (401, 403):
            name = self.settings.api_key_env
            refused = f"refuses the key in {name}" if name else "wants a key, and api_key_env names none"
            raise RunError(f"the endpoint {url} {refused} (status {status})")
        if status == 402:
            raise RunError(f"the endpoint {url} wants to be paid (status 402): {text[:200]}")
        if status == 404 or 300 <= status < 400:
            raise RunError(f"the endpoint at base_url {url} does not serve {self.settings.model} (status {status})")
        if status in (408, 429) or status >= 500:
            retry_after_s = _retry_after_s(response.headers.get("retry-after", ""))
            busy = status == 429 or (status == 503 and retry_after_s > 0)
            raise RequestFailed(f"status {status}: {text[:200]}", retry_after_s, busy=busy)
        if status >= 400:
            raise RequestRefused(f"the endpoint refused the question (status {status}): {text[:200]}", text)
        try:
            return _read(json.loads(text))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise RequestFailed(f"a malformed reply: {text[:200]!r}") from error

    def tokenize(self, text: str) -> list[int] | None:
        """The tokens of a text by the server's own `/tokenize` (vLLM has it beside /v1); None where it has none.

        Raises:
            RequestFailed: the server cannot be reached.
        """
        root = self.settings.base_url.rstrip("/").removesuffix("/v1")
        body = {"model": self.settings.model, "prompt": text, "add_special_tokens": False}
        _, reply = self._post(f"{root}/tokenize", json.dumps(body).encode(), min(self.settings.timeout_s, _TOKENIZE_S))
        try:
            return [int(token) for token in json.loads(reply)["tokens"]]
        except (ValueError, LookupError, TypeError):  # as in what others say of a path that they do not know
            return None

    def _post(self, url: str, body: bytes, limit_s: float) -> tuple[urllib3.BaseHTTPResponse, bytes]:
        """The head and the body of a reply that takes no longer than that. Raises RequestFailed."""
        deadline = time.monotonic() + limit_s
        sent = {"body": body, "headers": self._headers, "timeout": limit_s}
        try:
            with self._pool.urlopen("POST", url, redirect=False, preload_content=False, **sent) as response:
                return response, read_body(response, deadline)
        except TimeoutError:
            raise RequestFailed(f"the reply took longer than {limit_s:.3g} s") from None
        except HTTPError as error:
            why = re.sub(r"^HTTPS?Connection.*?\): ", "", str(error.args[-1] if error.args else ""))
            dead = isinstance(error, (NewConnectionError, ConnectTimeoutError, SSLError, ProxyError))
            raise RequestFailed(f"{type(error).__name__} {why}".strip(), dead=dead) from error


class RequestFailed(Exception):
    """A request that may succeed when it is sent again."""

    def __init__(self, why: str, retry_after_s: float = 0.0, *, dead: bool = False, busy: bool = False) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s
        self.dead = dead  # there was no server at all
        self.busy = busy  # there was one, with too much to do


class RequestRefused(Exception):
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
