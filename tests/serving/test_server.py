"""The server process: graceful shutdown and listening."""

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from distill.errors import SettingsError
from distill.models.backbone import Backbone
from distill.models.local import Local
from distill.serving.gateway import Gateway
from distill.serving.server import serve
from distill.serving.settings import ServeSettings
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
