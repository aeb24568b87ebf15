"""The wire format: request models, and responses, streams and errors in OpenAI's format."""

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from email import message_from_bytes, policy
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distill.models.local import Completion

Json = dict[str, Any]

_MIN_LOGPROB = -9999.0  # JSON has no infinity


class RequestError(Exception):
    """An error response: an HTTP status and a message of one sentence that says what to change."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        message = " ".join(message.split())  # a name that the client sent may have line breaks
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self) -> Json:
        """The error in OpenAI's format."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SentimentRequest(_Request):
    """One post in plain JSON."""

    text: str = ""
    image: str | None = None
    video: str | None = None
    audio: str | None = None
    aspect: str | None = None
    rationale: bool | None = None


class _Lenient(_Request):
    """A part of a message. Clients add fields of their own (`cache_control`, `annotations`); they have no effect."""

    model_config = ConfigDict(extra="ignore", strict=True)


class TextPart(_Lenient):
    type: Literal["text"]
    text: str


class ImageUrl(_Lenient):
    url: str


class ImagePart(_Lenient):
    type: Literal["image_url"]
    image_url: ImageUrl


class VideoUrl(_Lenient):
    url: str


class VideoPart(_Lenient):
    """vLLM's part with a video."""

    type: Literal["video_url"]
    video_url: VideoUrl


class InputAudio(_Lenient):
    """A sound in base64. Its format is read from its content."""

    data: str


class AudioPart(_Lenient):
    type: Literal["input_audio"]
    input_audio: InputAudio


Part = Annotated[TextPart | ImagePart | VideoPart | AudioPart, Field(discriminator="type")]


class Message(_Lenient):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None

    @property
    def text(self) -> str:
        """All text of the message."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content if isinstance(part, TextPart))
        return self.content or ""

    @property
    def images(self) -> list[str]:
        """The URLs of the message's images; a blank URL is no image."""
        return [
            part.image_url.url for part in self._parts if isinstance(part, ImagePart) and part.image_url.url.strip()
        ]

    @property
    def videos(self) -> list[str]:
        """The URLs of the message's videos."""
        return [
            part.video_url.url for part in self._parts if isinstance(part, VideoPart) and part.video_url.url.strip()
        ]

    @property
    def sounds(self) -> list[str]:
        """The message's sounds, in base64."""
        return [part.input_audio.data for part in self._parts if isinstance(part, AudioPart)]

    @property
    def _parts(self) -> list[Part]:
        return self.content if isinstance(self.content, list) else []


class StreamOptions(_Request):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class ResponseFormat(_Request):
    type: Literal["text"]


class ChatRequest(_Request):
    """OpenAI's chat request, extended by `aspect` and `rationale`, and by fields of vLLM."""

    model: str
    messages: list[Message] = Field(min_length=1)
    aspect: str | None = None
    rationale: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    logprob_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(None, max_length=128)
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    # accepted because clients send them by default; they have no effect
    n: Literal[1] | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_is_not_read(cls, content: Json) -> Json:
        """Leave out fields that are null, and the content of all messages but the post, the last one of the user, and
        the beginning of its answer."""
        content = {name: value for name, value in content.items() if value is not None}
        if isinstance(messages := content.get("messages"), list):
            history = [message if isinstance(message, dict) else {} for message in messages]
            post = max((n for n, message in enumerate(history) if message.get("role") == "user"), default=-1)
            begun = content.get("continue_final_message") is True
            content["messages"] = [
                {name: value for name, value in message.items() if name == "role"}
                if n != post and not (begun and n == len(messages) - 1) and isinstance(message, dict)
                else message
                for n, message in enumerate(messages)
            ]
        return content

    @property
    def limit(self) -> int | None:
        """Token limit of the answer."""
        return self.max_completion_tokens or self.max_tokens


