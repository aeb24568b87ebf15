"""Scripts that run in forks of one process that has imported the libraries: as in a new process, but at once."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["distill.chain", "distill.cli", "distill.planning.tables", "distill.stages.serve"])


class Script:
    """A script in a process of its own, with the interface of `subprocess.Popen` for texts."""

    def __init__(self, path: Path, *arguments: str, env: dict[str, str]) -> None:
        self.outputs = [Path(tempfile.mkdtemp(dir=path.parent)) / name for name in ("stdout", "stderr")]
        self.process = processes.Process(target=_run, args=([str(path), *arguments], env, self.outputs))
        self.process.start()
        self.pid: int = self.process.pid  # type: ignore[assignment]  # it has started

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Output and messages, when the script has ended."""
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.outputs[0].parent.name, timeout)
        out, err = (path.read_text() for path in self.outputs)
        return out, err

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(arguments: list[str], env: dict[str, str], outputs: list[Path]) -> None:
    for descriptor, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
