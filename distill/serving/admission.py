"""Admission control of the gateway: authentication, concurrency limit, body size and deadlines."""

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
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from distill.errors import SettingsError
from distill.serving.cascade_service import Overloaded, StudentUnavailable
from distill.serving.metrics import Metrics
from distill.serving.protocol import RequestError
from distill.serving.settings import ServeSettings
from distill.serving.tracing import Tracing

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdmittedRequest:
    """An admitted request: its body, and the deadline of its result on the clock of `time.monotonic`."""

    body: bytes
    deadline: float


class AdmissionControl:
    """Admits a bounded number of concurrent requests.

    Raises:
        SettingsError: the environment variable that `api_key_env` names is not set.
    """

    def __init__(self, settings: ServeSettings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._in_flight = 0
        self._key = os.environ.get(settings.api_key_env, "").strip().encode() if settings.api_key_env else None
        if self._key == b"":
            raise SettingsError(f"api_key_env: the environment variable {settings.api_key_env} is not set")

    def check_token(self, request: Request) -> None:
        """Raise RequestError (401) if a bearer token is required and the request has not the right one."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        key = token.strip().encode("latin-1")
        if self._key is not None and not (hmac.compare_digest(key, self._key) and scheme.lower() == "bearer"):
            message = "the token is missing or wrong; send it as Authorization: Bearer TOKEN"
            raise RequestError(401, message, code="invalid_api_key", WWW_Authenticate="Bearer")

    @asynccontextmanager
    async def admit(self, request: Request) -> AsyncIterator[AdmittedRequest]:
        """Admit a request and read its body. It counts as in flight until the context ends.

        Raises:
            RequestError: wrong token (401), body not received in time (408), body too large (413), too many requests in
                flight or a student that did not answer in time (429), or a student that is not available (503).
        """
        deadline = time.monotonic() + self._settings.answer_s
        self.check_token(request)
        if self._in_flight >= self._settings.queue:
            raise _overload_error(f"{self._in_flight} requests are already in flight")
        self._in_flight += 1
        self._metrics.in_flight.set(self._in_flight)
        try:
            yield AdmittedRequest(await self._read_body(request, deadline), deadline)
        except Overloaded as error:
            raise _overload_error(str(error)) from None
        except StudentUnavailable as error:
            raise RequestError(503, f"{error}; try again later", Retry_After="5") from None
        finally:
            self._in_flight -= 1
            self._metrics.in_flight.set(self._in_flight)

    async def _read_body(self, request: Request, deadline: float) -> bytes:
        limit = int(self._settings.max_body_mb * 1e6)
        too_large = RequestError(413, f"the body has more than {limit:,} bytes; send less", code="body_too_large")
        content_length = request.headers.get("content-length", "")
        if content_length.isdigit() and int(content_length) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise RequestError(408, "the body did not arrive in time; send it faster", Connection="close") from None
        except ClientDisconnect:
            raise RequestError(400, "the body is incomplete: the client closed the connection") from None
        return bytes(body)


def _overload_error(reason: str) -> RequestError:
    return RequestError(429, f"{reason}; try again in a second", code="rate_limit_exceeded", Retry_After="1")


class RequestMetricsMiddleware:
    """ASGI middleware: records status and latency of each request by route, and answers internal errors with 500.

    A request that posts something is traced.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing) -> None:
        self._app, self._metrics, self._tracing = app, metrics, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = time.monotonic(), 0

        async def send_and_record(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if scope["method"] == "POST":
                with self._tracing.request("POST", scope["path"], dict(Headers(scope=scope))) as record:
                    await self._app(scope, receive, send_and_record)
                    record(status)
            else:
                await self._app(scope, receive, send_and_record)
        except Exception:
            log.exception("%s failed", scope["path"])
            if status:  # a part of the response was already sent
                raise
            error = RequestError(500, "internal error of the gateway; its log has the traceback")
            await JSONResponse(error.body(), error.status)(scope, receive, send_and_record)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.request(route, status, time.monotonic() - begin)
