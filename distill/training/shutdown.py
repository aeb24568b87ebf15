"""Ends a command after SIGTERM, and all processes of a training if one of them fails or waits for a failed one."""

import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from distill.errors import RunError, SettingsError
from distill.files import write_text
from distill.masking import describe, mask

GRACE_SECONDS = 15.0
"""Time that a command has to end by itself after SIGTERM. Checkpoints are written atomically, so none is lost."""

_FAILURE_SECONDS = 3.0
"""Time that the main process has to raise the error of a worker itself: most errors occur in all processes."""

STATUS = 128 + signal.SIGTERM

INTERRUPTED = "distill: interrupted; run the same command again to continue"


class Terminated(KeyboardInterrupt):
    """SIGTERM: the command ends as after Ctrl-C."""


@contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """Within the context, SIGTERM raises Terminated in the main thread, and ends the process after GRACE_SECONDS."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        with end_together():
            yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def handle_sigterm(main_process: int) -> None:
    """Replace Lightning's handler of SIGTERM, which waits for the other processes; only the main process handles it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _raise_terminated if os.getpid() == main_process else signal.SIG_DFL)


def _raise_terminated(*_: Any) -> NoReturn:
    raise Terminated


@contextmanager
def end_together(
    children: Callable[[], Sequence[Any]] = tuple, parent: int | None = None, failures: Path | None = None
) -> Iterator[None]:
    """Within the context, end this process if it still runs GRACE_SECONDS after SIGTERM, or if another process failed.

    A process that waits for another one in C++ runs no Python code, so a thread watches the signals and processes.

    Args:
        children: returns the worker processes (`subprocess.Popen`), which are killed as well.
        parent: id of the main process; this process ends as soon as it is gone. None: this is the main process.
        failures: a file in which a worker process describes its failure to the main process, then waits for its end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    if failures is not None and parent is None:
        failures.unlink(missing_ok=True)
    earlier = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(receiver, children, parent, failures), name="shutdown", daemon=True)
    watch.start()
    try:
        yield
    except Exception as error:
        if parent is not None and failures is not None:
            _report(error, failures)
        if (ended := _ended(children())) is not None:  # it fails because a worker is gone
            raise RunError(ended) from error
        if parent is None:
            kill(children())
        raise
    finally:
        signal.set_wakeup_fd(earlier)
        sender.close()
        if failures is not None and parent is None:
            failures.unlink(missing_ok=True)


def _report(error: Exception, failures: Path) -> NoReturn:
    """Describe the failure of this worker process to the main process, which then ends both."""
    expected = isinstance(error, SettingsError | RunError)
    if not expected:
        print(mask(traceback.format_exc()), file=sys.stderr, end="")
    write_text(failures, f"{2 if isinstance(error, SettingsError) else 1} {describe(error)}")
    while True:
        time.sleep(60)


def _ended(children: Sequence[Any]) -> str | None:
    """Which of the worker processes has ended with an error; None if none has."""
    for rank, child in enumerate(children, start=1):
        poll = getattr(child, "poll", None)  # the processes of ddp_spawn are watched by torch
        if poll is not None and (status := poll()):
            if status > 0:
                return (
                    f"process {rank} of the training ended with status {status}; run the same command again to continue"
                )
            return (
                f"process {rank} of the training was killed by signal {-status}; run the same command again to continue"
            )
    return None


def _watch(
    receiver: socket.socket,
    children: Callable[[], Sequence[Any]],
    parent: int | None,
    failures: Path | None,
) -> None:
    deadline, status, message = None, STATUS, INTERRUPTED
    while deadline is None or time.monotonic() < deadline:
        if parent is not None and os.getppid() != parent:
            os._exit(STATUS)
        if parent is None and failures is not None and deadline is None:
            if failures.exists():
                number, _, text = failures.read_text(encoding="utf-8").partition(" ")
                deadline, status, message = time.monotonic() + _FAILURE_SECONDS, int(number), f"distill: {text}"
            elif (ended := _ended(children())) is not None:
                deadline, status, message = time.monotonic() + 1.0, 1, f"distill: {ended}"
        if not select.select([receiver], [], [], 0.5)[0]:
            continue
        signals = receiver.recv(64)
        if signal.SIGTERM in signals and deadline is None:
            deadline = time.monotonic() + GRACE_SECONDS
        if not signals:  # the training has ended
            if deadline is None or status != STATUS:
                receiver.close()
                return
            time.sleep(max(0.0, deadline - time.monotonic()))  # the process itself may still hang at its exit
    kill(children())
    # not print, and not into a full pipe: the main thread may be waiting in a write to sys.stderr, and hold its lock
    if parent is None and select.select([], [2], [], 0)[1]:
        os.write(2, f"{message}\n".encode())
    os._exit(status)


def kill(children: Sequence[Any]) -> None:
    """Kill worker processes."""
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
