"""The server of `distill review`: routes, and the checks that only its own page may read posts and send decisions."""

import asyncio
import ipaddress
import json
import logging
import mimetypes
import socket
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any, get_args

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse

from distill.annotation.curation import Action
from distill.data.images import ImageError
from distill.errors import RunError, SettingsError
from distill.recipe import Recipe
from distill.review.posts import Filter, InvalidDecision, Posts, Status
from distill.serving.page import load_page
from distill.serving.server import run

log = logging.getLogger(__name__)

_MAX_BODY = 1_000_000  # bytes

_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def serve(recipe: Recipe, host: str, port: int) -> None:
    """Serve the page until SIGTERM or SIGINT.

    Args:
        port: 0 for a free one.

    Raises:
        SettingsError: the server cannot listen on the address, or the run cannot be reviewed.
    """
    with _listen(host, port) as listener:
        app = create_app(Posts(recipe), host)
        address, number = listener.getsockname()[:2]
        print(f"review of {recipe.name}: http://{_in_url(address)}:{number} (stop with Ctrl-C)", flush=True)
        run(Server(app), listener)


class Server(uvicorn.Server):
    """uvicorn that ends with the process' own exit status after a stop signal."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app, log_level="warning", access_log=False, log_config=None, server_header=False, ws="none",
                timeout_graceful_shutdown=1,
            )
        )  # fmt: skip

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a stop signal; uvicorn would raise it again after the shutdown."""
        self.should_exit = True


def create_app(posts: Posts, host: str) -> FastAPI:
    """The routes as an ASGI application.

    Args:
        host: the address that it is served on.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    page, policy = load_page("distill.review", "'self' data:", "'self'")
    hosts = {"localhost", socket.gethostname().lower(), host.lower()}

    @app.middleware("http")
    async def check(request: Request, handle: Callable[[Request], Awaitable[Response]]) -> Response:
        try:
            _check_origin(request, hosts)
            posts.refresh()
            reply = await handle(request)
        except (_RefusedError, InvalidDecision) as error:
            status = error.status if isinstance(error, _RefusedError) else 422
            reply = JSONResponse({"error": str(error)}, status)
        except (SettingsError, RunError) as error:
            reply = JSONResponse({"error": str(error)}, 500)
        reply.headers.update(_HEADERS)
        return reply

    async def show_page(request: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    async def list_posts(request: Request) -> Response:
        given = {name: value for name, value in request.query_params.items() if name in Filter.__dataclass_fields__}
        if given.get("status", "all") not in get_args(Status):
            raise _RefusedError(400, f"status takes {', '.join(get_args(Status))}")
        return JSONResponse(posts.overview() | {"ids": posts.select(Filter(**given))})  # type: ignore[arg-type]

    async def show_post(request: Request) -> Response:
        return JSONResponse(posts.show(_known(posts, request)))

    async def show_image(request: Request) -> Response:
        name, index = _known(posts, request), request.query_params.get("index", "")
        try:
            return Response(await asyncio.to_thread(posts.image, name, int(index)), media_type="image/jpeg")
        except (ValueError, IndexError, OSError) as error:  # ImageError among them
            reason = str(error) if isinstance(error, ImageError) else "the image cannot be read"
            raise _RefusedError(404, reason) from None

    async def show_clip(request: Request) -> Response:
        name, kind = _known(posts, request), request.query_params.get("kind", "")
        try:
            path = posts.clip(name, kind)
        except (KeyError, ValueError):  # ImageError among them
            raise _RefusedError(404, "there is no such clip") from None
        if not path.is_file():
            raise _RefusedError(404, "the clip is missing")
        guessed = mimetypes.guess_type(path.name)[0] or ""
        return FileResponse(path, media_type=guessed if guessed.startswith(("audio/", "video/")) else f"{kind}/mp4")

    async def decide(request: Request) -> Response:
        body = await _body(request)
        posts.decide(body["id"], body["action"], body["label"], body["rationale"])
        return JSONResponse(posts.overview() | {"post": posts.show(body["id"])})

    pages = {"/": show_page, "/posts": list_posts, "/post": show_post, "/image": show_image, "/clip": show_clip}
    for path, handler in pages.items():
        app.add_api_route(path, handler, response_model=None)
    app.add_api_route("/decide", decide, methods=["POST"], response_model=None)
    return app


class _RefusedError(Exception):
    """A request that is refused with a status and one sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _check_origin(request: Request, hosts: set[str]) -> None:
    """Refuse requests that another web page sends, or the page of another name that resolves to this address.

    A name that resolves to this address is not one of `hosts`, and a browser names the origin of every POST.
    """
    host = request.headers.get("host", "")
    name = host.lower().rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host.lower()
    if name not in hosts and not _is_address(name.strip("[]")):
        raise _RefusedError(403, "the Host header names another server")
    if request.method not in ("GET", "HEAD") and request.headers.get("origin") != f"http://{host}":
        raise _RefusedError(403, "decisions are only taken from this server's own page")
    if request.url.path != "/" and request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise _RefusedError(403, "another web page sent this request")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _known(posts: Posts, request: Request) -> str:
    """The id in a request, if it is that of a post."""
    name = request.query_params.get("id", "")
    if name not in posts.entries:
        raise _RefusedError(404, f"there is no post {name[:100]!r}")
    return name


async def _body(request: Request) -> dict[str, Any]:
    """The fields of a decision."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise _RefusedError(415, "a decision is JSON")
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > _MAX_BODY:
            raise _RefusedError(413, f"a decision has at most {_MAX_BODY:,} bytes")
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise _RefusedError(400, "the decision is not valid JSON") from None
    names = ("id", "action", "label", "rationale")
    if not isinstance(body, dict) or not set(body) <= set(names):
        raise _RefusedError(400, f"a decision has the fields {', '.join(names)}")
    body = {name: body.get(name) for name in names}
    for name, value in body.items():
        if not isinstance(value, str) and not (value is None and name in ("label", "rationale")):
            raise _RefusedError(400, f"{name} must be text")
    if body["action"] not in get_args(Action):
        raise _RefusedError(400, f"action takes {', '.join(get_args(Action))}")
    return body


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SettingsError(f"--host and --port: cannot listen on {_in_url(host)}:{port}: {reason}") from None


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
