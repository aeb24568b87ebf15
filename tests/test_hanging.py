"""The stacks of processes that hang."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.hanging import STACKS, Crashed, communicate, once_more

SCRIPT = """
import os, sys, time
def wait_for_ever():
    time.sleep(600)
if os.fork():
    os.wait()
wait_for_ever()
"""
CRASH = "import os; os.write(2, b'malloc(): unaligned tcache chunk detected\\n'); os.abort()"


def start(script: str) -> "subprocess.Popen[str]":
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", script], text=True, **pipes)  # type: ignore[call-overload, no-any-return]


def test_the_stacks_of_all_processes_are_in_the_error() -> None:
    process = start(STACKS + SCRIPT)
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        communicate(process, 2)
    (note,) = caught.value.__notes__
    assert note.count("in <module>") == 2 and note.count("in wait_for_ever") == 1, note
    assert process.returncode == -9


@pytest.mark.parametrize(
    ("script", "what", "message", "error"),
    [
        (STACKS + SCRIPT, "hung", "in wait_for_ever", subprocess.TimeoutExpired),
        (CRASH, "crashed", "unaligned tcache", Crashed),
    ],
)
def test_a_test_that_hangs_or_crashes_is_run_once_more_in_a_new_folder(
    tmp_path: Path, script: str, what: str, message: str, error: type[Exception]
) -> None:
    folders = []

    @once_more
    def fails_at_first(tmp_path: Path, often: int) -> None:
        folders.append(tmp_path.name)
        communicate(start(script if len(folders) <= often else STACKS), 2)

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.warns(UserWarning, match=f"(?s)fails_at_first {what}.*{message}"):
        fails_at_first(tmp_path=tmp_path / "a", often=1)
    assert folders == ["first", "second"]
    folders.clear()
    with pytest.raises(error), pytest.warns(UserWarning, match=what):
        fails_at_first(tmp_path=tmp_path / "b", often=2)
    assert folders == ["first", "second"]
