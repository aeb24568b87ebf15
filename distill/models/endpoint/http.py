"""HTTP client of the OpenAI API: sends one request and reads the reply, as an answer or as a named failure."""

import json
import os
import random
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import IO, Any, NoReturn
from urllib.parse import urljoin

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NewConnectionError,
    ProxyError,
    SSLError,
)

from distill.connections import basic_auth, connection_pool, read_body, trace_headers
from distill.errors import RunError, SettingsError
from distill.models.endpoint.replies import (
    RequestFailed,
    RequestFiltered,
    RequestRefused,
    ServerError,
    Tokens,
    parse_reply,
    read_retry_after,
    server_error,
)
from distill.models.endpoint.settings import EndpointSettings
from distill.models.reasoner import Answer

_FILTERED = re.compile(
    r"content[ _-]*(?:filter|polic|moderat|management)|moderation|flagged|data_inspection|inappropriate content"
    r"|responsible ?ai|safety (?:system|filter|polic)|prohibited[ _]content|policy[ _]violation",
    re.IGNORECASE,
)
_ABOUT_KEY = re.compile(
    r"(?:api|access)[ _-]?(?:key|token)|unauthori[sz]ed|authenticat|credential|(?:invalid|missing|expired) token",
    re.IGNORECASE,
)
_ABOUT_MODEL = re.compile(
    r"\bmodel\b.{0,80}(?:not found|not exist|not available|unknown)|(?:unknown|no such|invalid) model", re.IGNORECASE
)
_KIND = r"(?:\w+ ){0,2}(?:image|audio|video)\w*(?: \w+)?"
_UNSUPPORTED = re.compile(rf"{_KIND} (?:is|are) not supported|not support {_KIND}|unsupported content", re.IGNORECASE)
_TOKENIZE_TIMEOUT_S = 10.0
_MAX_BACKOFF_S = 60.0
_REDIRECTS = (301, 302, 303, 307, 308)
_PART = 1 << 20  # bytes of a download that are written at once
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})
_MIN_IDLE_CONNECTIONS = 256  # may exceed `concurrency`: `distill serve` limits its requests itself


def read_key(settings: EndpointSettings) -> str:
    """The API key; empty if the server requires none.

    Raises:
        SettingsError: the environment variable that `api_key_env` names is not set, or holds no key.
    """
    key = os.environ.get(settings.api_key_env, "").strip() if settings.api_key_env else ""
    if settings.api_key_env and not key:
        raise SettingsError(f"api_key_env: the environment variable {settings.api_key_env} is not set")
    if not (key.isascii() and key.isprintable()):
        raise SettingsError(f"api_key_env: {settings.api_key_env} contains characters that are not valid in a key")
    return key


