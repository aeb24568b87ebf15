"""The door of the gateway: who may come in, how many at once, with how much, and for how long."""

import asyncio
import hmac
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from distill.errors import SettingsError
from distill.serving.cascade_service import Overloaded, StudentUnavailable
from distill.serving.metrics import Metrics
from distill.serving.protocol import Refusal
from distill.serving.settings import ServeSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdmittedRequest:
    """A request that was let in: its body, and until when (of `time.monotonic`) its answer must be decided."""

    body: bytes
    by: float


class AdmissionControl:
    """Lets requests in, a bounded number at a time.

    Raises:
        SettingsError: the environment variable that `api_key_env` names is not set.
    """

    def __init__(self, settings: ServeSettings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._inside = 0
        self._key = os.environ.get(settings.api_key_env, "").strip().encode() if settings.api_key_env else None
        if self._key == b"":
            raise SettingsError(f"api_key_env: the environment variable {settings.api_key_env} is not set")

    def check_token(self, request: Request) -> None:
        """Raises Refusal without the token that is wanted."""
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        given = token.strip().encode("latin-1")
        if self._key is not None and not (hmac.compare_digest(given, self._key) and kind.lower() == "bearer"):
            message = "the token is missing or wrong; send it as Authorization: Bearer TOKEN"
            raise Refusal(401, message, code="invalid_api_key", WWW_Authenticate="Bearer")

    @asynccontextmanager
    async def admit(self, request: Request) -> AsyncIterator[AdmittedRequest]:
        """A request's body and deadline; the request counts as in the house until it leaves.

        Raises:
            Refusal: no token, a full house, a body too large or too slow, or a student who has not answered in time.
        """
        by = time.monotonic() + self._settings.answer_s
        self.check_token(request)
        if self._inside >= self._settings.queue:
            raise _busy(f"{self._inside} requests are in the house already")
        self._inside += 1
        self._metrics.in_flight.set(self._inside)
        try:
            yield AdmittedRequest(await self._body(request, by), by)
        except Overloaded as busy:
            raise _busy(str(busy)) from None
        except StudentUnavailable as error:
            raise Refusal(503, f"{error}; try again later", Retry_After="5") from None
        finally:
            self._inside -= 1
            self._metrics.in_flight.set(self._inside)

    async def _body(self, request: Request, by: float) -> bytes:
        limit = int(self._settings.max_body_mb * 1e6)
        too_large = Refusal(413, f"the body has more than {limit:,} bytes; send less", code="body_too_large")
        told = request.headers.get("content-length", "")
        if told.isdigit() and int(told) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(by - time.monotonic()):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise Refusal(408, "the body did not arrive in time; send it faster", Connection="close") from None
        except ClientDisconnect:
            raise Refusal(400, "the body ended early") from None
        return bytes(body)


def _busy(why: str) -> Refusal:
    return Refusal(429, f"{why}; try again in a second", code="rate_limit_exceeded", Retry_After="1")


class RequestMetricsMiddleware:
    """ASGI middleware: each answered request in the metrics, by its route; a fault of ours is an answer, too."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = time.monotonic(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception:
            log.exception("%s failed", scope["path"])
            if status:  # half an answer is out already
                raise
            fault = Refusal(500, "the gateway failed; its log says why")
            await JSONResponse(fault.body(), fault.status)(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.request(route, status, time.monotonic() - begin)
