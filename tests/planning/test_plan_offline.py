"""`distill plan` without a model hub: an answer in seconds, with one line about each model."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import micro

HUB_MODEL: dict[str, Any] = {"path": "nobody/has-this-model", "lora": {}}


@pytest.mark.parametrize("answer", ["refused", "never"])
def test_a_plan_needs_no_hub(tmp_path: Path, answer: str) -> None:
    content = micro.RECORDED | {
        name: micro.LEARNER | {"model": HUB_MODEL | {"revision": name}} for name in ("assistant", "student")
    }
    recipe = micro.write(tmp_path, content)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts connections and never answers
        port = server.getsockname()[1]
        if answer == "refused":
            server.close()
        names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
        environment = {name: value for name, value in os.environ.items() if name not in names}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "hub")}
        script = (
            "import sys, time; from distill.cli import main; import distill.planning.tables; start = time.monotonic()\n"
            "status = main(sys.argv[1:]); print('seconds', time.monotonic() - start); sys.exit(status)"
        )
        command = [sys.executable, "-c", script, "plan", "--config", str(recipe)]
        begin = time.monotonic()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    reason = f"it is not on this machine, and the hub at http://127.0.0.1:{port} does not answer"
    assert done.stdout.count(reason) + done.stderr.count(reason) >= 2, done.stdout + done.stderr
    assert float(done.stdout.split("seconds")[-1]) < 20 and time.monotonic() > begin  # one attempt of 5 seconds
