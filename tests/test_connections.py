"""Connection pools against local servers: proxies, credentials, certificates, deadlines and size limits."""

import base64
import os
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from urllib3.exceptions import HTTPError, LocationParseError, MaxRetryError, SSLError

from distill.connections import BodyTooLarge, basic_auth, connection_pool, read_body
from distill.errors import SettingsError

BODY = bytes(range(256)) * 1000


class Server(ThreadingHTTPServer):
    """An HTTP server that records its requests. The path of a request selects the response."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str | None]] = []
        self.bytes_sent = 0
        self.stopped = threading.Event()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers.get("Proxy-Authorization")))
        self.send_response(200)
        if self.path == "/truncated":
            self.send_header("Content-Length", str(len(BODY) + 1))
        self.end_headers()
        try:
            if self.path == "/trickle":
                while not self.server.stopped.wait(0.05):
                    self._send(b"x")
            elif self.path == "/endless":
                while not self.server.stopped.is_set():
                    self._send(BODY)
            else:
                self._send(BODY)
        except OSError:  # the client closed the connection
            pass

    def _send(self, content: bytes) -> None:
        self.wfile.write(content)
        self.server.bytes_sent += len(content)

    def log_message(self, *_: object) -> None:
        """No log."""


@contextmanager
def running(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


@pytest.fixture
def server() -> Iterator[Server]:
    with running(Server()) as server:
        yield server


@pytest.fixture
def proxy() -> Iterator[Server]:
    with running(Server()) as server:
        yield server


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
            monkeypatch.delenv(name)


def fetch(url: str, seconds: float = 10.0, max_bytes: int | None = None) -> bytes:
    """Fetch a URL with a pool and `read_body`."""
    pool = connection_pool(url, 2)
    try:
        with pool.urlopen("GET", url, timeout=seconds, preload_content=False) as response:
            return read_body(response, time.monotonic() + seconds, max_bytes)
    finally:
        pool.clear()


# ---- proxies ----


def test_without_proxy_variables_the_connection_is_direct(server: Server) -> None:
    assert fetch(f"http://{server.address}/a") == BODY
    assert server.requests == [("/a", None)]


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_the_proxy_receives_the_whole_url(proxy: Server, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, f"http://{proxy.address}")
    assert fetch("http://teacher.invalid/a") == BODY
    assert proxy.requests == [("http://teacher.invalid/a", None)]


def test_a_proxy_of_another_scheme_is_not_used(server: Server, proxy: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", f"http://{proxy.address}")
    assert fetch(f"http://{server.address}/a") == BODY
    assert (len(server.requests), len(proxy.requests)) == (1, 0)


def test_a_proxy_may_have_credentials_and_no_scheme(proxy: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"me:p%40ss@{proxy.address}")
    fetch("http://teacher.invalid/a")
    assert proxy.requests == [("http://teacher.invalid/a", f"Basic {base64.b64encode(b'me:p@ss').decode()}")]


@pytest.mark.parametrize(
    ("no_proxy", "direct"),
    [
        ("127.0.0.1", True),
        ("example.org,127.0.0.1", True),
        ("{address}", True),
        ("*", True),
        ("127.0.0.1:1", False),
        ("example.org", False),
        ("", False),
    ],
)
def test_no_proxy_exempts_hosts(
    server: Server, proxy: Server, monkeypatch: pytest.MonkeyPatch, no_proxy: str, direct: bool
) -> None:
    monkeypatch.setenv("http_proxy", f"http://{proxy.address}")
    monkeypatch.setenv("no_proxy", no_proxy.format(address=server.address))
    fetch(f"http://{server.address}/a")
    assert (len(server.requests), len(proxy.requests)) == ((1, 0) if direct else (0, 1))


@pytest.mark.parametrize("proxy_url", ["socks5://127.0.0.1:9", "http://127.0.0.1:port"])
def test_an_unusable_proxy_is_refused(monkeypatch: pytest.MonkeyPatch, proxy_url: str) -> None:
    monkeypatch.setenv("http_proxy", proxy_url)
    with pytest.raises(SettingsError, match=r"http://teacher\.invalid/v1: .*proxy that cannot be used"):
        connection_pool("http://teacher.invalid/v1", 1)


# ---- credentials ----


@pytest.mark.parametrize(
    ("url", "credentials"),
    [
        ("http://me:secret@host/v1", b"me:secret"),
        ("http://me:p%40ss%3A@host/v1", b"me:p@ss:"),
        ("https://token@host:8000", b"token"),
        ("http://host/v1", None),
        ("http://host/a@b", None),
    ],
)
def test_basic_auth_comes_from_the_url(url: str, credentials: bytes | None) -> None:
    header = {} if credentials is None else {"Authorization": f"Basic {base64.b64encode(credentials).decode()}"}
    assert basic_auth("Authorization", url) == header


def test_basic_auth_of_an_invalid_url() -> None:
    with pytest.raises(LocationParseError):
        basic_auth("Authorization", "http://me@host:port")


# ---- bodies ----


def test_a_body_is_read_completely_up_to_its_limit(server: Server) -> None:
    assert fetch(f"http://{server.address}/a", max_bytes=len(BODY)) == BODY
    with pytest.raises(BodyTooLarge):
        fetch(f"http://{server.address}/a", max_bytes=len(BODY) - 1)


def test_reading_stops_at_the_limit(server: Server) -> None:
    with pytest.raises(BodyTooLarge):
        fetch(f"http://{server.address}/endless", max_bytes=10)
    sent = server.bytes_sent
    time.sleep(0.2)
    assert server.bytes_sent <= sent + len(BODY)


def test_the_deadline_holds_for_a_body_that_arrives_slowly(server: Server) -> None:
    """Every chunk arrives within the read timeout."""
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        fetch(f"http://{server.address}/trickle", seconds=0.5)
    assert 0.5 <= time.monotonic() - begin < 5


def test_a_truncated_body_is_an_error_and_not_retried(server: Server) -> None:
    with pytest.raises(HTTPError):
        fetch(f"http://{server.address}/truncated")
    assert len(server.requests) == 1


# ---- certificates ----


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate of 127.0.0.1, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("certificate")
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names, *files]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def https_url(certificate: tuple[Path, Path]) -> Iterator[str]:
    server = Server()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with running(server):
        yield f"https://{server.address}/a"


def test_an_unknown_certificate_is_refused(https_url: str) -> None:
    with pytest.raises((SSLError, MaxRetryError), match="CERTIFICATE_VERIFY_FAILED"):
        fetch(https_url)


def test_ssl_cert_file_is_used(https_url: str, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    assert fetch(https_url) == BODY


def test_ssl_cert_dir_is_used(
    https_url: str, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = ["openssl", "x509", "-hash", "-noout", "-in", str(certificate[0])]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    shutil.copy(certificate[0], tmp_path / f"{name}.0")
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    assert fetch(https_url) == BODY
