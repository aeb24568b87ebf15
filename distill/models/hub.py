"""Models by name: local files first, then the hub, with one short attempt to reach it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants, try_to_load_from_cache
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from distill.connections import hub_reachable
from distill.files import damage

T = TypeVar("T")

_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
_ADAPTERS = (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME)


def is_hub_id(name: str) -> bool:
    """Whether the name of a model is an id of the hub, `user/name`, and not a folder on this machine."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def load_from_hub(load: Callable[..., T], path: str, **options: Any) -> T:
    """Call `load(path, **options)`, a `from_pretrained`, for a folder or the name of a model on the hub.

    Files of the model that are on this machine are used as they are. Only if some are missing, the hub is contacted.

    Raises:
        OSError: the folder is missing; or files are missing and the hub is not reachable, which the hub's client would
            find out by retrying each of them for minutes.
    """
    if not Path(path).is_dir() and (path.startswith(("/", ".", "~")) or path.count("/") > 1):
        raise OSError("there is no such folder")
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


def missing_weights(path: str, revision: str, *, adapter: bool = False) -> str | None:
    """Why the weights of a model or of an adapter cannot be loaded; None if they are here or the hub may have them."""

    def find(name: str) -> Path | None:
        if Path(path).is_dir():
            return file if (file := Path(path) / name).is_file() else None
        cached = try_to_load_from_cache(path, name, revision=revision)
        return Path(cached) if isinstance(cached, str) else None

    names = _ADAPTERS if adapter else _WEIGHTS
    found = {name: file for name in names if (file := find(name)) is not None}
    if found:
        name, file = next(iter(found.items()))
        shards = _shards(file) if name.endswith(".json") else []
        missing = [shard for shard in shards if find(shard) is None]
        if not missing:
            files = [part for part in map(find, shards or [name]) if part is not None]
            damaged = ((part.name, problem) for part in files if (problem := damage(part)) is not None)
            return next((f"{file} is damaged: {problem}" for file, problem in damaged), None)
        problem = f"{len(missing)} of its {len(shards)} files of weights are missing, such as {missing[0]}"
    else:
        problem = f"it has no weights, such as {names[0]}"
    if Path(path).is_dir():
        return problem
    return f"on this machine, {problem}" if constants.HF_HUB_OFFLINE or not hub_reachable() else None


def _shards(index: Path) -> list[str]:
    """The files that an index of weights names. Raises ValueError if it is none."""
    content = json.loads(index.read_text(encoding="utf-8"))
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index.name} has no weight_map")
    return sorted(set(names.values()))
