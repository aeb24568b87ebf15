"""The end of a process that does not react to SIGTERM."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.training.shutdown import INTERRUPTED, STATUS

WAITING = """
import sys, threading, time
from distill.training import shutdown
shutdown.GRACE_SECONDS = 0.5
with shutdown.raise_on_sigterm():
    print("ready", flush=True)
    while True:
        try:
            {wait}
        except shutdown.Terminated:
            pass
"""


def ends(wait: str, tmp_path: Path) -> tuple[int, bytes]:
    """Status and messages of a process that waits in a line and gets SIGTERM; the messages are read at its end."""
    path = tmp_path / "waiting.py"
    path.write_text(WAITING.format(wait=wait))
    process = subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    try:
        status = process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return status, process.communicate()[1]


@pytest.mark.parametrize("wait", ["time.sleep(60)", "threading.Event().wait(60)"])
def test_a_process_that_goes_on_after_sigterm_is_ended_with_a_message(wait: str, tmp_path: Path) -> None:
    status, messages = ends(wait, tmp_path)
    assert (status, messages.decode()) == (STATUS, f"{INTERRUPTED}\n")


def test_a_process_that_writes_into_a_full_pipe_is_ended(tmp_path: Path) -> None:
    """It holds the lock of sys.stderr meanwhile."""
    status, messages = ends("sys.stderr.write('x' * 1_000_000)", tmp_path)
    assert status == STATUS and set(messages) == {ord("x")}
