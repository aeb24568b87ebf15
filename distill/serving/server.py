"""The gateway as a process: it listens, and ends in order when it is told to."""

import logging
import math
import signal
import socket
from types import FrameType

import uvicorn

from distill.errors import SettingsError
from distill.serving.gateway import Gateway, create_app
from distill.serving.settings import ServeSettings

log = logging.getLogger(__name__)

_BACKLOG = 2048
_IDLE_S = 5  # after which an idle connection is closed


def serve(gateway: Gateway) -> None:
    """Serve until SIGTERM or SIGINT; what is in flight then is answered first.

    Raises:
        SettingsError: the address cannot be listened on.
    """
    server = Server(gateway)
    with _listen(gateway.settings) as listener:
        host, port = listener.getsockname()[:2]
        log.info("%s answers on http://%s:%d", gateway.name, f"[{host}]" if ":" in host else host, port)
        # uvicorn raises the signal that stopped it once more when all is done; an orderly end is no failure
        before = {number: signal.signal(number, server.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            server.run(sockets=[listener])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Server(uvicorn.Server):
    """uvicorn over the gateway; not ready any more from the moment it is told to stop."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway, settings = gateway, gateway.settings
        patience = math.ceil(settings.deadline_s) + 1
        super().__init__(
            uvicorn.Config(
                create_app(gateway),
                host=settings.host,
                port=settings.port,
                backlog=_BACKLOG,
                log_level="warning",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_keep_alive=_IDLE_S,
                timeout_graceful_shutdown=patience,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal to stop."""
        self.gateway.stopping = True
        super().handle_exit(sig, frame)


def _listen(settings: ServeSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        raise SettingsError(f"serve.host and serve.port: cannot listen on {where}: {error.strerror}") from None
