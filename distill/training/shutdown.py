"""Ends all processes of a training after SIGTERM, also those that wait in a collective operation."""

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

GRACE_SECONDS = 15.0
"""Time that a training has to end by itself after SIGTERM. Checkpoints are written atomically, so none is lost."""

STATUS = 128 + signal.SIGTERM


@contextmanager
def end_on_sigterm(children: Callable[[], Sequence[int]], parent: int | None = None) -> Iterator[None]:
    """Within the context, end this process GRACE_SECONDS after SIGTERM if it still runs.

    Lightning ends a training at its next batch. A process that waits for another one in C++ does not get there and
    runs no Python signal handler, so a thread watches the signals.

    Args:
        children: returns the ids of the worker processes, which are killed as well.
        parent: id of the main process; this process ends as soon as it is gone. None: this is the main process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    earlier = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(receiver, children, parent), name="shutdown", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier)
        sender.close()


def _watch(receiver: socket.socket, children: Callable[[], Sequence[int]], parent: int | None) -> None:
    deadline = None
    while deadline is None or time.monotonic() < deadline:
        if parent is not None and os.getppid() != parent:
            os._exit(STATUS)
        if not select.select([receiver], [], [], 0.5)[0]:
            continue
        signals = receiver.recv(64)
        if signal.SIGTERM in signals and deadline is None:
            deadline = time.monotonic() + GRACE_SECONDS
        if not signals:  # the training has ended
            if deadline is None:
                receiver.close()
                return
            time.sleep(max(0.0, deadline - time.monotonic()))  # the process itself may still hang at its exit
    for child in children():
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    os._exit(STATUS)
