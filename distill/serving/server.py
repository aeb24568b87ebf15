"""The gateway as a process: it listens, and ends in order when it is told to."""

import logging
import math
import signal
import socket
from types import FrameType

import uvicorn

from distill.cascade.cascade import Rules
from distill.data.images import MAX_PIXELS
from distill.errors import SettingsError
from distill.models.reasoner import Reasoner
from distill.serving.gateway import create_app
from distill.serving.settings import ServeSettings

log = logging.getLogger(__name__)

_BACKLOG = 2048
_IDLE_S = 5  # after which an idle connection is closed


def serve(
    settings: ServeSettings,
    rules: Rules,
    student: Reasoner,
    teacher: Reasoner | None,
    name: str,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Serve the pair until SIGTERM or SIGINT; what is in flight then is answered first. Arguments as `create_app`.

    Raises:
        SettingsError: the address cannot be listened on, or `api_key_env` names no variable.
    """
    server = Server(settings, rules, student, teacher, name, max_pixels)
    with _listen(settings) as listener:
        host, port = listener.getsockname()[:2]
        log.info("%s answers on http://%s:%d", name, f"[{host}]" if ":" in host else host, port)
        # uvicorn raises the signal that stopped it once more when all is done; an orderly end is no failure
        before = {number: signal.signal(number, server.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            server.run(sockets=[listener])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Server(uvicorn.Server):
    """uvicorn over the gateway; not ready any more from the moment it is told to stop."""

    def __init__(
        self,
        settings: ServeSettings,
        rules: Rules,
        student: Reasoner,
        teacher: Reasoner | None,
        name: str,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        app = create_app(settings, rules, student, teacher, name, max_pixels)
        self.gateway = app.state.gateway
        patience = math.ceil(settings.deadline_s) + 1
        super().__init__(
            uvicorn.Config(
                app,
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
