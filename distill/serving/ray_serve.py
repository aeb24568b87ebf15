"""The gateway on Ray Serve: replicas of it, as many as the load needs, behind Ray's HTTP proxy."""

import logging
import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from distill.errors import RunError, SettingsError
from distill.serving.app import create_app
from distill.serving.gateway import Gateway
from distill.serving.settings import ServeSettings

log = logging.getLogger(__name__)


def check_ray(settings: ServeSettings) -> None:
    """Raise SettingsError if Ray Serve is not installed, or a setting is not for it."""
    try:
        import ray.serve  # noqa: F401
    except ImportError as error:
        raise SettingsError(f"engine: ray needs {error.name}: pip install 'distill[serve,ray]'") from None
    if settings.port == 0:
        raise SettingsError("serve.port is 0; with engine: ray it takes the number of a port")


def serve_on_ray(make: Callable[[], Gateway], settings: ServeSettings, name: str) -> None:
    """Deploy the gateway and keep it until SIGTERM or SIGINT; then requests in flight are answered.

    The cluster is that of RAY_ADDRESS; without it Ray is started on this machine.

    Args:
        make: makes the gateway in the process of each replica, in the current directory; it can be pickled.

    Raises:
        RunError: there is no such cluster, or the gateway cannot be deployed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    directory = Path.cwd()

    def app() -> FastAPI:
        if directory.is_dir():
            os.chdir(directory)  # so that relative paths of the recipe mean the same files
        return create_app(make())

    own, seconds = settings.ray, math.ceil(settings.deadline_s)
    deployment = serve.deployment(serve.ingress(app)()).options(
        name=name,
        max_ongoing_requests=settings.queue,
        max_queued_requests=settings.queue,
        autoscaling_config={
            "min_replicas": own.min_replicas,
            "max_replicas": own.max_replicas,
            "target_ongoing_requests": own.target_requests,
        },
        graceful_shutdown_timeout_s=seconds + 1,
        ray_actor_options={"num_cpus": own.cpus, "num_gpus": own.gpus},
    )
    address = os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
        serve.start(http_options={"host": settings.host, "port": settings.port, "request_timeout_s": seconds})
        serve.run(deployment.bind(), name=name)
    except Exception as error:  # Ray raises many types
        ray.shutdown()
        raise RunError(f"the gateway cannot be deployed on Ray ({address}): {error}") from error
    log.info("%s is served on http://%s:%d by Ray", name, settings.host, settings.port)
    _wait_for_signal()
    serve.shutdown()
    ray.shutdown()


def _wait_for_signal() -> None:
    stop = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    stop.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
