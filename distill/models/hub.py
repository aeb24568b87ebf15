"""Loading of models by name: local files first, then the hub, with one short attempt to reach it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants

from distill.connections import hub_reachable

T = TypeVar("T")


def load_from_hub(load: Callable[..., T], path: str, **options: Any) -> T:
    """Call `load(path, **options)`, a `from_pretrained`, for a folder or the name of a model on the hub.

    Files of the model that are on this machine are used as they are. Only if some are missing, the hub is contacted.

    Raises:
        OSError: files are missing and the hub is not reachable; the hub's client would retry each of them for minutes.
    """
    if Path(path).is_dir() or constants.HF_HUB_OFFLINE:
        return load(path, **options)
    try:
        return load(path, **options, local_files_only=True)
    except (OSError, ValueError):
        if not hub_reachable():
            raise OSError(
                f"it is not on this machine, and the hub at {constants.ENDPOINT} does not answer; "
                "connect once, or set the path to a folder"
            ) from None
    return load(path, **options)
