"""The processes of a distributed training: which one is a worker, and what another process failed with.

`ddp` starts workers by running the command again; environment variables tell them which training started them.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

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
    """The folder of the training that started this worker process; None in the process that the user started.

    Raises:
        SettingsError: another program, such as torchrun, has started this process as a worker.
    """
    if not is_worker():
        return None
    if _ACTIVE_FOLDER not in os.environ:
        raise SettingsError("LOCAL_RANK is set: start distill as one process; trainer.devices starts the others")
    return Path(os.environ[_ACTIVE_FOLDER])


def is_worker() -> bool:
    """Whether a training has started this process by running the command again."""
    return int(os.environ.get("LOCAL_RANK", "0")) > 0


def should_train(folder: Path) -> bool:
    """Whether this process takes part in the training in `folder`.

    A strategy that starts worker processes by running the command again (ddp) makes them reach every earlier training
    as well; a worker skips all trainings except the one that started it.
    """
    return not is_worker() or os.environ.get(_ACTIVE_FOLDER) == str(folder)


def begin(folder: Path) -> int | None:
    """Name the training in `folder` to the workers that it will start. Returns a worker's main process, else None."""
    if is_worker():
        return int(os.environ[_MAIN_PROCESS])
    os.environ |= {_ACTIVE_FOLDER: str(folder), _MAIN_PROCESS: str(os.getpid())}
    return None


def end() -> None:
    """Destroy the process group and Lightning's environment variables, so that the next fit starts its own workers."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in (_ACTIVE_FOLDER, _MAIN_PROCESS, "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
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
