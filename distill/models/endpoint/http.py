"""HTTP client of the OpenAI chat API: sends one request and reads the reply, as an answer or as a named failure."""

import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn

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
from distill.task.reply import final_text

Tokens = Sequence[tuple[str, Mapping[str, float]]]
"""The tokens of an answer, each with the top-k tokens at its position and their log-probabilities.

A token that is a part of a character has its bytes as lone surrogates (`surrogateescape`).
"""

_FILTERED = re.compile(
    r"content[ _-]*(?:filter|polic|moderat|management)|moderation|flagged|data_inspection|inappropriate content"
    r"|responsible ?ai|safety (?:system|filter|polic)|prohibited[ _]content|policy[ _]violation",
    re.IGNORECASE,
)
_FILTERED_FINISH = ("content_filter", "safety", "recitation", "prohibited_content", "blocklist", "spii", "sensitive")
_CUT_FINISH = ("length", "max_tokens", "max_output_tokens", "model_length")
_ABOUT_KEY = re.compile(
    r"(?:api|access)[ _-]?(?:key|token)|unauthori[sz]ed|authenticat|credential|(?:invalid|missing|expired) token",
    re.IGNORECASE,
)
_ABOUT_MODEL = re.compile(
    r"\bmodel\b.{0,80}(?:not found|not exist|not available|unknown)|(?:unknown|no such|invalid) model", re.IGNORECASE
)
_KIND = r"(?:\w+ ){0,2}(?:image|audio|video)\w*(?: \w+)?"
_UNSUPPORTED = re.compile(rf"{_KIND} (?:is|are) not supported|not support {_KIND}|unsupported content", re.IGNORECASE)
_TEXT_PARTS = ("text", "output_text")
_ESCAPED = re.compile(r"(?:bytes:)?(?:\\x[0-9a-fA-F]{2})+|(?:<0x[0-9a-fA-F]{2}>)+")  # bytes in the token's text
_HEX = re.compile(r"x([0-9a-fA-F]{2})")
_ROUNDING = 0.01  # how far above 0 a log-probability may be
_TOKENIZE_TIMEOUT_S = 10.0
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
    """Connections to one server, with its API key; thread-safe.

    Raises:
        SettingsError: the environment variable that `api_key_env` names is not set.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        key = read_key(settings)
        self.settings = settings
        self._key = key
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
            RequestRefused: the same request cannot succeed.
            RequestFiltered: a content filter refuses the post or the answer.
            OnlyThought: the model spent its tokens on thinking.
            RunError: the server refuses the key, requires payment or does not serve the model.
        """
        head = f'{json.dumps(body)[:-1]}, "messages": [{{"role": "user", "content": '.encode()
        request = b"".join([head, *content, b"}]}"])  # one write, because each write releases the GIL
        response, reply = self._post(self.settings.url_of("/chat/completions"), request, timeout_s)
        status, text = response.status, reply.decode("utf-8", "replace")
        try:
            content_of_reply = json.loads(text)
        except (ValueError, RecursionError):
            content_of_reply = None
        error = _server_error(content_of_reply, text)
        if self._key:
            error = replace(error, words=error.words.replace(self._key, "***"))
        if status >= 300:
            self._raise_failure(status, replace(error, in_reply=False), response.headers)
        if error.in_reply:
            self._raise_failure(error.status, error, response.headers)
        try:
            return _parse_reply(content_of_reply)
        except (ValueError, LookupError, TypeError, AttributeError) as problem:
            raise RequestFailed(f"a malformed reply: {text[:200]!r}") from problem

    def _raise_failure(self, status: int, error: "ServerError", headers: Mapping[str, str]) -> NoReturn:
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
            retry_after_s = _retry_after_s(headers.get("retry-after", ""))
            busy = status == 429 or (status == 503 and retry_after_s > 0)
            raise RequestFailed(
                f"status {status}: {words}", retry_after_s, busy=busy, generated=error.in_reply and not busy
            )
        if _FILTERED.search(f"{error.code} {words}"):
            raise RequestFiltered(f"a content filter refuses the post (status {status}): {words}")
        raise RequestRefused(f"the endpoint refused the request (status {status}): {words}", status, error)

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


@dataclass(frozen=True)
class ServerError:
    """An error in the words of the server.

    Attributes:
        words: the message, on one line; the reply itself if it has no message.
        status: the status inside the reply; 500 if there is none.
        param: the request fields that the server names in a field of its own.
        in_reply: whether a reply with status 200 is an error by its form.
    """

    words: str
    status: int = 500
    code: str = ""
    param: str = ""
    in_reply: bool = False


class RequestFailed(Exception):
    """A request that failed and may succeed on a retry.

    Attributes:
        retry_after_s: seconds to wait that the server requests; 0 if it requests none.
        unreachable: no connection to a server was established.
        busy: the server replied that it is overloaded.
        generated: the server generated a reply, which may cost money, and it is no answer.
    """

    def __init__(
        self,
        why: str,
        retry_after_s: float = 0.0,
        *,
        unreachable: bool = False,
        busy: bool = False,
        generated: bool = False,
    ) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s
        self.unreachable = unreachable
        self.busy = busy
        self.generated = generated


