"""Images of requests: decoded from base64 or fetched from an allowed host, checked, and kept for one request."""

import asyncio
import base64
import binascii
import re
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import urllib3
from urllib3.exceptions import ConnectTimeoutError, HTTPError, LocationParseError, NewConnectionError, ReadTimeoutError
from urllib3.util import Url, parse_url

from distill.connections import BodyTooLarge, connection_pool, read_body
from distill.data.images import FORMATS, ImageError, decode
from distill.serving.protocol import Refusal

MAX_IMAGES = 8
"""Maximum number of images in one post."""

MAX_SIDE = 2048
"""Longest side of a stored image, in pixels; larger images are scaled down."""

_FETCH_S = 10.0
_FETCHES = 8  # at a time
_PORTS = {"http": 80, "https": 443}
_DATA = re.compile(r"data:[\w/+.-]*(?:;[\w=.-]+)*;base64,", re.IGNORECASE)
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):", re.IGNORECASE)


class RequestImages:
    """Where the pictures of requests lie while they are answered.

    Args:
        hosts: from which pictures may be fetched, each as host or host:port; redirects are not followed.
        max_bytes: size of a picture as a file.
        max_pixels: read from the header, before anything is decoded.
    """

    def __init__(self, hosts: Sequence[str], max_bytes: int, max_pixels: int) -> None:
        self._hosts = {host.lower() for host in hosts}
        self._max_bytes, self._max_pixels = max_bytes, max_pixels
        self._pools: dict[tuple[str | None, str], urllib3.PoolManager] = {}  # one for each scheme and allowed host
        self._fetchers = ThreadPoolExecutor(_FETCHES, "fetch")
        self._decoders = ThreadPoolExecutor(2, "decode")  # decoding an image may take much memory

    async def close(self) -> None:
        """Close the connections and end the threads."""
        for executor in (self._fetchers, self._decoders):
            executor.shutdown(wait=False, cancel_futures=True)
        for pool in self._pools.values():
            pool.clear()

    @asynccontextmanager
    async def kept(self, sources: Sequence[str], by: float) -> AsyncIterator[tuple[Path, ...]]:
        """Files of the pictures, gone on leaving.

        Args:
            sources: `data:` URIs, bare base64, or http(s) URLs of the allowed hosts.
            by: until when (of `time.monotonic`) they must be there.

        Raises:
            Refusal: something in them cannot or must not be used.
        """
        if not sources:
            yield ()
            return
        if len(sources) > MAX_IMAGES:
            raise Refusal(400, f"a post takes {MAX_IMAGES} pictures at most; send fewer", param="image")
        with tempfile.TemporaryDirectory(prefix="distill-") as folder:
            paths = tuple(Path(folder) / str(number) for number in range(1, len(sources) + 1))
            for source, path in zip(sources, paths, strict=True):
                path.write_bytes(await self._content(source, by))
                checked = asyncio.get_running_loop().run_in_executor(self._decoders, _check, path, self._max_pixels)
                try:
                    await asyncio.wait_for(checked, max(by - time.monotonic(), 0))
                except ImageError as error:
                    takes = f"send a whole {', '.join(FORMATS)} of at most {self._max_pixels:,} pixels"
                    raise Refusal(400, f"{error}; {takes}", param="image") from None
                except TimeoutError:
                    raise Refusal(
                        429, "the picture took too long to decode; send a smaller one", Retry_After="1"
                    ) from None
            yield paths

    async def _content(self, source: str, by: float) -> bytes:
        if found := _DATA.match(source):
            return _base64(source[found.end() :])
        scheme = _SCHEME.match(source)
        if scheme is None:
            return _base64(source)
        if scheme[1].lower() not in ("http", "https"):
            raise Refusal(400, f"image: {scheme[1][:20]}: is refused; send a data: URI with base64", param="image")
        return await self._fetch(source, by)

    async def _fetch(self, source: str, deadline: float) -> bytes:
        try:
            url = parse_url(source)
        except LocationParseError:
            url = Url()
        if not url.host:
            raise Refusal(400, "image is not a usable URL; send a data: URI with base64", param="image")
        host = url.host if url.port in (None, _PORTS[url.scheme or "http"]) else f"{url.host}:{url.port}"
        if host.lower() not in self._hosts or url.auth:
            raise Refusal(400, f"image: images from {host[:100]} are refused; send a data: URI", param="image")
        end = min(deadline, time.monotonic() + _FETCH_S)
        fetched = asyncio.get_running_loop().run_in_executor(self._fetchers, self._get, source, url, host, end)
        try:
            return await asyncio.wait_for(fetched, max(end - time.monotonic(), 0))
        except BodyTooLarge:
            raise Refusal(413, f"image has more than {self._max_bytes:,} bytes; send less", param="image") from None
        except (HTTPError, TimeoutError) as error:
            refused = isinstance(error, NewConnectionError)  # a subclass of ConnectTimeoutError
            slow = not refused and isinstance(error, TimeoutError | ReadTimeoutError | ConnectTimeoutError)
            why = "takes too long" if slow else "cannot be reached"
            raise Refusal(400, f"image: {host} {why}; send the image itself", param="image") from None

    def _get(self, source: str, url: Url, host: str, deadline: float) -> bytes:
        """The body of one image; runs on a thread, for no longer than its deadline allows."""
        key = (url.scheme, host)
        if key not in self._pools:
            self._pools[key] = connection_pool(source, _FETCHES)
        pool = self._pools[key]
        seconds, accept = max(deadline - time.monotonic(), 0.001), {"Accept": "image/*"}
        with pool.urlopen(
            "GET", source, headers=accept, timeout=seconds, redirect=False, preload_content=False
        ) as response:
            if response.status != 200:
                raise Refusal(400, f"image: {host} answers {response.status} without an image", param="image")
            return read_body(response, deadline, self._max_bytes)


def _check(path: Path, max_pixels: int) -> None:
    """Decode a picture once at its full size; a large one is kept smaller, for all who decode it after. ImageError."""
    picture = decode(path, max_pixels)
    if max(picture.size) > MAX_SIDE:
        picture.thumbnail((MAX_SIDE, MAX_SIDE))
        picture.save(path, "PNG", compress_level=1)


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        takes = "send a data: URI such as data:image/png;base64,..."
        raise Refusal(400, f"image is not valid base64; {takes}", param="image") from None
