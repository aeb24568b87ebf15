"""The server process of the gateway: listening, slow connections, and graceful shutdown on SIGTERM and SIGINT."""

import asyncio
import logging
import math
import signal
import socket
from types import FrameType

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from distill.errors import SettingsError
from distill.serving.app import create_app
from distill.serving.gateway import Gateway
from distill.serving.settings import ServeSettings

log = logging.getLogger(__name__)

_BACKLOG = 2048
_IDLE_S = 5  # idle connections are closed after this


def serve(gateway: Gateway) -> None:
    """Serve until SIGTERM or SIGINT, then answer the requests in flight and return.

    Raises:
        SettingsError: the server cannot listen on the address.
    """
    server = Server(gateway)
    with _listen(gateway.settings) as listener:
        host, port = listener.getsockname()[:2]
        log.info("%s is served on http://%s:%d", gateway.name, f"[{host}]" if ":" in host else host, port)
        run(server, listener)


def run(server: uvicorn.Server, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT.

    uvicorn raises the signal again after the shutdown; with these handlers the process still exits with status 0.
    """
    before = {number: signal.signal(number, server.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Server(uvicorn.Server):
    """uvicorn with the gateway; the gateway reports not ready as soon as a stop signal arrives."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway, settings = gateway, gateway.settings
        shutdown_s = math.ceil(settings.deadline_s) + 1
        super().__init__(
            uvicorn.Config(
                create_app(gateway),
                host=settings.host,
                port=settings.port,
                backlog=_BACKLOG,
                log_level="warning",
                http=_protocol(settings.header_timeout_s),
                ws="none",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_keep_alive=_IDLE_S,
                timeout_graceful_shutdown=shutdown_s,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a stop signal."""
        self.gateway.stopping = True
        super().handle_exit(sig, frame)


def _protocol(header_timeout_s: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, which closes a connection whose request headers are not complete within the limit.

    The limit counts from the opening of the connection and, where the connection is reused, from the first byte of the
    next request; a connection that is idle between requests is closed by uvicorn.
    """

    class Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        header_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self.watch_headers()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.watch_headers()

        def connection_lost(self, error: Exception | None) -> None:
            super().connection_lost(error)
            self.stop_timer()

        def watch_headers(self) -> None:
            """Start the timer if a request is expected and the timer is not running; stop it if a request runs."""
            if self.cycle is not None and not self.cycle.response_complete:
                self.stop_timer()
            elif self.header_timer is None and not self.transport.is_closing():
                self.header_timer = self.loop.call_later(header_timeout_s, self.transport.abort)

        def stop_timer(self) -> None:
            if self.header_timer is not None:
                self.header_timer.cancel()
                self.header_timer = None

    return Protocol


def _listen(settings: ServeSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        raise SettingsError(f"serve.host and serve.port: cannot listen on {where}: {error.strerror}") from None
