"""HTTP client of the OpenAI chat API: sends one request and parses the reply."""

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
"""The tokens of an answer, each with the top-k tokens at its position and their log-probabilities."""

_TOKENIZE_TIMEOUT_S = 10.0
_MIN_IDLE_CONNECTIONS = 256  # may exceed `concurrency`: `distill serve` limits its requests itself


class HttpClient:
    """Connections to one server, with its API key; thread-safe.

    Raises:
        SettingsError: the environment variable that `api_key_env` names is not set.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        key = os.environ.get(settings.api_key_env, "").strip() if settings.api_key_env else ""
        if settings.api_key_env and not key:
            raise SettingsError(f"api_key_env: the environment variable {settings.api_key_env} is not set")
        if not (key.isascii() and key.isprintable()):
            raise SettingsError(f"api_key_env: {settings.api_key_env} contains characters that are not valid in a key")
        self.settings = settings
        auth = {"Authorization": f"Bearer {key}"} if key else basic_auth("Authorization", settings.base_url)
        self._headers = {"Content-Type": "application/json"} | auth
        self._pool = connection_pool(settings.base_url, max(_MIN_IDLE_CONNECTIONS, settings.concurrency))

    def close(self) -> None:
        """Close the idle connections."""
        self._pool.clear()

    def send(self, body: Mapping[str, Any], content: Sequence[bytes], timeout_s: float) -> tuple[Answer, Tokens]:
        """Send one request and return the parsed answer.

        Args:
            body: the request without `messages`.
            content: JSON fragments of the message content.
            timeout_s: time limit of the whole reply, also if the server sends it slowly.

        Raises:
            RequestFailed: a retry may succeed.
            RequestRefused: a retry cannot succeed.
            RunError: the server refuses the key, requires payment or does not serve the model.
        """
        url = self.settings.base_url.rstrip("/")
        head = f'{json.dumps(body)[:-1]}, "messages": [{{"role": "user", "content": '.encode()
        request = b"".join([head, *content, b"}]}"])  # one write, because each write releases the GIL
        response, reply = self._post(f"{url}/chat/completions", request, timeout_s)
        status, text = response.status, reply.decode("utf-8", "replace")
        if status in (401, 403):
            name = self.settings.api_key_env
            problem = f"refuses the key in {name}" if name else "requires a key, but api_key_env is not set"
            raise RunError(f"the endpoint {url} {problem} (status {status})")
        if status == 402:
            raise RunError(f"the endpoint {url} requires payment (status 402): {text[:200]}")
        if status == 404 or 300 <= status < 400:
            raise RunError(f"the endpoint at base_url {url} does not serve {self.settings.model} (status {status})")
        if status in (408, 429) or status >= 500:
            retry_after_s = _retry_after_s(response.headers.get("retry-after", ""))
            busy = status == 429 or (status == 503 and retry_after_s > 0)
            raise RequestFailed(f"status {status}: {text[:200]}", retry_after_s, busy=busy)
        if status >= 400:
            raise RequestRefused(f"the endpoint refused the request (status {status}): {text[:200]}", text)
        try:
            return _parse_reply(json.loads(text))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise RequestFailed(f"a malformed reply: {text[:200]!r}") from error

    def tokenize(self, text: str) -> list[int] | None:
        """Token ids from the server's `/tokenize` route (vLLM serves it next to `/v1`); None if there is no such route.

        Raises:
            RequestFailed: the server cannot be reached.
        """
        root = self.settings.base_url.rstrip("/").removesuffix("/v1")
        body = {"model": self.settings.model, "prompt": text, "add_special_tokens": False}
        _, reply = self._post(
            f"{root}/tokenize", json.dumps(body).encode(), min(self.settings.timeout_s, _TOKENIZE_TIMEOUT_S)
        )
        try:
            return [int(token) for token in json.loads(reply)["tokens"]]
        except (ValueError, LookupError, TypeError):  # the reply of a server that does not know the route
            return None

    def _post(self, url: str, body: bytes, timeout_s: float) -> tuple[urllib3.BaseHTTPResponse, bytes]:
        """Response and body. Raises RequestFailed, also if the reply is not complete within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        options = {"body": body, "headers": self._headers, "timeout": timeout_s}
        try:
            with self._pool.urlopen("POST", url, redirect=False, preload_content=False, **options) as response:
                return response, read_body(response, deadline)
        except TimeoutError:
            raise RequestFailed(f"the reply took longer than {timeout_s:.3g} s") from None
        except HTTPError as error:
            why = re.sub(r"^HTTPS?Connection.*?\): ", "", str(error.args[-1] if error.args else ""))
            unreachable = isinstance(error, (NewConnectionError, ConnectTimeoutError, SSLError, ProxyError))
            raise RequestFailed(f"{type(error).__name__} {why}".strip(), unreachable=unreachable) from error


class RequestFailed(Exception):
    """A request that failed and may succeed on a retry.

    Attributes:
        retry_after_s: seconds to wait that the server requests; 0 if it requests none.
        unreachable: no connection to a server was established.
        busy: the server replied that it is overloaded.
    """

    def __init__(self, why: str, retry_after_s: float = 0.0, *, unreachable: bool = False, busy: bool = False) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s
        self.unreachable = unreachable
        self.busy = busy


class RequestRefused(Exception):
    """A request that the server rejects, so that a retry cannot succeed; `reply` is the text of its reply."""

    def __init__(self, why: str, reply: str) -> None:
        super().__init__(why)
        self.reply = reply


def _parse_reply(reply: Any) -> tuple[Answer, Tokens]:
    """Answer and tokens of a reply. Raises ValueError, LookupError, TypeError or AttributeError if it is malformed."""
    choice = reply["choices"][0]
    text = choice["message"].get("content") or ""
    usage = reply.get("usage") or {}
    answer = Answer(
        text.encode("utf-8", "replace").decode(),  # replaces lone surrogates
        choice.get("finish_reason") not in ("length", "content_filter"),
        int(usage.get("prompt_tokens") or 0),
        int(usage.get("completion_tokens") or 0),
    )
    tokens = (choice.get("logprobs") or {}).get("content") or []
    top_tokens = [
        {t["token"]: float(t["logprob"]) for t in [token, *(token.get("top_logprobs") or [])]} for token in tokens
    ]
    return answer, [(token["token"], top) for token, top in zip(tokens, top_tokens, strict=True)]


def _retry_after_s(header: str) -> float:
    """Seconds to wait according to a `Retry-After` header (seconds or a date); 0 if it cannot be parsed."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return 0.0
