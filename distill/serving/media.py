"""Images, videos and sounds of requests: uploaded, in base64 or fetched, then checked and stored for one request."""

import asyncio
import base64
import binascii
import re
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import urllib3
from urllib3.exceptions import ConnectTimeoutError, HTTPError, LocationParseError, NewConnectionError, ReadTimeoutError
from urllib3.util import Url, parse_url

from distill.connections import BodyTooLarge, connection_pool, read_body
from distill.data.clips import ClipError, ClipReader
from distill.data.images import FORMATS, ImageError, decode
from distill.errors import SettingsError
from distill.serving.protocol import RequestError
from distill.task.sample import NO_MEDIA, Media

T = TypeVar("T")

MAX_IMAGES = 8
"""Maximum number of images in one post."""

MAX_SIDE = 2048
"""Longest side of a stored image, in pixels; larger images are scaled down."""

_FETCH_S = 10.0
_IDLE_CONNECTIONS = 256  # per host
_PORTS = {"http": 80, "https": 443}
_DATA = re.compile(r"data:.{0,200}?; ?base64,", re.IGNORECASE)  # a list of codecs may have quotes, commas and spaces
_PLURALS = {"image": "images", "video": "videos", "audio": "sounds"}
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):", re.IGNORECASE)


Source = str | bytes
"""A `data:` URI, bare base64, an http(s) URL of an allowed host, or the content of an uploaded file."""


class Sources(NamedTuple):
    """Where the media of a post come from."""

    images: Sequence[Source] = ()
    videos: Sequence[Source] = ()
    sounds: Sequence[Source] = ()


class StoredMedia(NamedTuple):
    """The media of a request in files.

    Attributes:
        times: of the frames that are sampled from the video, in seconds; None without a video.
    """

    media: Media = NO_MEDIA
    times: tuple[float, ...] | None = None


