"""`distill serve --engine ray`: a real deployment with two replicas, and what is refused before one is started."""

import builtins
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from distill.errors import SettingsError
from distill.serving.ray_serve import check_ray
from distill.serving.settings import ReplicaSettings, ServeSettings
from tests.serving.conftest import wait_until


def test_settings_that_ray_cannot_use_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"max_replicas is 2; it takes min_replicas \(3\) or more"):
        ReplicaSettings(min_replicas=3, max_replicas=2)
    actual = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("ray"):
            raise ImportError(name="ray")
        return actual(name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without)
        with pytest.raises(SettingsError, match=r"engine: ray needs ray: pip install 'distill\[serve,ray\]'"):
            check_ray(ServeSettings())
    pytest.importorskip("ray.serve", reason="the extra ray is not installed")
    with pytest.raises(SettingsError, match=r"serve\.port is 0"):
        check_ray(ServeSettings(port=0))


def test_two_replicas_answer_as_one_gateway_and_end_with_the_signal(recipe_file: Path) -> None:
    pytest.importorskip("ray.serve", reason="the extra ray is not installed")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    command = [sys.executable, "-m", "distill", "serve", "--config", str(recipe_file), "--engine", "ray"]
    command += ["--serve.port", str(port), "--serve.ray.min_replicas", "2", "--serve.ray.cpus", "0.1"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if re.search(rf"micro is served on http://127.0.0.1:{port} by Ray", line):
                break
        else:
            pytest.fail("".join(lines))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_until(lambda: client.get("/health/ready").status_code == 200, 60)
            body = {"text": "Greetings from the second museum.", "rationale": False}
            found = [client.post("/v1/sentiment", json=body).json() for _ in range(12)]
            starts = {client.get("/v1/models").json()["data"][0]["created"] for _ in range(12)}
            refused = client.post("/v1/sentiment", json={"text": ""})
        assert len({answer["label"] for answer in found}) == 1 and found[0]["stage"]
        assert 1 <= len(starts) <= 2
        assert refused.status_code == 400 and "is empty" in refused.json()["error"]["message"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
