"""`distill serve` on a finished chain: a process with real HTTP requests and a stop signal, and refused settings."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from distill import cli, logs
from distill.recipe import Recipe


@pytest.fixture(autouse=True)
def _unchanged_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "configure", lambda *_, **__: None)


@pytest.fixture(scope="module")
def gateway(recipe_file: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """The process of the command, and its address."""
    command = [str(Path(sys.executable).with_name("distill")), "serve", "--config", str(recipe_file)]
    command += ["--serve.port", "0", "--serve.max_new_tokens", "40"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"http://[\d.:]+", line):
            break
    else:
        pytest.fail("".join(lines))
    yield process, found[0]
    if process.poll() is None:
        process.kill()
        process.wait()


def wait_until_ready(url: str) -> None:
    end = time.monotonic() + 120
    while httpx.get(f"{url}/health/ready", timeout=30).status_code != 200:
        assert time.monotonic() < end, "the gateway did not become ready"
        time.sleep(0.1)


def test_the_gateway_gives_the_decisions_of_the_cascade_stage(
    gateway: tuple[subprocess.Popen, str], finished: Recipe, folder: Path
) -> None:
    process, url = gateway
    wait_until_ready(url)
    assert [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]] == ["micro", "micro-student"]
    decisions = [json.loads(line) for line in (folder / "cascade" / "decisions.jsonl").read_text().splitlines()]
    posts = [json.loads(line) for line in (Path(finished.data.root) / "test.jsonl").read_text().splitlines()]
    for post, decision in zip(posts[:4], decisions[:4], strict=True):
        image = Path(finished.data.root) / (post.get("image") or post["images"][0])
        body = {"text": post["text"], "image": _uri(image), "rationale": False}
        answer = httpx.post(f"{url}/v1/sentiment", json=body, timeout=60).json()
        assert (answer["label"], answer["stage"]) == (decision["label"], decision["stage"])
        assert list(answer["probabilities"].values()) == pytest.approx(decision["probabilities"], abs=1e-3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0


def test_a_student_without_a_calibration_of_its_own_is_refused(
    recipe_file: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", "--config", str(recipe_file), "--calibrate.budget", "0.1"]) == 2
    assert "serve reads calibrate, which has not run with this recipe; run it first" in capsys.readouterr().err
    assert cli.main(["serve", "--config", str(recipe_file), "--calibrate", "null", "--cascade", "null"]) == 2
    assert "serve needs a calibrate section" in capsys.readouterr().err
    calibration = folder / "calibrate" / "calibration.json"
    before = calibration.read_text()
    try:
        calibration.write_text(json.dumps(json.loads(before) | {"student": "student-of-another-run"}))
        assert cli.main(["serve", "--config", str(recipe_file)]) == 2
        assert "was made with another student (student-of-another-run, now student-" in capsys.readouterr().err
    finally:
        calibration.write_text(before)


def test_an_address_in_use_is_refused_with_a_message(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--config", str(recipe_file), "--serve.port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err


def _uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
