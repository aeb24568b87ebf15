"""Data sets of the Hugging Face hub by name: the files of a split, resolved by `datasets` without downloading them."""

import re

from distill.errors import RunError, SettingsError, first_line

PREFIX = "hub:"
_NAME = re.compile(r"hub:(?P<name>[\w.-]+(/[\w.-]+)?)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")


def files(entry: str) -> list[str]:
    """The URLs of the files of a split.

    Args:
        entry: `hub:owner/name`, `hub:owner/name:split` or `hub:owner/name/config:split`; the split is train if none
            is named.

    Raises:
        SettingsError: there is no such data set, configuration or split, or it is not made of files.
        RunError: the hub cannot be reached.
    """
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetNotFoundError

    if (parts := _NAME.fullmatch(entry)) is None:
        raise SettingsError(f"{entry} is no name of a data set: hub:owner/name[/config][:split]")
    split = parts["split"] or "train"
    try:
        builder = load_dataset_builder(parts["name"], parts["config"])
    except (DatasetNotFoundError, FileNotFoundError, ValueError) as error:
        raise SettingsError(f"{entry} cannot be used: {first_line(error)}") from None
    except (ConnectionError, OSError) as error:
        raise RunError(f"{entry}: the hub cannot be reached: {first_line(error)}") from error
    found = builder.config.data_files or {}
    if split not in found:
        raise SettingsError(f"{entry} has no split {split}; its splits are {', '.join(map(str, found)) or 'none'}")
    return [str(url) for url in found[split]]
