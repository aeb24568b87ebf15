"""The recipes and overlays that a command line names."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from distill.errors import SettingsError
from distill.settings import check_names, fields, read_yaml


def read_files(arguments: Sequence[str], recipe: type) -> dict[str, Any]:
    """Contents of the files of `--config` by path, with the fields of `recipe`.

    Raises:
        SettingsError: a file cannot be read, or has an unknown field.
    """
    contents: dict[str, Any] = {}
    trainer: dict[str, Any] = {}  # of the files so far
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    files.add_argument("--config", action="append", nargs="?", default=[])
    for file in filter(None, files.parse_known_args(arguments)[0].config):
        try:
            content = read_yaml(recipe, Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise SettingsError(f"--config: cannot read {file}: {error.strerror}") from None
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            raise SettingsError(f"--config: {file} is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict):
            raise SettingsError(f"--config: {file} has no fields; a recipe has {', '.join(fields(recipe))}")
        entries = {name: content.pop(f"trainer.{name}") for name in _entries(content)}
        check_names(recipe, content)
        if entries:
            content["trainer"] = trainer | (content.get("trainer") or {}) | entries
        trainer = content.get("trainer", trainer) or {}
        contents[file] = content
    return contents


def _entries(content: Mapping[Any, Any]) -> list[str]:
    """Names of the Trainer arguments that a file sets one by one, as in `trainer.devices: 2`: the others stay."""
    return [name.removeprefix("trainer.") for name in content if str(name).startswith("trainer.")]