class HttpClient:
    """Connections to one server, `base_url`, with its API key; thread-safe.

    Args:
        connect_s: time limit of a connection, in seconds; None: that of the whole reply.

    Raises:
        SettingsError: the environment variable that `api_key_env` names is not set.
    """

    def __init__(self, settings: EndpointSettings, connect_s: float | None = None) -> None:
        key = read_key(settings)
        self.settings, self._connect_s = settings, connect_s
        auth = {"Authorization": f"Bearer {key}"} if key else basic_auth("Authorization", settings.base_url)
        self._secret = auth.get("Authorization", "").partition(" ")[2]  # a server may repeat it
        self._headers = {"Content-Type": "application/json"} | auth
        self._pool = connection_pool(settings.base_url, max(_MIN_IDLE_CONNECTIONS, settings.concurrency))

    def close(self) -> None:
        """Close the idle connections."""
        self._pool.clear()

    def send(self, request: bytes, timeout_s: float) -> tuple[Answer, Tokens]:
        """Send one request and return the parsed answer.

        Args:
            request: from `request_body`.
            timeout_s: time limit of the whole reply, also if the server sends it slowly.

        Raises:
            RequestFailed: a retry may succeed.
            RequestRefused: the same request cannot succeed.
            RequestFiltered: a content filter refuses the post or the answer.
            OnlyThought: the model spent its tokens on thinking.
            RunError: the server refuses the key, requires payment or does not serve the model.
        """
        response, reply = self._post(self.settings.url_of("/chat/completions"), request, timeout_s)
        return self.read(response.status, reply.decode("utf-8", "replace"), response.headers)

    def read(self, status: int, text: str, headers: Mapping[str, str] = _NO_HEADERS) -> tuple[Answer, Tokens]:
        """The answer in a reply to a chat request, however it was sent. Raises what `send` raises."""
        content = _json(text)
        error = self._error(content, text)
        if status >= 300:
            self._raise_failure(status, replace(error, in_reply=False), headers)
        if error.in_reply:
            self._raise_failure(error.status, error, headers)
        try:
            return parse_reply(content)
        except (ValueError, LookupError, TypeError, AttributeError) as problem:
            raise RequestFailed(f"a malformed reply: {text[:200]!r}") from problem

    def call(
        self,
        method: str,
        route: str,
        body: bytes | Iterable[bytes] | None = None,
        headers: Mapping[str, str] = _NO_HEADERS,
        save: IO[bytes] | None = None,
    ) -> Any:
        """Send a request that is not about a chat, and return the JSON of the reply.

        `timeout_s` of the settings limits each wait for the server, not the whole transfer, which may be large.

        Args:
            route: below `base_url`.
            headers: besides those of all requests.
            save: a file that the body of a reply is written to instead; None is returned then.

        Raises:
            RequestFailed, RequestRefused, RunError: see `send`.
        """
        url, target = self.settings.url_of(route), None
        with self._open(method, url, body, self.settings.timeout_s, headers) as response:
            if save is not None and response.status < 300:
                return _save(response, save)
            if save is not None and response.status in _REDIRECTS:
                target = response.headers.get("location")
            text = response.read().decode("utf-8", "replace")
        if save is not None and target:  # the file is in a storage, which is not given the key
            with self._open("GET", urljoin(url, target), None, self.settings.timeout_s, key=False) as response:
                if response.status < 300:
                    return _save(response, save)
                text = response.read().decode("utf-8", "replace")
        content = _json(text)
        if response.status >= 300:
            self._raise_failure(response.status, replace(self._error(content, text), in_reply=False), response.headers)
        if content is None:
            raise RequestFailed(f"a malformed reply: {text[:200]!r}")
        return content

    def _error(self, content: Any, text: str) -> ServerError:
        """The error in a reply, without the key or login."""
        error = server_error(content, text)
        return replace(error, words=error.words.replace(self._secret, "***")) if self._secret else error

    def _raise_failure(self, status: int, error: ServerError, headers: Mapping[str, str]) -> NoReturn:
        """Raise the failure that a status other than 2xx means. The server's own words are part of the message."""
        url, model, words = self.settings.shown_url, self.settings.model, error.words
        if status == 401 or (status == 403 and _ABOUT_KEY.search(words)):
            raise RunError(self.explain(status, words))
        if status == 402:
            raise RunError(f"the endpoint {url} requires payment (status 402): {words}")
        if 300 <= status < 400 or (status == 404 and _ABOUT_MODEL.search(words)):
            raise RunError(f"the endpoint at base_url {url} does not serve {model} (status {status}): {words}")
        cannot = status == 501 or (status == 500 and bool(_UNSUPPORTED.search(words)))  # llama.cpp's status for it
        if status in (408, 429) or (status >= 500 and not cannot):
            retry_after_s = read_retry_after(headers.get("retry-after", ""))
            busy = status == 429 or (status == 503 and retry_after_s > 0)
            raise RequestFailed(
                f"status {status}: {words}", retry_after_s, busy=busy, generated=error.in_reply and not busy
            )
        if _FILTERED.search(f"{error.code} {words}"):
            raise RequestFiltered(f"a content filter refuses the post (status {status}): {words}")
        why = f"the endpoint refused the request (status {status}): {words}"
        raise RequestRefused(why, status, error, self.explain(status, words))

    def explain(self, status: int, words: str) -> str:
        """The message for a refused key (401, 403) or an unknown address or model (404), with the server's words."""
        url, name = self.settings.shown_url, self.settings.api_key_env
        if status == 404:
            return f"the endpoint at base_url {url} does not serve {self.settings.model} (status 404): {words}"
        problem = f"refuses the key in {name}" if name else "requires a key, but api_key_env is not set"
        return f"the endpoint {url} {problem} (status {status}): {words}"

    def tokenize(self, text: str) -> list[int] | None:
        """Token ids from the server's `/tokenize` route (vLLM serves it next to `/v1`); None if there is no such route.

        Raises:
            RequestFailed: the server cannot be reached.
        """
        url = self.settings.url_of("/tokenize", beside_version=True)
        body = {"model": self.settings.model, "prompt": text, "add_special_tokens": False}
        _, reply = self._post(url, json.dumps(body).encode(), min(self.settings.timeout_s, _TOKENIZE_TIMEOUT_S))
        try:
            return [int(token) for token in json.loads(reply)["tokens"]]
        except (ValueError, LookupError, TypeError):  # the reply of a server that does not know the route
            return None

    def is_healthy(self, timeout_s: float) -> bool:
        """Whether the server answers `/health`, or `/v1/models` if it has no such route, without a server error."""
        for url in (self.settings.url_of("/health", beside_version=True), self.settings.url_of("/models")):
            try:
                with self._open("GET", url, None, timeout_s) as response:
                    status = response.status
            except RequestFailed:
                return False
            if status != 404:
                return status < 500
        return True

    def _post(self, url: str, body: bytes, timeout_s: float) -> tuple[urllib3.BaseHTTPResponse, bytes]:
        """Response and body. Raises RequestFailed, also if the reply is not complete within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        with self._open("POST", url, body, timeout_s) as response:
            return response, read_body(response, deadline)

    @contextmanager
    def _open(
        self,
        method: str,
        url: str,
        body: bytes | Iterable[bytes] | None,
        timeout_s: float,
        headers: Mapping[str, str] = _NO_HEADERS,
        *,
        key: bool = True,
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        """A response whose body is still to be read. Raises RequestFailed, also for errors while it is read."""
        connect_s = timeout_s if self._connect_s is None else min(self._connect_s, timeout_s)
        options: Any = {
            "body": body,
            "headers": {**(self._headers | dict(trace_headers.get()) if key else {}), **headers},
        }
        options["timeout"] = urllib3.Timeout(connect=connect_s, read=timeout_s)
        try:
            with self._pool.urlopen(method, url, redirect=False, preload_content=False, **options) as response:
                yield response
        except TimeoutError:
            raise RequestFailed(f"the reply took longer than {timeout_s:.3g} s") from None
        except HTTPError as error:
            why = re.sub(r"^HTTPS?Connection.*?\): ", "", str(error.args[-1] if error.args else ""))
            unreachable = isinstance(error, (NewConnectionError, ConnectTimeoutError, SSLError, ProxyError))
            raise RequestFailed(f"{type(error).__name__} {why}".strip(), unreachable=unreachable) from error


def _save(response: urllib3.BaseHTTPResponse, file: IO[bytes]) -> None:
    """Write the body of a response to a file."""
    for part in response.stream(_PART):
        file.write(part)


def request_body(body: Mapping[str, Any], content: Sequence[bytes], beginning: str = "") -> bytes:
    """The body of a chat request.

    Args:
        body: the request without `messages`.
        content: JSON fragments of the message content.
        beginning: of the answer, which the server continues.
    """
    head = f'{json.dumps(body)[:-1]}, "messages": [{{"role": "user", "content": '.encode()
    last = f", {json.dumps({'role': 'assistant', 'content': beginning})}" if beginning else ""
    return b"".join([head, *content, f"}}{last}]}}".encode()])  # one write, because each write releases the GIL


def backoff_s(settings: EndpointSettings, failures: int, failure: RequestFailed) -> float:
    """Seconds before the next attempt: exponential back-off with full jitter that respects `Retry-After`."""
    ceiling = min(_MAX_BACKOFF_S, settings.backoff_s * 2.0 ** min(failures - 1, 16))
    return max(failure.retry_after_s, random.uniform(0, ceiling))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
