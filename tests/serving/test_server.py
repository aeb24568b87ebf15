"""The server process: graceful shutdown and listening."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path

import httpx
import psutil
import pytest

from distill.errors import SettingsError
from distill.models.backbone import Backbone
from distill.models.endpoint import Endpoint, EndpointSettings
from distill.models.local import Local
from distill.serving.gateway import Gateway
from distill.serving.server import serve
from distill.serving.settings import ServeSettings, endpoint_for_serving
from distill.task.labels import LabelSpace
from tests.models.openai_server import Server
from tests.serving.conftest import metric, policy, running, wait_until

HERE = Path(__file__).resolve()


@contextmanager
def process(folder: Path, teacher_url: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A gateway in a subprocess that is ready."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    command = [sys.executable, str(HERE.with_name("tiny_server.py")), str(folder), str(port), teacher_url]
    gateway = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=HERE.parents[2]
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

            def ready() -> bool:
                assert gateway.poll() is None, gateway.communicate()[0]
                try:
                    return client.get("/health/ready").status_code == 200
                except httpx.TransportError:
                    return False

            wait_until(ready, 60)
            yield gateway, client
    finally:
        gateway.kill()
        gateway.wait()


def test_requests_in_flight_are_answered_before_shutdown(fluent: Backbone, tmp_path: Path) -> None:
    fluent.save(tmp_path)
    with Server(delay_s=0.5) as teacher, process(tmp_path, teacher.url) as (gateway, client):
        processes = [psutil.Process(gateway.pid), *psutil.Process(gateway.pid).children(recursive=True)]
        with ThreadPoolExecutor(20) as pool:
            futures = [pool.submit(client.post, "/v1/sentiment", json={"text": f"post {n}"}) for n in range(20)]
            wait_until(lambda: metric(client, "distill_queue_depth") == 20)
            gateway.send_signal(signal.SIGTERM)
            replies = [future.result() for future in futures]
        output, _ = gateway.communicate(timeout=30)
        assert [reply.status_code for reply in replies] == [200] * 20
        assert all(1 <= reply.json()["teacher_calls"] <= 2 for reply in replies)
        assert gateway.returncode == 0, output
        assert "Traceback" not in output
        assert not [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{client.base_url}/health/live")


HEAD = b"POST /v1/sentiment HTTP/1.1\r\nHost: gateway\r\n"


POST = HEAD + b'Content-Length: 13\r\n\r\n{"text": "a"}'


def status(connection: socket.socket) -> int:
    """The status of one response, which is read to its end."""
    response = HTTPResponse(connection)
    response.begin()
    response.read()
    return response.status


def connect(client: httpx.Client, content: bytes = b"") -> socket.socket:
    connection = socket.create_connection((client.base_url.host, client.base_url.port), timeout=10)
    connection.sendall(content)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """What is received until the gateway closes the connection; raises TimeoutError if it does not."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def test_connections_that_do_not_send_their_headers_are_closed(student: Local) -> None:
    with running(student, header_timeout_s=1.0, rationale=False) as client:
        process = psutil.Process()
        before = process.num_fds()
        contents = (b"", b"P", HEAD, HEAD + b"Content-Length: 14\r\n")
        slow = [connect(client, contents[n % len(contents)]) for n in range(200)]
        assert client.post("/v1/sentiment", json={"text": "words"}).status_code == 200
        assert {read_all(connection) for connection in slow} == {b""}, "the server closes them"
        for connection in slow:
            connection.close()
        wait_until(lambda: process.num_fds() <= before + 2)


def test_each_byte_does_not_extend_the_limit_of_the_headers(student: Local) -> None:
    with running(student, header_timeout_s=0.6, rationale=False) as client, connect(client) as connection:
        begin = time.monotonic()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for byte in HEAD * 10:
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
        assert 0.5 < time.monotonic() - begin < 3


def test_the_limit_of_the_headers_ends_no_other_connection(student: Local) -> None:
    """Neither a slow body, a slow answer nor an idle connection; a reused connection has the limit again."""
    with Server(delay_s=1.0) as teacher:
        endpoint = Endpoint(endpoint_for_serving(EndpointSettings(teacher.url, "big-vl"), 20.0), LabelSpace())
        with (
            running(student, endpoint, policy(student_threshold=-1.0), header_timeout_s=0.5) as client,
            connect(client, POST[:-2]) as connection,
        ):
            time.sleep(0.8)
            connection.sendall(POST[-2:])
            assert status(connection) == 200  # the body was slower than the limit
            time.sleep(0.8)
            connection.sendall(POST)
            assert status(connection) == 200  # the answer was slower than the limit
            connection.sendall(HEAD)
            begin = time.monotonic()
            assert read_all(connection) == b""
            assert time.monotonic() - begin < 2


def test_shutdown_ends_all_threads(student: Local) -> None:
    before = set(threading.enumerate())
    with running(student) as client:
        assert client.post("/v1/sentiment", json={"text": "words"}).status_code == 200
    assert not [thread.name for thread in set(threading.enumerate()) - before if thread.is_alive()]


def test_a_port_in_use_is_refused_with_a_message(student: Local) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = ServeSettings(port=taken.getsockname()[1])
        with pytest.raises(SettingsError, match=rf"serve.port.*{settings.port}"):
            serve(Gateway(settings, policy(), student, None, "cascade"))
