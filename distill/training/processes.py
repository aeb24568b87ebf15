"""The processes of a distributed training: which one is a worker, and what another process failed with.

The strategy starts workers by running the command again; environment variables tell them which training started them.
torchrun starts all processes of the command at once, on one node or several: the workers wait for the trainings that
the main process, of rank 0, announces in torchrun's store, and take part in one after the other.
"""

import itertools
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed import PrefixStore, TCPStore

from distill.data.clips import ClipError
from distill.data.images import ImageError
from distill.errors import NonFiniteError, RunError, SettingsError

_ACTIVE_FOLDER = "DISTILL_ACTIVE_FIT"
"""Environment variable that passes the folder of the running training to worker processes."""

_MAIN_PROCESS = "DISTILL_MAIN_PROCESS"
"""Environment variable that passes the id of the main process to worker processes."""

_RAISED = re.compile(r"^distill\.[\w.]+\.(\w+Error): (.*)", re.MULTILINE | re.DOTALL)
_TRACEBACK = "Traceback (most recent call last):"


def process_count(arguments: Mapping[str, Any]) -> int:
    """The number of processes that lightning.Trainer would start; `auto` is resolved for this machine."""
    devices, nodes = arguments.get("devices", "auto"), arguments.get("num_nodes", 1)
    if isinstance(devices, str) and devices != "auto":
        devices = [part for part in devices.split(",") if part.strip()] if "," in devices else int(devices)
    if devices in ("auto", -1):
        devices = torch.cuda.device_count() if uses_cuda(arguments) else 1
    return max(len(devices) if isinstance(devices, list) else devices, 1) * nodes


def uses_cuda(arguments: Mapping[str, Any]) -> bool:
    """Whether lightning.Trainer would train on CUDA devices."""
    accelerator = arguments.get("accelerator", "auto")
    return accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())


def worker_folder() -> Path | None:
    """The folder of the training that this worker process takes part in; None in the main process.

    Raises:
        SettingsError: another program than torchrun has started this process as a worker.
    """
    if not is_worker():
        return None
    if _ACTIVE_FOLDER not in os.environ:
        raise SettingsError(
            "LOCAL_RANK is set: start distill as one process, and trainer.devices starts the others; or by torchrun"
        )
    return Path(os.environ[_ACTIVE_FOLDER])


def is_worker() -> bool:
    """Whether this process takes part in trainings only: a training or torchrun has started it."""
    return int(os.environ.get("RANK" if by_torchrun() else "LOCAL_RANK", "0")) > 0


def by_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def started() -> int:
    """The number of processes that torchrun has started, on all nodes."""
    return int(os.environ["WORLD_SIZE"])


def stages(run: Path) -> Iterator[str]:
    """In a worker, the stage of each training that it takes part in; then it exits with the main process.

    Args:
        run: the folder of the run, in which each stage has one.
    """
    while by_torchrun():
        key = str(next(_numbers))
        while not _store().check([key]):
            time.sleep(0.5)
        if not (folder := _store().get(key).decode()):
            sys.exit(0)
        os.environ[_ACTIVE_FOLDER] = folder
        yield Path(folder).relative_to(run).parts[0]
    if (only := worker_folder()) is not None:
        yield only.relative_to(run).parts[0]


def announce(folder: Path | None) -> None:
    """Tell the workers that torchrun has started to train in `folder`; None: that the command ends."""
    if by_torchrun():
        _store().set(str(next(_numbers)), str(folder or ""))


_numbers = itertools.count()
"""Numbers of the announcements; each process counts them."""


@cache
def _store() -> PrefixStore:
    """The store of torchrun, which its own process holds until all others have ended."""
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return PrefixStore(f"distill/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def should_train(folder: Path) -> bool:
    """Whether this process takes part in the training in `folder`.

    A strategy that starts worker processes by running the command again (ddp) makes them reach every earlier training
    as well; a worker skips all trainings except the one that started it.
    """
    return not is_worker() or os.environ.get(_ACTIVE_FOLDER) == str(folder)


def begin(folder: Path) -> int | None:
    """Name the training in `folder` to its workers. Returns a worker's main process, or torchrun's, else None."""
    if is_worker():
        return os.getppid() if by_torchrun() else int(os.environ[_MAIN_PROCESS])
    os.environ |= {_ACTIVE_FOLDER: str(folder), _MAIN_PROCESS: str(os.getpid())}
    announce(folder)
    return None


class Trained(SystemExit):
    """The end of a worker's part in a training; one that torchrun started goes on to the next."""


def leave() -> NoReturn:
    """End a worker's part in a training."""
    raise Trained(0) if by_torchrun() else SystemExit(0)


def end() -> None:
    """Destroy the process group and Lightning's environment variables, so that the next fit starts its own workers.

    Those of torchrun go on, and so does their process group.
    """
    os.environ.pop(_ACTIVE_FOLDER, None)
    if by_torchrun():
        return
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in (_MAIN_PROCESS, "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def expected_failure(error: BaseException) -> Exception | None:
    """The failure that an exception of a training stands for, also if another process raised it; None for a bug.

    Workers of `ddp_spawn` and of a data loader pass on their traceback as the message.
    """
    if isinstance(error, torch.multiprocessing.ProcessExitedException):
        return RunError(f"a process of the training ended: {error}")
    found = _RAISED.search(str(error).rpartition(_TRACEBACK)[2])
    kind, message = (found[1], found[2].strip()) if found else (type(error).__name__, str(error))
    if not found and not isinstance(error, ImageError | ClipError | SettingsError | RunError):
        return None
    if kind == "NonFiniteError":
        failure: Exception = NonFiniteError("")
        failure.args = (message,)
        return failure
    return SettingsError(message) if kind == "SettingsError" else RunError(message)


def last_message(error: BaseException) -> str:
    """The name and the message of the exception at the end of an error whose own message is a traceback."""
    lines = str(error).rpartition(_TRACEBACK)[2].strip().splitlines()
    begin = max((n for n, line in enumerate(lines) if re.match(r"[\w.]+: |[\w.]+$", line)), default=len(lines) - 1)
    return "\n".join(lines[begin:])
