"""RequestImages from strangers, on their way through a request."""

import asyncio
import base64
import io
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from distill.serving.images import RequestImages
from distill.serving.protocol import Refusal


def png(width: int = 8, height: int = 8) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(content, "PNG")
    return content.getvalue()


def huge() -> bytes:
    """A PNG of a few bytes whose header promises 200 megapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def kept(*sources: str, hosts: tuple[str, ...] = (), seconds: float = 5.0) -> list[bytes]:
    """The files that a request is given, read while they are there."""

    async def run() -> list[bytes]:
        pictures = RequestImages(hosts, 100_000, 1_000_000)
        paths: tuple[Path, ...] = ()
        try:
            async with pictures.kept(sources, time.monotonic() + seconds) as paths:
                return [path.read_bytes() for path in paths]
        finally:
            await pictures.close()
            assert not any(path.parent.exists() for path in paths)

    return asyncio.run(run())


def refused(*sources: str, hosts: tuple[str, ...] = (), seconds: float = 5.0) -> tuple[int, str]:
    with pytest.raises(Refusal) as caught:
        kept(*sources, hosts=hosts, seconds=seconds)
    return caught.value.status, caught.value.message


def test_base64_in_every_dress_and_gone_with_the_request() -> None:
    plain = base64.b64encode(png()).decode()
    wrapped = "\n".join(plain[at : at + 20] for at in range(0, len(plain), 20))
    sources = (plain, wrapped, uri(png()), uri(png(), "IMAGE/PNG;name=a.png"), uri(png(), ""))
    assert kept(*sources) == [png()] * 5
    assert kept() == []


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("", "none of JPEG"),
        ("!!!", "base64"),
        ("aGk", "base64"),
        ("aGFsbG8=", "none of JPEG"),
        (uri(png(300, 300)[:200]), "broken"),
        (uri(huge()), "pixels"),
        (uri(png(2000, 2)), "strip"),
        ("data:image/png,%89PNG", "data:"),
        ("file:///etc/passwd", "file:"),
        ("FILE:///etc/passwd", "FILE:"),
        ("ftp://example.org/a.png", "ftp:"),
        ("http://example.org/a.png", "example.org"),
        ("https://[::1", "URL"),
        ("base64 with an é", "base64"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(source: str, says: str) -> None:
    status, sentence = refused(source)
    assert status == 400 and says in sentence and "send" in sentence and "/tmp" not in sentence


def test_pictures_are_counted() -> None:
    assert refused(*[uri(png())] * 9)[0] == 400


# ---- from other hosts ----


class Host(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/slow.png":
            time.sleep(1)
        content = {"/large.png": b"x" * 200_000, "/drip.png": b"x" * 10}.get(self.path, png())
        self.send_response({"/moved.png": 302, "/none.png": 404}.get(self.path, 200))
        self.send_header("Location", "/a.png")
        self.end_headers()
        try:
            for byte in content if self.path == "/drip.png" else [content]:
                self.wfile.write(bytes([byte]) if isinstance(byte, int) else byte)
                time.sleep(0.1 if self.path == "/drip.png" else 0)
        except OSError:
            pass

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Host) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_host_named_in_the_settings_is_asked(host: str) -> None:
    assert kept(f"http://{host}/a.png", hosts=(host,)) == [png()]


def test_other_hosts_are_not(host: str) -> None:
    for allowed in ((), ("127.0.0.1",), ("example.org",)):
        assert refused(f"http://{host}/a.png", hosts=allowed)[0] == 400
    assert refused(f"http://{host}@example.org/a.png", hosts=(host,))[0] == 400
    assert refused(f"http://user@{host}/a.png", hosts=(host,))[0] == 400


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("moved.png", 400, "302"),
        ("none.png", 400, "404"),
        ("large.png", 413, "100,000 bytes"),
        ("slow.png", 400, "too long"),
        ("drip.png", 400, "too long"),
    ],
)
def test_a_host_that_misbehaves(host: str, path: str, status: int, says: str) -> None:
    found, sentence = refused(f"http://{host}/{path}", hosts=(host,), seconds=0.4)
    assert found == status and says in sentence


def test_a_host_that_is_not_there() -> None:
    status, sentence = refused("http://127.0.0.1:1/a.png", hosts=("127.0.0.1:1",))
    assert status == 400 and "cannot be reached" in sentence
