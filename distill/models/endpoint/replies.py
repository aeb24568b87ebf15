"""Replies of the OpenAI chat API: the answer of one, or the named failure that it is."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from distill.models.reasoner import Answer
from distill.task.reply import final_text

Tokens = Sequence[tuple[str, Mapping[str, float]]]
"""The tokens of an answer, each with the top-k tokens at its position and their log-probabilities.

A token that is a part of a character has its bytes as lone surrogates (`surrogateescape`).
"""

_FILTERED_FINISH = ("content_filter", "safety", "recitation", "prohibited_content", "blocklist", "spii", "sensitive")
_CUT_FINISH = ("length", "max_tokens", "max_output_tokens", "model_length")
_TEXT_PARTS = ("text", "output_text")
_ESCAPED = re.compile(r"(?:bytes:)?(?:\\x[0-9a-fA-F]{2})+|(?:<0x[0-9a-fA-F]{2}>)+")  # bytes in the token's text
_HEX = re.compile(r"x([0-9a-fA-F]{2})")
_ROUNDING = 0.01  # how far above 0 a log-probability may be


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
    """A request that the server rejects; without one of its optional fields it may be accepted.

    Attributes:
        explained: what the status means if it is not about this request: a refused key, or an unknown model.
    """

    def __init__(self, why: str, status: int, error: ServerError, explained: str) -> None:
        super().__init__(why)
        self.explained = explained
        self.status = status
        self.error = error


class RequestFiltered(Exception):
    """A content filter refuses this post or its answer; other posts are not concerned."""


class OnlyThought(Exception):
    """The model spent its tokens on thinking: the reply has a thought and no answer."""


def server_error(reply: Any, text: str) -> ServerError:
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
    words = " ".join(encodable(str(message)).split())[:300]
    param = " ".join(part for part in params if isinstance(part, str))
    return ServerError(words, status, f"{code or ''} {fields.get('type') or ''}", param, is_error)


def parse_reply(reply: Any) -> tuple[Answer, Tokens]:
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
    text = encodable(content)
    if filtered or (message.get("refusal") and not text.strip()):
        why = encodable(str(message.get("refusal") or f"finish_reason {finish}"))
        raise RequestFiltered(f"a content filter refuses the answer: {why[:200]}")
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


def encodable(text: str) -> str:
    """The text without lone surrogates, which JSON can hold and files cannot."""
    return text.encode("utf-8", "replace").decode()


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


def read_retry_after(header: str) -> float:
    """Seconds to wait according to a `Retry-After` header (seconds or a date); 0 if it cannot be parsed."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return 0.0