class RequestMedia:
    """Temporary storage of the images, videos and sounds of requests.

    Args:
        hosts: hosts from which files may be fetched, each as host or host:port; redirects are not followed.
        max_bytes: largest file that is fetched.
        max_pixels: most pixels of an image, read from its header before it is decoded.
        clips: decodes videos and sounds, with their limits; None: with the default settings.
    """

    def __init__(self, hosts: Sequence[str], max_bytes: int, max_pixels: int, clips: ClipReader | None = None) -> None:
        self._hosts = {host.lower() for host in hosts}
        self._max_bytes, self._max_pixels = max_bytes, max_pixels
        self._clips = clips or ClipReader()
        self._pools: dict[tuple[str | None, str], urllib3.PoolManager] = {}  # one for each scheme and allowed host
        self._decoders = ThreadPoolExecutor(2, "decode")  # few, because a decoded image or video may need much memory

    async def close(self) -> None:
        """Close the idle connections and end the decoders."""
        self._decoders.shutdown(wait=False, cancel_futures=True)
        for pool in list(self._pools.values()):  # threads may add one
            pool.clear()

    @asynccontextmanager
    async def stored(self, sources: Sources, deadline: float) -> AsyncIterator[StoredMedia]:
        """Store the media in files, which are deleted when the context ends.

        The sound of a post is the given one, otherwise that of its video if it has one.

        Args:
            deadline: until when the files must be stored, on the clock of `time.monotonic`.

        Raises:
            RequestError: a file is invalid, too large, not allowed, or not available in time.
        """
        if not any(sources):
            yield StoredMedia()
            return
        if len(sources.images) > MAX_IMAGES:
            raise RequestError(400, f"a post takes at most {MAX_IMAGES} images; send fewer", param="image")
        for name, given in (("video", sources.videos), ("audio", sources.sounds)):
            if len(given) > 1:
                raise RequestError(400, f"a post takes at most one {name}; send one", param=name)
        with tempfile.TemporaryDirectory(prefix="distill-") as folder:
            images, video, audio, times = [], None, None, None
            for number, source in enumerate(sources.images, start=1):
                images.append(await self._write(source, Path(folder) / str(number), "image", deadline))
                await self._decode(lambda path: _check(path, self._max_pixels), images[-1], "image", deadline)
            for source in sources.videos:
                video = await self._write(source, Path(folder) / "video", "video", deadline)
                times, has_sound = await self._decode(self._check_video, video, "video", deadline)
                audio = video if has_sound else None
            for source in sources.sounds:
                audio = await self._write(source, Path(folder) / "audio", "audio", deadline)
                await self._decode(lambda path: self._clips.decode(path, video=False), audio, "audio", deadline)
            yield StoredMedia(Media(tuple(images), video, audio), times)

    async def _write(self, source: Source, path: Path, name: str, deadline: float) -> Path:
        content = await self._content(source, name, deadline) if isinstance(source, str) else source
        await asyncio.to_thread(path.write_bytes, content)
        return path

    async def _decode(self, check: Callable[[Path], T], path: Path, name: str, deadline: float) -> T:
        """Check a file on a thread of the decoders, until the deadline."""
        checked = asyncio.get_running_loop().run_in_executor(self._decoders, check, path)
        try:
            return await asyncio.wait_for(checked, max(deadline - time.monotonic(), 0))
        except ImageError as error:
            remedy = f"send a complete {', '.join(FORMATS)} of at most {self._max_pixels:,} pixels"
            raise RequestError(400, f"{error}; {remedy}", param=name) from None
        except ClipError as error:
            raise RequestError(400, f"{error}; send another file", param=name) from None
        except SettingsError:  # PyAV is not installed
            message = f"{name}: this server does not read {_PLURALS[name]}; send the post without"
            raise RequestError(400, message, param=name) from None
        except TimeoutError:
            message = f"the {name} took too long to decode; send a smaller one"
            raise RequestError(429, message, param=name, Retry_After="1") from None

    def _check_video(self, path: Path) -> tuple[tuple[float, ...], bool]:
        """The times of the frames, and whether there is a sound. Raises ClipError."""
        has_sound = self._clips.decode(path)
        return self._clips.frames(path).times, has_sound

    async def _content(self, source: str, name: str, deadline: float) -> bytes:
        if prefix := _DATA.match(source):
            return _decode_base64(source[prefix.end() :], name)
        scheme = _SCHEME.match(source)
        if scheme is None:
            return _decode_base64(source, name)
        if scheme[1].lower() not in ("http", "https"):
            message = f"{name}: this {scheme[1][:20]}: URI is not supported; send a data: URI with base64"
            raise RequestError(400, message, param=name)
        return await self._fetch(source, name, deadline)

    async def _fetch(self, source: str, name: str, deadline: float) -> bytes:
        try:
            url = parse_url(source)
        except LocationParseError:
            url = Url()
        if not url.host:
            raise RequestError(400, f"{name} is not a valid URL; send a data: URI with base64", param=name)
        host = url.host if url.port in (None, _PORTS[url.scheme or "http"]) else f"{url.host}:{url.port}"
        if host.lower() not in self._hosts or url.auth:
            message = f"{name}: {_PLURALS[name]} from {host[:100]} are refused; send a data: URI"
            raise RequestError(400, message, param=name)
        end = min(deadline, time.monotonic() + _FETCH_S)
        fetched: Future[bytes] = Future()
        fetched.set_running_or_notify_cancel()  # from here on only the thread ends it
        # One thread per fetch, so that a slow host delays no other fetch; a daemon, so that it does not delay the exit.
        threading.Thread(
            target=self._get, args=(fetched, source, name, url, host, end), name="fetch", daemon=True
        ).start()
        try:
            return await asyncio.wait_for(asyncio.wrap_future(fetched), max(end - time.monotonic(), 0))
        except BodyTooLarge:
            message = f"{name} has more than {self._max_bytes:,} bytes; send a smaller one"
            raise RequestError(413, message, param=name) from None
        except (HTTPError, TimeoutError) as error:
            refused = isinstance(error, NewConnectionError)  # a subclass of ConnectTimeoutError
            slow = not refused and isinstance(error, TimeoutError | ReadTimeoutError | ConnectTimeoutError)
            reason = "takes too long" if slow else "cannot be reached"
            raise RequestError(400, f"{name}: {host} {reason}; send the {name} itself", param=name) from None

    def _get(self, fetched: "Future[bytes]", source: str, name: str, url: Url, host: str, deadline: float) -> None:
        """Set `fetched` to the content of a file. Runs on a thread of its own."""
        try:
            fetched.set_result(self._download(source, name, url, host, deadline))
        except BaseException as error:  # noqa: BLE001 - raised where the fetch is awaited
            fetched.set_exception(error)

    def _download(self, source: str, name: str, url: Url, host: str, deadline: float) -> bytes:
        """The content of a file. May take longer than the deadline if the host sends its headers byte by byte."""
        key = (url.scheme, host)
        if key not in self._pools:
            self._pools[key] = connection_pool(source, _IDLE_CONNECTIONS)
        pool = self._pools[key]
        seconds, accept = max(deadline - time.monotonic(), 0.001), {"Accept": f"{name}/*"}
        with pool.urlopen(
            "GET", source, headers=accept, timeout=seconds, redirect=False, preload_content=False
        ) as response:
            if response.status != 200:
                message = f"{name}: {host} returned status {response.status}; send the {name} itself"
                raise RequestError(400, message, param=name)
            return read_body(response, deadline, self._max_bytes)


def _check(path: Path, max_pixels: int) -> None:
    """Decode an image once, and scale its file down if it is larger than the models need. Raises ImageError."""
    image = decode(path, max_pixels)
    if max(image.size) > MAX_SIDE:
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        image.save(path, "PNG", compress_level=1)


def _decode_base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        example = {"image": "image/png", "video": "video/mp4", "audio": "audio/wav"}[name]
        remedy = f"send a data: URI such as data:{example};base64,..."
        raise RequestError(400, f"{name} is not valid base64; {remedy}", param=name) from None
