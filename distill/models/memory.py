"""Out-of-memory errors that name the posts and the settings that help."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from distill.errors import RunError

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
