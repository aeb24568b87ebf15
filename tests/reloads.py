"""Reloads of exported folders in forks of one process that has imported transformers, and nothing of this package.

The check of an export starts a new interpreter, which imports the same libraries each time: most of the time of a test.
A fork of a process that has imported them runs the same script. Tests of the command itself use `new_interpreter`.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from distill.export import check

FORKS = """
import gc, json, os, runpy, sys
import transformers.models.gemma3.modeling_gemma3, transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
get_checkpoint_conversion_mapping("qwen2_5_vl")  # builds and keeps a table
gc.freeze()
for line in sys.stdin:
    errors, script, *arguments = json.loads(line)
    if not (child := os.fork()):
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Reloads:
    """Stands in for the module `subprocess` in the check of an export: `run` takes its command."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None  # starts with the first export

    def run(self, command: list[str], **_: Any) -> "subprocess.CompletedProcess[str]":
        interpreter, isolated, *arguments = command
        assert (interpreter, isolated) == (sys.executable, "-I")
        if self.process is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.process = subprocess.Popen([interpreter, isolated, "-c", FORKS], text=True, **pipes)
        assert self.process.stdin is not None and self.process.stdout is not None
        with TemporaryDirectory() as folder:
            errors = Path(folder) / "errors.txt"
            print(json.dumps([str(errors), *arguments]), file=self.process.stdin, flush=True)
            status = int(self.process.stdout.readline())
            return subprocess.CompletedProcess(command, status, "", errors.read_text())

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()


@contextlib.contextmanager
def forked() -> Iterator[None]:
    """Exports are reloaded in forks."""
    reloads = Reloads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "subprocess", reloads)
        yield
    reloads.close()


@contextlib.contextmanager
def new_interpreter() -> Iterator[None]:
    """Exports are reloaded as users do it, by a new interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "subprocess", subprocess)
        yield
