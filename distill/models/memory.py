"""Memory of the process: its peak, what it returns to the system, and errors that name posts and settings that help."""

import ctypes
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from distill.errors import RunError

log = logging.getLogger(__name__)

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
_SHOWN = 8  # ids in the message


@contextmanager
def memory_errors(ids: Sequence[str] | Callable[[], Sequence[str]], remedy: str) -> Iterator[None]:
    """Context manager that turns an out-of-memory error into a RunError.

    Args:
        ids: the posts in memory, or a function that returns them when the error occurs.
        remedy: the settings that help.

    Raises:
        RunError: there is not enough memory, on the GPU or in this machine.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RunError) or not is_out_of_memory(error):
            raise
        posts = list(ids() if callable(ids) else ids)
        shown = ", ".join(posts[:_SHOWN]) + (", ..." if len(posts) > _SHOWN else "")
        where = f" with the posts {shown}" if posts else ""
        raise RunError(f"out of memory{where}; {remedy}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, on the GPU or in this machine."""
    text = str(error).casefold()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in text for sign in _SIGNS)


def reset_peak() -> None:
    """Let the peak memory (`peak_mb`) begin anew, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux: the peak is that of the whole process so far
        log.debug("the peak memory of the process cannot be reset on this system")


def peak_mb() -> dict[str, int]:
    """Peak memory since `reset_peak`, in MiB: of this process (host), and of the GPU if there is one."""
    peak = {}
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        peak["host"] = int(line.split()[1]) // 1024
    except (OSError, StopIteration):
        import resource

        unit = 1 << 20 if os.uname().sysname == "Darwin" else 1 << 10
        peak["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated() >> 20
    return peak


def return_freed() -> None:
    """Return freed memory to the system.

    glibc keeps it, in pieces between blocks in use, and a process grows from step to step: after a training of Gemma 3
    270M it holds 7.3 GB of which it uses .8 GB.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # not in musl
        trim(0)
