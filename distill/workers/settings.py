"""Settings of the Ray workers, and whether Ray is installed."""

from dataclasses import dataclass
from importlib.util import find_spec

from distill.errors import SettingsError, first_line
from distill.settings import Count, NonNegative, Settings


@dataclass
class RaySettings(Settings):
    """The workers of `engine: ray`."""

    address: str = ""
    """Address of the cluster, such as auto; empty: that in RAY_ADDRESS, otherwise Ray is started on this machine."""
    workers: Count = 2
    """Number of workers. Each holds a model of its own, or has `concurrency` requests to an endpoint in flight."""
    cpus: NonNegative = 1.0
    """CPUs of each worker."""
    gpus: NonNegative = 0.0
    """GPUs of each worker, such as 1 or 0.5; 0: its model computes on the CPU."""
    batch_size: Count = 256
    """Number of posts per call of a worker."""
    files: str = ""
    """fsspec address of a copy of data.root, such as s3://bucket/posts, from which the workers read the files of posts;
    empty: they see data.root itself."""


def check(settings: RaySettings) -> None:
    """Raise SettingsError if Ray is not installed, or what reads the addresses of `ray.files`."""
    if find_spec("ray") is None:
        raise SettingsError("engine: ray needs the package ray: pip install 'distill[ray]'")
    if settings.files:
        import fsspec

        try:
            fsspec.get_filesystem_class(fsspec.utils.get_protocol(settings.files))
        except (ImportError, ValueError) as error:
            raise SettingsError(f"ray.files: {settings.files} cannot be read: {first_line(error)}") from None
