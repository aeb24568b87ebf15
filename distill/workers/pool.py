"""A pool of Ray actors that works through a Ray dataset, with the backpressure of Ray Data."""

import logging
import math
import os
import pickle
import platform
import re
import signal
import socket
import threading
import traceback
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import RunError, SettingsError, first_line
from distill.workers.settings import RaySettings, check

log = logging.getLogger(__name__)

Work = Callable[[Any], Any]

_CONNECT_S = 10.0
_QUEUED = 2  # items that an actor has at a time: the one that it works on and the next
_STARTS = 6  # of one actor: Ray Data restarts it without end, also if a process dies on the same post each time


@contextmanager
def cluster(settings: RaySettings) -> Iterator[None]:
    """Connect to the cluster of the settings, or start Ray on this machine; a connection that exists is used.

    Raises:
        SettingsError: Ray is not installed.
        RunError: there is no cluster at the address.
    """
    check(settings)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import ray.data

    for name in ("ray", "ray.data"):  # its notices about each dataset
        logging.getLogger(name).setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    address = settings.address or os.environ.get("RAY_ADDRESS") or "local"
    cpus = max(os.cpu_count() or 1, math.ceil(settings.workers * settings.cpus))
    options: dict[str, Any] = {"num_cpus": cpus, "include_dashboard": False} if address == "local" else {}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if match := re.fullmatch(r"([\w.-]+):(\d+)", address):  # Ray would wait for minutes
            socket.create_connection((match[1], int(match[2])), _CONNECT_S).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # Ray raises many types
        raise RunError(f"ray.address: Ray cannot be used at {address}: {first_line(error)}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray ends the process with another status
    try:
        yield
    finally:
        ray.shutdown()


def new_folder(parent: Path) -> Path:
    """A new folder for the workers of one `run`."""
    folder = parent.absolute() / uuid.uuid4().hex[:12]
    folder.mkdir(parents=True)
    return folder


def run(
    settings: RaySettings, make: Callable[[], Work], items: Sequence[Any], folder: Path, *, ordered: bool = False
) -> Generator[Any]:
    """Yield the result of the work on each item as soon as it is done.

    An item is done again if its worker was killed, in the process that replaces it; `actor_id` is the same there.

    Args:
        make: called in each worker process, and can be pickled; what it returns is called with one item at a time.
        folder: a `new_folder`, which all workers must see; they count their starts there.
        ordered: yield the results in the order of the items.

    Raises:
        SettingsError, RunError: what `make` or the work raises, an unexpected error as a RunError; a worker does not
            see the folder, or was killed too often.
    """
    with cluster(settings):
        import ray
        from ray.data import ActorPoolStrategy
        from ray.exceptions import RayError

        size = min(settings.workers, len(items))
        _warn_if_large(ray.cluster_resources(), settings, size)
        rows = [{"item": pickle.dumps(item)} for item in items]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor,
            fn_constructor_args=(pickle.dumps(make), Path.cwd(), folder),
            batch_size=1,
            compute=ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=_QUEUED),
            num_cpus=settings.cpus,
            num_gpus=settings.gpus or None,
        )
        dataset.context.enable_progress_bars = False
        dataset.context.execution_options.preserve_order = ordered
        try:
            for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
                for result in batch["result"]:
                    yield _unpacked(result)
        except RayError as error:
            raise RunError(f"a Ray worker failed: {first_line(error)}") from error


def _warn_if_large(available: dict[str, float], settings: RaySettings, size: int) -> None:
    for name, each in (("CPU", settings.cpus), ("GPU", settings.gpus)):
        if (have := available.get(name, 0.0)) < size * each:
            log.warning(
                "%d Ray workers need %g %ss and the cluster has %g; the others start when nodes join",
                size, size * each, name, have,
            )  # fmt: skip


def _unpacked(result: bytes) -> Any:
    kind, value, trace = pickle.loads(result)
    if kind == "done":
        return value
    if trace:
        log.error("%s", trace.strip())
    raise (SettingsError if kind == "settings" else RunError)(value)


def actor_id() -> str:
    """The id of the actor that runs in this process."""
    import ray

    return str(ray.get_runtime_context().get_actor_id())


class _Actor:
    """What Ray Data calls in each worker process. An error is a result, because Ray would wrap it into its own."""

    def __init__(self, make: bytes, directory: Path, folder: Path) -> None:
        self._make, self._directory, self._folder = make, directory, folder
        self._work: Work | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[bytes]]:
        return {"result": [pickle.dumps(self._answer(item)) for item in batch["item"]]}

    def _answer(self, item: bytes) -> tuple[str, Any, str]:
        try:
            if self._work is None:
                self._work = self._start()
            return "done", self._work(pickle.loads(item)), ""
        except SettingsError as error:
            return "settings", str(error), ""
        except RunError as error:
            return "run", str(error), ""
        except Exception as error:  # noqa: BLE001 - raised by the driver
            return "run", f"a Ray worker failed: {first_line(error)}", traceback.format_exc()

    def _start(self) -> Work:
        if not self._folder.is_dir():
            raise SettingsError(
                f"the Ray worker on {platform.node()} does not see {self._folder}: the run's folder must be on a file "
                "system that all nodes of the cluster share"
            )
        with (self._folder / f"{actor_id()}.starts").open("ab") as starts:
            starts.write(b".")
            if starts.tell() > _STARTS:
                raise RunError(f"a Ray worker was killed {_STARTS} times; is its memory too small? Its logs say more")
        if self._directory.is_dir():
            os.chdir(self._directory)  # so that relative paths of the recipe mean the same files
        work: Work = pickle.loads(self._make)()
        return work
