"""The gateway: OpenAI's routes and a plain one in front of student and teacher, and a page to try them on."""

import asyncio
import base64
import contextlib
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from hashlib import sha256
from importlib import resources

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from distill.cascade.cascade import CascadePolicy
from distill.data.images import MAX_PIXELS
from distill.models.reasoner import Reasoner, Sampling
from distill.serving import protocol
from distill.serving.admission import AdmissionControl, RequestMetricsMiddleware
from distill.serving.cascade_service import CascadeResult, CascadeService
from distill.serving.images import RequestImages
from distill.serving.metrics import Metrics
from distill.serving.protocol import ChatRequest, Json, Message, Refusal, SentimentRequest, TokenizeRequest
from distill.serving.settings import ServeSettings
from distill.task import rationale
from distill.task.prompts import CLASSIFY_PREFIX
from distill.task.sample import Sample

log = logging.getLogger(__name__)

Piece = tuple[str, Json | None]
"""A part of a streamed answer, with its log-probabilities."""

_BYTES = 4, 16  # of a token: usual, and the most that any text can hope for


class Gateway:
    """The routes, over one pair.

    Args:
        policy: of the cascade, with the calibration of this very pair.
        teacher: None where there is none; what the student is not certain of is then flagged `degraded`.
        name: under which the pair is offered as a model; the student alone is `NAME-student`.
        max_pixels: of a picture.

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
    ) -> None:
        self.settings, self.name, self.labels = settings, name, policy.labels
        self.metrics = Metrics()
        self.house = AdmissionControl(settings, self.metrics)
        self.cascade = CascadeService(settings, policy, student, teacher, self.metrics)
        self.pictures = RequestImages(settings.image_hosts, int(settings.max_body_mb * 1e6), max_pixels)
        self.created = int(time.time())
        self.warm = self.stopping = False
        self.page, self.policy = _page()

    @property
    def models(self) -> list[str]:
        """The pair and, where it is in this process, the student alone."""
        return [self.name, *([f"{self.name}-student"] if self.cascade.local else [])]

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """From the first connection to the last."""
        warming = asyncio.create_task(self._warm())
        yield
        self.stopping = True
        warming.cancel()
        await self.pictures.close()
        await asyncio.to_thread(self.cascade.close)

    async def sentiment(self, request: Request) -> Response:
        """`POST /v1/sentiment`."""
        async with self.house.admit(request) as visit:
            asked = protocol.read(SentimentRequest, visit.body)
            images = [] if asked.image is None else [asked.image]
            verdict = await self._judge(asked.text, images, asked.aspect, asked.rationale, visit.by)
        return JSONResponse(self._described(verdict))

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        async with self.house.admit(request) as visit:
            asked = protocol.read(ChatRequest, visit.body)
            if asked.model not in self.models:
                message = f"{asked.model[:100]} is not a model; the models are {', '.join(self.models)}"
                raise Refusal(404, message, param="model", code="model_not_found")
            answer = self._pair_says if asked.model == self.name else self._student_says
            whole, pieces = await answer(asked, visit.by)
        if not asked.stream:
            return JSONResponse(whole)
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return StreamingResponse(protocol.stream(whole, pieces, usage), media_type="text/event-stream")

    async def tokenize(self, request: Request) -> Response:
        """`POST /tokenize`, as vLLM has it."""
        async with self.house.admit(request) as visit:
            asked = protocol.read(TokenizeRequest, visit.body)
            if not self.cascade.local:
                raise Refusal(404, "the student is behind an endpoint of its own; ask that one for its tokens")
            await self._check_length(asked.prompt, visit.by)
            tokens = await self.cascade.tokenize(asked.prompt, visit.by)
        return JSONResponse({"tokens": tokens, "count": len(tokens)})

    async def list_models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        self.house.check_token(request)
        return JSONResponse(protocol.models(self.models, self.created))

    async def live(self) -> Response:
        """`GET /health/live`."""
        return JSONResponse({"status": "alive"})

    async def readiness(self) -> Response:
        """`GET /health/ready`."""
        status = "stopping" if self.stopping else "ready" if self.warm else "warming up"
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    async def show_metrics(self) -> Response:
        """`GET /metrics`."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def show_page(self) -> Response:
        """`GET /`."""
        headers = {"Content-Security-Policy": self.policy, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(self.page, headers=headers | {"Referrer-Policy": "no-referrer"})

    async def _judge(
        self, text: str, images: Sequence[str], aspect: str | None, wanted: bool | None, by: float
    ) -> CascadeResult:
        if not text.strip() and not images:
            raise Refusal(400, "text is empty; send the text of a post, a picture, or both", param="text")
        await self._check_length(text + (aspect or ""), by)
        async with self.pictures.kept(images, by) as paths:
            sample = Sample(uuid.uuid4().hex, text, paths, (aspect or "").strip() or None)
            verdict = await self.cascade.judge(sample, by, self.settings.rationale and wanted is not False)
        self.metrics.decision(verdict.decision)
        return verdict

    def _described(self, verdict: CascadeResult) -> Json:
        decision, prediction, why = verdict.decision, verdict.prediction, verdict.rationale
        value = {} if verdict.value is None else {"value": verdict.value}
        return {"label": verdict.label} | value | {
            "probabilities": dict(zip(self.labels.names, decision.probabilities.tolist(), strict=True)),
            "rationale": why and dict(zip(rationale.FIELDS, vars(why).values(), strict=True)),
            "stage": decision.stage,
            "reason": decision.reason,
            "uncertainty": prediction.uncertainty,
            "degraded": decision.degraded,
            "teacher_calls": decision.teacher_calls,
            "cost": vars(verdict.cost) | {"price": verdict.price},
        }  # fmt: skip

    async def _pair_says(self, asked: ChatRequest, by: float) -> tuple[Json, list[Piece]]:
        """The pair's verdict on the last user's message, as a chat completion."""
        if asked.logprobs or asked.logprob_token_ids:
            message = f"{self.name} gives no logprobs; its label probabilities are in the field distill"
            raise Refusal(400, message, param="logprobs")
        post = next((message for message in reversed(asked.messages) if message.role == "user"), None)
        if post is None:
            raise Refusal(400, "messages has no user message; send the post as one", param="messages")
        verdict = await self._judge(post.text, post.images, asked.aspect, asked.rationale, by)
        why = verdict.rationale
        content = rationale.render(why) if why else f"{CLASSIFY_PREFIX} {verdict.label}"
        usage = protocol.usage(verdict.cost.prompt_tokens, verdict.cost.completion_tokens)
        extra = {"distill": self._described(verdict)}
        whole = protocol.completion(asked.model, content, "stop", usage, extra=extra)
        return whole, _words(content)

    async def _student_says(self, asked: ChatRequest, by: float) -> tuple[Json, list[Piece]]:
        """The student's own answer to the message, verbatim."""
        message = self._only_message(asked)
        await self._check_length(message.text, by)
        ids = asked.logprob_token_ids or []
        if ids and max(ids) >= self.cascade.vocabulary:
            raise Refusal(
                400, f"logprob_token_ids takes ids below {self.cascade.vocabulary}", param="logprob_token_ids"
            )
        sampling = Sampling(
            asked.temperature or 0.0,
            min(asked.limit or self.settings.max_new_tokens, self.settings.max_new_tokens),
            seed=uuid.uuid4().int >> 66 if asked.seed is None else asked.seed,
        )
        top = asked.top_logprobs or 0
        async with self.pictures.kept(message.images, by) as paths:
            watched = max(top, 1) if asked.logprobs or ids else 0
            found = await self.cascade.complete((message.text, paths), sampling, watched, ids, by)
        usage = protocol.usage(found.prompt_tokens, found.completion_tokens)
        tokens = protocol.logprobs(found, tops=top > 0 or bool(ids)) if watched else None
        finish = "stop" if found.finished else "length"
        whole = protocol.completion(asked.model, found.text, finish, usage, logprobs=tokens)
        return whole, [("", tokens), *_words(found.text)] if tokens else _words(found.text)

    def _only_message(self, asked: ChatRequest) -> Message:
        neutral = {"top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "stop": [], "aspect": ""}
        for field, value in neutral.items():
            if getattr(asked, field) not in (None, value):
                raise Refusal(400, f"{field} is nothing that {asked.model} knows; leave it out", param=field)
        if len(asked.messages) != 1 or asked.messages[0].role != "user":
            raise Refusal(400, f"{asked.model} takes one user message and no others", param="messages")
        if not asked.messages[0].text.strip() and not asked.messages[0].images:
            raise Refusal(400, "the message is empty; send a text, a picture, or both", param="messages")
        if asked.top_logprobs and not asked.logprobs:
            raise Refusal(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return asked.messages[0]

    async def _check_length(self, text: str, by: float) -> None:
        """Raises Refusal for a text of too many tokens; a text of few bytes is not even counted."""
        most, size = self.settings.max_text_tokens, len(text.encode())
        if size <= most:
            return
        count = size // _BYTES[0]
        if self.cascade.local and size <= most * _BYTES[1]:
            count = len(await self.cascade.tokenize(text, by))
        if count > most:
            raise Refusal(400, f"the text has more than {most:,} tokens; send a shorter one", param="text")

    async def _warm(self) -> None:
        while not self.warm:
            try:
                await self.cascade.warm()
                self.warm = True
            except Exception as error:  # noqa: BLE001 - nothing is ready while the student cannot answer
                log.warning("the student is not ready: %s", error)
                await asyncio.sleep(2)


def create_app(gateway: Gateway) -> FastAPI:
    """The gateway as an ASGI application."""
    app = FastAPI(lifespan=gateway.lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(RequestMetricsMiddleware, metrics=gateway.metrics)
    for method, path, handler in (
        ("GET", "/", gateway.show_page),
        ("GET", "/health/live", gateway.live),
        ("GET", "/health/ready", gateway.readiness),
        ("GET", "/metrics", gateway.show_metrics),
        ("GET", "/v1/models", gateway.list_models),
        ("POST", "/v1/sentiment", gateway.sentiment),
        ("POST", "/v1/chat/completions", gateway.chat),
        ("POST", "/tokenize", gateway.tokenize),
    ):
        app.add_api_route(path, handler, methods=[method], response_model=None)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _refused)
    return app


async def _refused(request: Request, error: Exception) -> Response:
    """Every refusal in OpenAI's shape."""
    if isinstance(error, HTTPException):
        asked = f"{request.method} {request.url.path[:100]}"
        message = f"{asked} is not served here; the README names what is"
        return JSONResponse(Refusal(error.status_code, message).body(), error.status_code, headers=error.headers)
    assert isinstance(error, Refusal)
    return JSONResponse(error.body(), error.status, headers=error.headers)


def _words(text: str) -> list[Piece]:
    """A text in the pieces in which it is streamed."""
    return [(word, None) for word in re.findall(r"\s*\S+|\s+$", text)]


def _page() -> tuple[str, str]:
    """The page, and the policy that lets nothing but its own style and script run."""
    page = (resources.files(__package__) / "page.html").read_text(encoding="utf-8")

    def allowed(tag: str) -> str:
        content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return f"'sha256-{base64.b64encode(sha256(content.encode()).digest()).decode()}'"

    return page, (
        f"default-src 'none'; style-src {allowed('style')}; script-src {allowed('script')}; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
