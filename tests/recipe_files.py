"""Helpers for tests of recipes: loading from command-line arguments, and error messages."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.errors import SettingsError
from distill.recipe import Recipe, load, parser

ENDPOINT = {"base_url": "http://localhost:8000/v1", "model": "big-vl"}

options = functools.cache(parser)


def loaded(*arguments: str) -> Recipe:
    """The recipe that `distill run` loads from these arguments."""
    return load(options("run"), arguments)[0]


def rejected(*arguments: str) -> str:
    """The error message for these arguments: one line, without names of Python types or of jsonargparse."""
    with pytest.raises(SettingsError) as error:
        loaded(*arguments)
    message = str(error.value)
    assert message and "\n" not in message
    assert not re.search(r"<class|Traceback|jsonargparse|Namespace|Union", message)
    return message


def change(path: Path, name: str, value: Any) -> None:
    """Set one field of a recipe file by its dotted name."""
    content = yaml.safe_load(path.read_text())
    *sections, field = name.split(".")
    target = content
    for section in sections:
        if not isinstance(target.get(section), dict):
            target[section] = {}
        target = target[section]
    target[field] = value
    path.write_text(yaml.safe_dump(content))
