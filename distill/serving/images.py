"""Images of requests: decoded from base64 or fetched from an allowed host, checked, and stored for one request."""

import asyncio
import base64
import binascii
import re
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import urllib3
from urllib3.exceptions import ConnectTimeoutError, HTTPError, LocationParseError, NewConnectionError, ReadTimeoutError
from urllib3.util import Url, parse_url

from distill.connections import BodyTooLarge, connection_pool, read_body
from distill.data.images import FORMATS, ImageError, decode
from distill.serving.protocol import RequestError

MAX_IMAGES = 8
"""Maximum number of images in one post."""

MAX_SIDE = 2048
"""Longest side of a stored image, in pixels; larger images are scaled down."""

_FETCH_S = 10.0
_IDLE_CONNECTIONS = 256  # per host
_PORTS = {"http": 80, "https": 443}
_DATA = re.compile(r"data:[\w/+.-]*(?:;[\w=.-]+)*;base64,", re.IGNORECASE)
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):", re.IGNORECASE)


class RequestImages:
    """Temporary storage of the images of requests.

    Args:
        hosts: hosts from which images may be fetched, each as host or host:port; redirects are not followed.
        max_bytes: largest file of a fetched image.
        max_pixels: most pixels of an image, read from its header before it is decoded.
    """

    def __init__(self, hosts: Sequence[str], max_bytes: int, max_pixels: int) -> None:
        self._hosts = {host.lower() for host in hosts}
        self._max_bytes, self._max_pixels = max_bytes, max_pixels
        self._pools: dict[tuple[str | None, str], urllib3.PoolManager] = {}  # one for each scheme and allowed host
        self._decoders = ThreadPoolExecutor(2, "decode")  # few, because a decoded image may need much memory

    async def close(self) -> None:
        """Close the idle connections and end the decoders."""
        self._decoders.shutdown(wait=False, cancel_futures=True)
        for pool in list(self._pools.values()):  # threads may add one
            pool.clear()

    @asynccontextmanager
    async def stored(self, sources: Sequence[str], deadline: float) -> AsyncIterator[tuple[Path, ...]]:
        """Store the images in files, which are deleted when the context ends.

        Args:
            sources: `data:` URIs, bare base64, or http(s) URLs of allowed hosts.
            deadline: until when the files must be stored, on the clock of `time.monotonic`.

        Raises:
            RequestError: an image is invalid, too large, not allowed, or not available in time.
        """
        if not sources:
            yield ()
            return
        if len(sources) > MAX_IMAGES:
            raise RequestError(400, f"a post takes at most {MAX_IMAGES} images; send fewer", param="image")
        with tempfile.TemporaryDirectory(prefix="distill-") as folder:
            paths = tuple(Path(folder) / str(number) for number in range(1, len(sources) + 1))
            for source, path in zip(sources, paths, strict=True):
                path.write_bytes(await self._content(source, deadline))
                checked = asyncio.get_running_loop().run_in_executor(self._decoders, _check, path, self._max_pixels)
                try:
                    await asyncio.wait_for(checked, max(deadline - time.monotonic(), 0))
                except ImageError as error:
                    remedy = f"send a complete {', '.join(FORMATS)} of at most {self._max_pixels:,} pixels"
                    raise RequestError(400, f"{error}; {remedy}", param="image") from None
                except TimeoutError:
                    message = "the image took too long to decode; send a smaller one"
                    raise RequestError(429, message, Retry_After="1") from None
            yield paths

    async def _content(self, source: str, deadline: float) -> bytes:
        if prefix := _DATA.match(source):
            return _decode_base64(source[prefix.end() :])
        scheme = _SCHEME.match(source)
        if scheme is None:
            return _decode_base64(source)
        if scheme[1].lower() not in ("http", "https"):
            message = f"image: this {scheme[1][:20]}: URI is not supported; send a data: URI with base64"
            raise RequestError(400, message, param="image")
        return await self._fetch(source, deadline)

    async def _fetch(self, source: str, deadline: float) -> bytes:
        try:
            url = parse_url(source)
        except LocationParseError:
            url = Url()
        if not url.host:
            raise RequestError(400, "image is not a valid URL; send a data: URI with base64", param="image")
        host = url.host if url.port in (None, _PORTS[url.scheme or "http"]) else f"{url.host}:{url.port}"
        if host.lower() not in self._hosts or url.auth:
            raise RequestError(400, f"image: images from {host[:100]} are refused; send a data: URI", param="image")
        end = min(deadline, time.monotonic() + _FETCH_S)
        fetched: Future[bytes] = Future()
        fetched.set_running_or_notify_cancel()  # from here on only the thread ends it
        # One thread per fetch, so that a slow host delays no other fetch; a daemon, so that it does not delay the exit.
        threading.Thread(target=self._get, args=(fetched, source, url, host, end), name="fetch", daemon=True).start()
        try:
            return await asyncio.wait_for(asyncio.wrap_future(fetched), max(end - time.monotonic(), 0))
        except BodyTooLarge:
            message = f"image has more than {self._max_bytes:,} bytes; send a smaller one"
            raise RequestError(413, message, param="image") from None
        except (HTTPError, TimeoutError) as error:
            refused = isinstance(error, NewConnectionError)  # a subclass of ConnectTimeoutError
            slow = not refused and isinstance(error, TimeoutError | ReadTimeoutError | ConnectTimeoutError)
            reason = "takes too long" if slow else "cannot be reached"
            raise RequestError(400, f"image: {host} {reason}; send the image itself", param="image") from None

    def _get(self, fetched: "Future[bytes]", source: str, url: Url, host: str, deadline: float) -> None:
        """Set `fetched` to the content of an image. Runs on a thread of its own."""
        try:
            fetched.set_result(self._download(source, url, host, deadline))
        except BaseException as error:  # noqa: BLE001 - raised where the fetch is awaited
            fetched.set_exception(error)

    def _download(self, source: str, url: Url, host: str, deadline: float) -> bytes:
        """The content of an image. May take longer than the deadline if the host sends its headers byte by byte."""
        key = (url.scheme, host)
        if key not in self._pools:
            self._pools[key] = connection_pool(source, _IDLE_CONNECTIONS)
        pool = self._pools[key]
        seconds, accept = max(deadline - time.monotonic(), 0.001), {"Accept": "image/*"}
        with pool.urlopen(
            "GET", source, headers=accept, timeout=seconds, redirect=False, preload_content=False
        ) as response:
            if response.status != 200:
                message = f"image: {host} returned status {response.status}; send the image itself"
                raise RequestError(400, message, param="image")
            return read_body(response, deadline, self._max_bytes)


def _check(path: Path, max_pixels: int) -> None:
    """Decode an image once, and scale its file down if it is larger than the models need. Raises ImageError."""
    image = decode(path, max_pixels)
    if max(image.size) > MAX_SIDE:
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        image.save(path, "PNG", compress_level=1)


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        remedy = "send a data: URI such as data:image/png;base64,..."
        raise RequestError(400, f"image is not valid base64; {remedy}", param="image") from None
