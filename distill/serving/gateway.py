"""The HTTP gateway of student and teacher: what each of its routes does."""

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

from distill.cascade.cascade import CascadePolicy
from distill.data.clips import ClipReader
from distill.data.images import MAX_PIXELS
from distill.errors import SettingsError
from distill.models.reasoner import Reasoner, Sampling
from distill.serving import protocol
from distill.serving.admission import AdmissionControl
from distill.serving.cascade_service import CascadeService
from distill.serving.media import RequestMedia, Source, Sources
from distill.serving.metrics import Metrics
from distill.serving.page import load_page
from distill.serving.protocol import ChatRequest, Json, Message, RequestError, SentimentRequest, TokenizeRequest
from distill.serving.result import CascadeResult
from distill.serving.settings import ServeSettings
from distill.serving.tracing import Tracing
from distill.task import rationale
from distill.task.sample import Media, Sample

log = logging.getLogger(__name__)

Piece = tuple[str, Json | None]
"""A part of a streamed answer, with its log-probabilities."""

_TOKEN_BYTES = 4, 16  # bytes per token: typical, and the most that any text reaches


class Gateway:
    """The routes of one cascade.

    Args:
        policy: the policy of the cascade, calibrated for this student and teacher.
        teacher: None if there is no teacher; answers on which the student is uncertain are then marked `degraded`.
        name: model name of the cascade; the student alone is `NAME-student`.
        max_pixels: most pixels of an image.
        clips: decodes videos and sounds; None: with the default settings.
        tracing: traces of the requests; None: there are none.

    Raises:
        SettingsError: the environment variable that `api_key_env` names is not set.
    """

    def __init__(
        self,
        settings: ServeSettings,
        policy: CascadePolicy,
        student: Reasoner,
        teacher: Reasoner | None,
        name: str,
        max_pixels: int = MAX_PIXELS,
        clips: ClipReader | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.settings, self.name, self.labels = settings, name, policy.labels
        self.metrics, self.tracing = Metrics(), tracing or Tracing()
        self.admission = AdmissionControl(settings, self.metrics)
        self.cascade = CascadeService(settings, policy, student, teacher, self.metrics, self.tracing)
        self.media = RequestMedia(settings.image_hosts, int(settings.max_body_mb * 1e6), max_pixels, clips)
        self.created = int(time.time())
        self.warm = self.stopping = False
        self.page, self.page_policy = load_page("distill.serving", "blob: data:", "blob:")

    @property
    def models(self) -> list[str]:
        """Model names: the cascade and, if it is in this process, the student alone."""
        return [self.name, *([f"{self.name}-student"] if self.cascade.local else [])]

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Warm up the student on startup; end threads and connections on shutdown."""
        warming = asyncio.create_task(self._warm_up())
        yield
        self.stopping = True
        warming.cancel()
        await self.media.close()
        await asyncio.to_thread(self.cascade.close)
        await asyncio.to_thread(self.tracing.close)

    async def sentiment(self, request: Request) -> Response:
        """`POST /v1/sentiment`."""
        async with self.admission.admit(request) as admitted:
            body, sources = await _read_post(request, admitted.body)
            _, found = await self._classify(body.text, sources, body.aspect, body.rationale, admitted.deadline)
        return JSONResponse(found)

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        async with self.admission.admit(request) as admitted:
            body = protocol.read(ChatRequest, admitted.body)
            self._check_model(body.model)
            complete = self._cascade_completion if body.model == self.name else self._student_completion
            completion, pieces = await complete(body, admitted.deadline)
        if not body.stream:
            return JSONResponse(completion)
        usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(protocol.stream(completion, pieces, usage), media_type="text/event-stream")

    async def tokenize(self, request: Request) -> Response:
        """`POST /tokenize`, in vLLM's format."""
        async with self.admission.admit(request) as admitted:
            body = protocol.read(TokenizeRequest, admitted.body)
            if not self.cascade.local:
                message = "the student is behind an endpoint; send this request to that endpoint"
                raise RequestError(404, message)
            await self._check_length(body.prompt, admitted.deadline)
            tokens = await self.cascade.tokenize(body.prompt, admitted.deadline)
        return JSONResponse({"tokens": tokens, "count": len(tokens)})

    async def list_models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        self.admission.check_token(request)
        return JSONResponse(protocol.models(self.models, self.created))

    async def show_model(self, request: Request, model: str) -> Response:
        """`GET /v1/models/{model}`."""
        self.admission.check_token(request)
        self._check_model(model)
        return JSONResponse(protocol.model(model, self.created))

    async def live(self) -> Response:
        """`GET /health/live`."""
        return JSONResponse({"status": "alive"})

    async def readiness(self) -> Response:
        """`GET /health/ready` and `GET /health`."""
        status = "stopping" if self.stopping else "ready" if self.warm else "warming up"
        breaker = self.cascade.breaker
        teacher = {"teacher_breaker": breaker.state} if breaker else {}
        return JSONResponse({"status": status} | teacher, 200 if status == "ready" else 503)

    async def show_metrics(self) -> Response:
        """`GET /metrics`."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def show_page(self) -> Response:
        """`GET /`."""
        headers = {"Content-Security-Policy": self.page_policy, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(self.page, headers=headers | {"Referrer-Policy": "no-referrer"})

    def _check_model(self, name: str) -> None:
        if name not in self.models:
            message = f"{name[:100]} is not a model; the models are {', '.join(self.models)}"
            raise RequestError(404, message, param="model", code="model_not_found")

    async def _classify(
        self, text: str, sources: Sources, aspect: str | None, with_rationale: bool | None, deadline: float
    ) -> tuple[CascadeResult, Json]:
        """The result, also as JSON with the times of the frames of a video."""
        await self._check_length(text + (aspect or ""), deadline)
        async with self.media.stored(sources, deadline) as stored:
            media = stored.media
            self._check_post(text, media, "text")
            sample = Sample(
                uuid.uuid4().hex, text, media.images, (aspect or "").strip() or None,
                video=media.video, audio=media.audio,
            )  # fmt: skip
            reason = self.settings.rationale and with_rationale is not False
            result = await self.cascade.classify(sample, deadline, reason)
        self.metrics.decision(result.decision, result.teacher_calls)
        decision = result.decision
        self.tracing.note(
            label=result.label, stage=decision.stage, reason=decision.reason, deferred=decision.stage != "student",
            degraded=decision.degraded, teacher_calls=result.teacher_calls,
        )  # fmt: skip
        return result, self._result_json(result) | ({} if stored.times is None else {"frames": list(stored.times)})

    def _result_json(self, result: CascadeResult) -> Json:
        decision, prediction, found = result.decision, result.prediction, result.explanation.rationale
        value = {} if result.value is None else {"value": result.value}
        return {"label": result.label} | value | {
            "probabilities": dict(zip(self.labels.names, decision.probabilities.tolist(), strict=True)),
            "rationale": found and found.as_dict(),
            "rationale_by": result.explanation.by,
            "stage": decision.stage,
            "reason": decision.reason,
            "uncertainty": prediction.uncertainty,
            "degraded": decision.degraded,
            "teacher_calls": result.teacher_calls,
            "cost": vars(result.cost) | {"price": result.price},
        }  # fmt: skip

    async def _cascade_completion(self, body: ChatRequest, deadline: float) -> tuple[Json, list[Piece]]:
        """The cascade's result on the last user message, as a chat completion."""
        if body.logprobs or body.logprob_token_ids:
            message = f"{self.name} returns no logprobs; its label probabilities are in the field distill"
            raise RequestError(400, message, param="logprobs")
        if body.continue_final_message:
            raise RequestError(400, f"{self.name} continues no answer; leave it out", param="continue_final_message")
        post = next((message for message in reversed(body.messages) if message.role == "user"), None)
        if post is None:
            raise RequestError(400, "messages has no user message; send the post as one", param="messages")
        result, extra = await self._classify(post.text, _sources(post), body.aspect, body.rationale, deadline)
        found = result.explanation.rationale
        content = rationale.render(found) if found else f"{self.labels.wording.prefix} {result.label}"
        usage = protocol.usage(result.cost.prompt_tokens, result.cost.completion_tokens)
        completion = protocol.completion(body.model, content, "stop", usage, extra={"distill": extra})
        return completion, _split_words(content)

    async def _student_completion(self, body: ChatRequest, deadline: float) -> tuple[Json, list[Piece]]:
        """The student's own completion of the message."""
        message = self._single_message(body)
        beginning = body.messages[-1].text if body.continue_final_message else ""
        await self._check_length(message.text + beginning, deadline)
        ids = body.logprob_token_ids or []
        if ids and max(ids) >= self.cascade.vocabulary:
            raise RequestError(
                400, f"logprob_token_ids takes ids below {self.cascade.vocabulary}", param="logprob_token_ids"
            )
        sampling = Sampling(
            body.temperature or 0.0,
            min(body.limit or self.settings.max_new_tokens, self.settings.max_new_tokens),
            seed=uuid.uuid4().int >> 66 if body.seed is None else body.seed,
        )
        top = body.top_logprobs or 0
        async with self.media.stored(_sources(message), deadline) as stored:
            self._check_post(message.text, stored.media, "messages")
            n_logprobs = max(top, 1) if body.logprobs or ids else 0
            prompt = message.text, stored.media
            answer = await self.cascade.complete(prompt, sampling, n_logprobs, ids, deadline, beginning)
        usage = protocol.usage(answer.prompt_tokens, answer.completion_tokens)
        logprobs = protocol.logprobs(answer, top=top > 0 or bool(ids)) if n_logprobs else None
        finish = "stop" if answer.finished else "length"
        completion = protocol.completion(body.model, answer.text, finish, usage, logprobs=logprobs)
        words = _split_words(answer.text)
        return completion, [("", logprobs), *words] if logprobs else words

    def _single_message(self, body: ChatRequest) -> Message:
        neutral = {"top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "stop": [], "aspect": ""}
        for field, value in neutral.items():
            if getattr(body, field) not in (None, value):
                raise RequestError(400, f"{field} is not supported by {body.model}; leave it out", param=field)
        begun = bool(body.continue_final_message)
        if body.add_generation_prompt is begun:
            message = "add_generation_prompt must be false with continue_final_message, and true or left out without it"
            raise RequestError(400, message, param="add_generation_prompt")
        if [message.role for message in body.messages] != ["user", *["assistant"] * begun]:
            takes = "exactly one user message" + (" and the beginning of its answer" if begun else "")
            raise RequestError(400, f"{body.model} takes {takes}", param="messages")
        if body.top_logprobs and not body.logprobs:
            raise RequestError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return body.messages[0]

    def _check_post(self, text: str, media: Media, param: str) -> None:
        """Refuse a post of which the student reads nothing, or which has media that it was not trained for.

        With `model.images: false`, `model.video: ignore` or `model.audio: ignore` it leaves such media out.

        Raises:
            RequestError: with `param` as the field that is empty.
        """
        readable = bool(media)
        if self.cascade.local:
            reader = self.cascade.local.backbone.encoder.media
            for given, why, name in (
                (Media(media.images), "the student reads text only; send the post without images", "image"),
                (Media(video=media.video), "the student sees no pictures; send the post without video", "video"),
                (media, "the student cannot hear; send the post without sound", "audio"),
            ):
                try:
                    reader.check(given)
                except SettingsError:
                    raise RequestError(400, why, param=name) from None
            shown = (
                media.images and reader.images,
                media.video and reader.video != "ignore",
                media.audio and reader.audio,
            )
            readable = any(shown)
        if not text.strip() and not readable:
            name = "the message" if param == "messages" else param
            raise RequestError(400, f"{name} is empty; send a text, an image, a video or a sound", param=param)

    async def _check_length(self, text: str, deadline: float) -> None:
        """Raise RequestError if a text has too many tokens. Its bytes often decide without counting."""
        limit, size = self.settings.max_text_tokens, len(text.encode())
        if size <= limit:
            return
        count = size // _TOKEN_BYTES[0]
        if self.cascade.local and size <= limit * _TOKEN_BYTES[1]:
            count = len(await self.cascade.tokenize(text, deadline))
        if count > limit:
            raise RequestError(400, f"the text has more than {limit:,} tokens; send a shorter one", param="text")

    async def _warm_up(self) -> None:
        while not self.warm:
            try:
                await self.cascade.warm()
                self.warm = True
            except Exception as error:  # noqa: BLE001 - the gateway reports not ready until the student answers
                log.warning("the student is not ready: %s", error)
                await asyncio.sleep(2)


async def _read_post(request: Request, body: bytes) -> tuple[SentimentRequest, Sources]:
    """A post and its media, as JSON or as a form with uploaded files."""
    files: dict[str, bytes] = {}
    content_type = request.headers.get("content-type", "")
    if content_type.lower().startswith("multipart/form-data"):
        post, files = await asyncio.to_thread(protocol.read_form, body, content_type)
    else:
        post = protocol.read(SentimentRequest, body)
    given = {"image": post.image, "video": post.video, "audio": post.audio}
    named: dict[str, Source] = {name: value for name, value in given.items() if value and value.strip()}
    named |= files
    return post, Sources(*([named[name]] if name in named else [] for name in ("image", "video", "audio")))


def _sources(message: Message) -> Sources:
    return Sources(message.images, message.videos, message.sounds)


def _split_words(text: str) -> list[Piece]:
    """Split a text into the pieces in which it is streamed."""
    return [(word, None) for word in re.findall(r"\s*\S+|\s+$", text)]
