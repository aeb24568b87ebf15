"""Worker processes: each measured implementation runs in a process of its own."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any


def worker() -> ProcessPoolExecutor:
    """A pool of one spawned process, which starts with the first call."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def call(process: ProcessPoolExecutor, function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns the result of a function called in a worker process, or a message (str) if memory does not suffice."""
    try:
        return process.submit(function, *arguments).result()
    except BrokenProcessPool:
        return "the process was killed"
    except MemoryError:
        return "out of memory"
    except RuntimeError as error:  # torch.OutOfMemoryError included; the allocator on a CPU raises a plain one
        if "out of memory" not in str(error) and "allocate memory" not in str(error):
            raise
        return "out of memory"


def call_alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """`call` in a fresh process, which ends with the call."""
    with worker() as process:
        return call(process, function, *arguments)
