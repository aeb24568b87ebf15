"""Media of requests: decoding, limits, and fetching from allowed hosts."""

import asyncio
import base64
import contextlib
import io
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from distill.serving.media import RequestMedia, Sources
from distill.serving.protocol import RequestError


def png(width: int = 8, height: int = 8) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(content, "PNG")
    return content.getvalue()


def huge() -> bytes:
    """A PNG of a few bytes whose header declares 200 megapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def stored(*sources: str, hosts: tuple[str, ...] = (), seconds: float = 5.0) -> list[bytes]:
    """Store the images and return the content of their files."""

    async def run() -> list[bytes]:
        images = RequestMedia(hosts, 100_000, 1_000_000)
        paths: tuple[Path, ...] = ()
        try:
            async with images.stored(Sources(sources), time.monotonic() + seconds) as stored:
                paths = stored.media.images
                return [path.read_bytes() for path in paths]
        finally:
            await images.close()
            assert not any(path.parent.exists() for path in paths)

    return asyncio.run(run())


def refused(*sources: str, hosts: tuple[str, ...] = (), seconds: float = 5.0) -> tuple[int, str]:
    with pytest.raises(RequestError) as caught:
        stored(*sources, hosts=hosts, seconds=seconds)
    return caught.value.status, caught.value.message


def test_base64_in_every_form_is_stored_and_deleted_afterwards() -> None:
    plain = base64.b64encode(png()).decode()
    wrapped = "\n".join(plain[start : start + 20] for start in range(0, len(plain), 20))
    kinds = ("image/png", "IMAGE/PNG;name=a.png", "", 'video/mp4; codecs="avc1.42E01E, mp4a.40.2"')
    assert stored(plain, wrapped, *(uri(png(), kind) for kind in kinds)) == [png()] * 6
    assert stored() == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("", "none of JPEG"),
        ("!!!", "base64"),
        ("aGk", "base64"),
        ("aGFsbG8=", "none of JPEG"),
        (uri(png(300, 300)[:200]), "broken"),
        (uri(huge()), "pixels"),
        (uri(png(2000, 2)), "aspect ratio"),
        ("data:image/png,%89PNG", "data:"),
        ("file:///etc/passwd", "file:"),
        ("FILE:///etc/passwd", "FILE:"),
        ("ftp://example.org/a.png", "ftp:"),
        ("http://example.org/a.png", "example.org"),
        ("https://[::1", "URL"),
        ("base64 with an é", "base64"),
    ],
)
def test_an_invalid_image_is_refused_with_a_message(source: str, expected: str) -> None:
    status, text = refused(source)
    assert status == 400 and expected in text and "send" in text and tempfile.gettempdir() not in text


def test_the_number_of_images_is_limited() -> None:
    assert refused(*[uri(png())] * 9)[0] == 400


# ---- fetched images ----


class ImageHost(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/slow.png":
            time.sleep(1)
        if self.path == "/dripping-header.png":
            with contextlib.suppress(OSError):
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                for _ in range(600):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
            return
        content = {"/large.png": b"x" * 200_000, "/trickle.png": b"x" * 10}.get(self.path, png())
        self.send_response({"/moved.png": 302, "/none.png": 404}.get(self.path, 200))
        self.send_header("Location", "/a.png")
        self.end_headers()
        try:
            for byte in content if self.path == "/trickle.png" else [content]:
                self.wfile.write(bytes([byte]) if isinstance(byte, int) else byte)
                time.sleep(0.1 if self.path == "/trickle.png" else 0)
        except OSError:
            pass

    def log_message(self, *_: object) -> None:
        """No log."""


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), ImageHost) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_an_image_is_fetched_from_an_allowed_host(host: str) -> None:
    assert stored(f"http://{host}/a.png", hosts=(host,)) == [png()]


def test_images_from_other_hosts_are_refused(host: str) -> None:
    for allowed in ((), ("127.0.0.1",), ("example.org",)):
        assert refused(f"http://{host}/a.png", hosts=allowed)[0] == 400
    assert refused(f"http://{host}@example.org/a.png", hosts=(host,))[0] == 400
    assert refused(f"http://user@{host}/a.png", hosts=(host,))[0] == 400


@pytest.mark.parametrize(
    ("path", "status", "expected"),
    [
        ("moved.png", 400, "302"),
        ("none.png", 400, "404"),
        ("large.png", 413, "100,000 bytes"),
        ("slow.png", 400, "too long"),
        ("trickle.png", 400, "too long"),
    ],
)
def test_invalid_responses_of_a_host_are_refused(host: str, path: str, status: int, expected: str) -> None:
    found, text = refused(f"http://{host}/{path}", hosts=(host,), seconds=0.4)
    assert found == status and expected in text


def test_a_slow_host_delays_no_other_fetch(host: str) -> None:
    async def run() -> None:
        images = RequestMedia((host,), 100_000, 1_000_000)

        async def fetch(path: str, seconds: float) -> str:
            try:
                async with images.stored(Sources((f"http://{host}/{path}",)), time.monotonic() + seconds):
                    return "stored"
            except RequestError as error:
                return error.message

        slow = [asyncio.create_task(fetch("dripping-header.png", 0.5)) for _ in range(20)]
        assert await asyncio.gather(*(fetch("a.png", 5.0) for _ in range(20))) == ["stored"] * 20
        assert all("too long" in text for text in await asyncio.gather(*slow))
        assert await fetch("a.png", 5.0) == "stored"
        await images.close()

    asyncio.run(run())


def test_a_fetch_in_progress_does_not_delay_the_exit(host: str) -> None:
    """The host sends a header for a minute; the time limit of the request is half a second."""
    script = (
        "import asyncio, sys, time\n"
        "from distill.serving.media import RequestMedia, Sources\n"
        "async def run():\n"
        "    images = RequestMedia((sys.argv[1],), 100_000, 1_000_000)\n"
        "    try:\n"
        "        sources = Sources((f'http://{sys.argv[1]}/dripping-header.png',))\n"
        "        async with images.stored(sources, time.monotonic() + 0.5):\n"
        "            pass\n"
        "    finally:\n"
        "        await images.close()\n"
        "        print(time.time(), flush=True)\n"
        "asyncio.run(run())\n"
    )
    process = subprocess.run([sys.executable, "-c", script, host], capture_output=True, text=True, check=False)
    assert "too long" in process.stderr
    assert time.time() - float(process.stdout) < 30


def test_an_unreachable_host_is_named() -> None:
    status, text = refused("http://127.0.0.1:1/a.png", hosts=("127.0.0.1:1",))
    assert status == 400 and "cannot be reached" in text