class TokenizeRequest(_Request):
    """vLLM's request of `/tokenize`."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None


R = TypeVar("R", bound=_Request)


def read(kind: type[R], body: bytes) -> R:
    """Parse and validate a request body. Raises RequestError if it is not JSON, or a field is unknown or invalid."""
    try:
        content = _clean(json.loads(body))
    except (ValueError, RecursionError):
        raise RequestError(400, "the body is not valid JSON; send an object in UTF-8") from None
    if not isinstance(content, dict):
        raise RequestError(400, 'the body is not a JSON object; send one, such as {"text": "..."}')
    return _validated(kind, content)


def read_form(body: bytes, content_type: str) -> tuple[SentimentRequest, dict[str, bytes]]:
    """Parse a post in multipart/form-data: its fields, and the files of `image`, `video` and `audio`.

    Raises:
        RequestError: the body is no such form, or a field is unknown, repeated or invalid.
    """
    head = f"Content-Type: {content_type}\r\n\r\n".encode("latin-1", "replace")
    message = message_from_bytes(head + body, policy=policy.HTTP)
    fields: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    for part in message.iter_parts() if message.is_multipart() else ():
        name, data = str(part.get_param("name", "", "content-disposition")), part.get_payload(decode=True)
        if not name or not isinstance(data, bytes) or name in fields or name in files:
            break
        if name in ("image", "video", "audio") and part.get_filename() is not None:
            files[name] = data
        else:
            text = data.decode("utf-8", "replace")
            fields[name] = {"true": True, "false": False}.get(text, text) if name == "rationale" else text
    else:
        if fields or files:
            return _validated(SentimentRequest, fields), files
    raise RequestError(400, "the body is not a valid form; send each field once as multipart/form-data")


def _validated(kind: type[R], content: Json) -> R:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _validation_error(kind, content, error) from None


def _clean(value: Any) -> Any:
    """JSON with lone surrogates replaced, because they cannot be encoded as UTF-8."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {_clean(name): _clean(item) for name, item in value.items()}
    return value


def _validation_error(kind: type[_Request], content: Json, error: ValidationError) -> RequestError:
    """Return the error with the longest path: in a union type it belongs to the variant that was meant."""
    deepest = max(error.errors(include_url=False, include_context=False), key=lambda one: len(one["loc"]))
    names: list[str] = []
    value: Any = content
    for part in deepest["loc"]:  # pydantic's path contains the names of union variants, which are skipped
        if isinstance(value, list) and isinstance(part, int):
            value = value[part]
        elif isinstance(value, dict) and (part in value or deepest["type"] == "missing"):
            value = value.get(part)
        else:
            continue
        names.append(str(part))
    path = ".".join(names)[:200]
    if deepest["type"] == "missing":
        return RequestError(400, f"{path} is required", param=path)
    if deepest["type"] == "extra_forbidden":
        remedy = f"the fields are {', '.join(kind.model_fields)}" if len(names) == 1 else "leave it out"
        return RequestError(400, f"{path} is not a field; {remedy}", param=path)
    return RequestError(400, f"{path}: {deepest['msg'][0].lower()}{deepest['msg'][1:]}", param=path)


def model(name: str, created: int) -> Json:
    """The entry of one model in OpenAI's format."""
    return {"id": name, "object": "model", "created": created, "owned_by": "distill"}


def models(names: Sequence[str], created: int) -> Json:
    """The list of models in OpenAI's format."""
    return {"object": "list", "data": [model(name, created) for name in names]}


def completion(
    model: str, content: str, finish: str, usage: Json, *, logprobs: Json | None = None, extra: Json | None = None
) -> Json:
    """A chat completion with one choice and the `extra` fields."""
    message = {"role": "assistant", "content": content, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish}
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion", "created": int(time.time())}
    return head | {"model": model, "choices": [choice], "usage": usage} | (extra or {})


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """Token counts in OpenAI's format."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def logprobs(completion: Completion, top: bool) -> Json:
    """The log-probabilities of a completion in OpenAI's format, without its end token.

    Args:
        top: whether to include the most likely alternatives of each token.
    """

    def entry(text: str, logprob: float) -> Json:
        return {"token": text, "logprob": max(logprob, _MIN_LOGPROB), "bytes": list(text.encode())}

    tokens = completion.tokens[:-1] if completion.finished else completion.tokens
    content = [
        entry(token.text, token.logprob)
        | {"top_logprobs": [entry(*likely) for likely in token.top_logprobs.items()] if top else []}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def stream(completion: Json, pieces: Sequence[tuple[str, Json | None]], include_usage: bool) -> Iterator[str]:
    """A completion as server-sent events: text pieces with their log-probabilities, the final event, and the usage."""
    head = {name: completion[name] for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    choice = completion["choices"][0]
    extra_fields = {name: value for name, value in completion.items() if name not in ("choices", "usage", *head)}

    def event(delta: Json, finish: str | None = None, logprobs: Json | None = None, extra: Json | None = None) -> str:
        part = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return f"data: {json.dumps(head | {'choices': [part]} | (extra or {}))}\n\n"

    yield event({"role": "assistant", "content": ""})
    for piece, logprobs in pieces:
        yield event({"content": piece}, logprobs=logprobs)
    yield event({}, choice["finish_reason"], extra=extra_fields)
    if include_usage:
        yield f"data: {json.dumps(head | {'choices': [], 'usage': completion['usage']})}\n\n"
    yield "data: [DONE]\n\n"