class RequestRefused(Exception):
    """A request that the server rejects; without one of its optional fields it may be accepted."""

    def __init__(self, why: str, status: int, error: ServerError) -> None:
        super().__init__(why)
        self.status = status
        self.error = error


class RequestFiltered(Exception):
    """A content filter refuses this post or its answer; other posts are not concerned."""


class OnlyThought(Exception):
    """The model spent its tokens on thinking: the reply has a thought and no answer."""


def _server_error(reply: Any, text: str) -> ServerError:
    """The error in a reply, in the forms of OpenAI, vLLM, FastAPI, OpenRouter and Gemini."""
    outer = reply[0] if isinstance(reply, list) and reply else reply
    if not isinstance(outer, dict):
        return ServerError(" ".join(text[:300].split()))
    inner = outer.get("error")
    choices = outer.get("choices")
    if not inner and isinstance(choices, list) and choices and isinstance(choices[0], dict):
        inner = choices[0].get("error")  # one choice failed
    is_error = bool(inner) or outer.get("object") == "error"
    fields = inner if isinstance(inner, dict) else outer
    detail = outer.get("detail")
    message = inner if isinstance(inner, str) else fields.get("message") or detail or text
    params = [fields.get("param")]
    if isinstance(detail, list):  # FastAPI: [{"loc": ["body", "seed"], "msg": ...}]
        params += [part for item in detail if isinstance(item, dict) for part in item.get("loc") or ()]
    if isinstance(fields.get("metadata"), dict):
        message = f"{message} {fields['metadata'].get('raw') or ''}"
    code = fields.get("code")
    statuses = (value for value in (code, fields.get("status")) if isinstance(value, int) and 400 <= value < 600)
    status = next(statuses, 500)
    words = " ".join(str(message).split())[:300]
    param = " ".join(part for part in params if isinstance(part, str))
    return ServerError(words, status, f"{code or ''} {fields.get('type') or ''}", param, is_error)


def _parse_reply(reply: Any) -> tuple[Answer, Tokens]:
    """Answer and tokens of a reply.

    Raises:
        RequestFailed, RequestFiltered, OnlyThought: the reply has no answer.
        ValueError, LookupError, TypeError, AttributeError: the reply is malformed.
    """
    if not reply["choices"]:
        raise RequestFailed("the reply has no choices", generated=True)
    choice = reply["choices"][0]
    finish = str(choice.get("finish_reason") or "").lower()
    filtered = finish.partition(":")[0] in _FILTERED_FINISH  # Gemini adds its own reason after a colon
    message = choice.get("message") or {} if filtered else choice["message"]
    content = message.get("content") or ""
    if isinstance(content, list):
        parts = [{"text": part} if isinstance(part, str) else part for part in content if part is not None]
        kinds = [part.get("type") or "text" for part in parts]
        message = message | {"thinking": any("thinking" in kind or "reasoning" in kind for kind in kinds)}
        texts = zip(kinds, parts, strict=True)
        content = "".join(part.get("text") or "" for kind, part in texts if kind in _TEXT_PARTS)
    text = content.encode("utf-8", "replace").decode()  # replaces lone surrogates
    if filtered or (message.get("refusal") and not text.strip()):
        why = message.get("refusal") or f"finish_reason {finish}"
        raise RequestFiltered(f"a content filter refuses the answer: {str(why)[:200]}")
    if finish == "error":
        raise RequestFailed(f"the reply ends with an error: {text[:200]!r}", generated=True)
    if not final_text(text).strip():
        if text.strip() or any(message.get(name) for name in ("reasoning_content", "reasoning", "thinking")):
            raise OnlyThought(f"the reply has a thought and no answer (finish_reason {finish or 'missing'})")
        raise RequestFailed(f"the reply is empty (finish_reason {finish or 'missing'})", generated=True)
    prompt_tokens, completion_tokens = (
        _count(reply.get("usage"), name) for name in ("prompt_tokens", "completion_tokens")
    )
    answer = Answer(text, finish not in _CUT_FINISH, prompt_tokens, completion_tokens)
    tokens = (choice.get("logprobs") or {}).get("content") or []
    top_tokens = [
        {_token_text(t): _logprob(t) for t in [token, *(token.get("top_logprobs") or [])]} for token in tokens
    ]
    if any(value > _ROUNDING for top in top_tokens for value in top.values()):
        return answer, []  # they are no logarithms
    return answer, [(_token_text(token), top) for token, top in zip(tokens, top_tokens, strict=True)]


def _count(usage: Any, name: str) -> int:
    """A token count of a reply; 0 if there is none. An answer is not lost because its count is unreadable."""
    try:
        return max(0, int(usage[name]))
    except (ValueError, LookupError, TypeError, OverflowError):
        return 0


def _token_text(token: Mapping[str, Any]) -> str:
    """The text of a token, from its bytes if it is a part of a character."""
    text: str = token["token"]
    data = token.get("bytes")
    if not data and _ESCAPED.fullmatch(text):
        data = [int(value, 16) for value in _HEX.findall(text)]
    return bytes(data).decode("utf-8", "surrogateescape") if data else text


def _logprob(token: Mapping[str, Any]) -> float:
    value = token["logprob"]  # null stands for NaN in servers that write valid JSON
    value = math.nan if value is None else float(value)
    if math.isnan(value):
        raise RequestFailed("a log-probability of the reply is not a number", generated=True)
    return value


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
