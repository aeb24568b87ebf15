"""Pictures as requests bring them: read from base64 or fetched from an allowed host, checked, kept for the request."""

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

import httpx

from distill.data.images import FORMATS, ImageError, decode
from distill.serving.protocol import Refusal

MOST = 8
"""Most pictures of one post."""

LARGE = 2048
"""Longest side, in pixels, that a picture is kept with."""

_FETCH_S = 10.0
_DATA = re.compile(r"data:[\w/+.-]*(?:;[\w=.-]+)*;base64,", re.IGNORECASE)
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):", re.IGNORECASE)


class Pictures:
    """Where the pictures of requests lie while they are answered.

    Args:
        hosts: from which pictures may be fetched, each as host or host:port; redirects are not followed.
        max_bytes: size of a picture as a file.
        max_pixels: read from the header, before anything is decoded.
    """

    def __init__(self, hosts: Sequence[str], max_bytes: int, max_pixels: int) -> None:
        self._hosts = {host.lower() for host in hosts}
        self._max_bytes, self._max_pixels = max_bytes, max_pixels
        self._client = httpx.AsyncClient(follow_redirects=False, timeout=_FETCH_S)
        self._decoders = ThreadPoolExecutor(2, "pictures")  # a picture may take much memory while it is decoded

    async def close(self) -> None:
        """Close the connections and end the threads."""
        await self._client.aclose()
        self._decoders.shutdown()

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
        if len(sources) > MOST:
            raise Refusal(400, f"a post takes {MOST} pictures at most; send fewer", param="image")
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

    async def _fetch(self, source: str, by: float) -> bytes:
        try:
            url = httpx.URL(source)
        except (httpx.InvalidURL, ValueError):
            raise Refusal(400, "image is not a usable URL; send a data: URI with base64", param="image") from None
        if url.netloc.decode("ascii", "replace").lower() not in self._hosts or url.userinfo:
            raise Refusal(400, f"image: pictures from {url.host[:100]} are refused; send a data: URI", param="image")
        content = bytearray()
        try:
            async with (
                asyncio.timeout(min(by - time.monotonic(), _FETCH_S)),
                self._client.stream("GET", url, headers={"Accept": "image/*"}) as response,
            ):
                if response.status_code != 200:
                    raise Refusal(
                        400, f"image: {url.host} answers {response.status_code}, and no picture", param="image"
                    )
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > self._max_bytes:
                        raise Refusal(413, f"image has more than {self._max_bytes:,} bytes; send less", param="image")
        except (httpx.HTTPError, TimeoutError) as error:
            why = "takes too long" if isinstance(error, TimeoutError | httpx.TimeoutException) else "cannot be reached"
            raise Refusal(400, f"image: {url.host} {why}; send the picture itself", param="image") from None
        return bytes(content)


def _check(path: Path, max_pixels: int) -> None:
    """Decode a picture once at its full size; a large one is kept smaller, for all who decode it after. ImageError."""
    picture = decode(path, max_pixels)
    if max(picture.size) > LARGE:
        picture.thumbnail((LARGE, LARGE))
        picture.save(path, "PNG", compress_level=1)


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        takes = "send a data: URI such as data:image/png;base64,..."
        raise Refusal(400, f"image is not valid base64; {takes}", param="image") from None
