"""Settings dataclasses as a tree: the fields of each section, and what is wrong with names and values in one sentence.

Nothing here knows the recipe; `recipe.py` is the one root that there is.
"""

import argparse
import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import jsonargparse

from distill.errors import SettingsError


def fields(section: type) -> dict[str, Any]:
    """Names and types of a section's fields."""
    return {item.name: item.type for item in dataclasses.fields(section)}


def section_of(annotation: Any) -> type | None:
    """The dataclass that a field holds, always or optionally; None for a field of values."""
    kinds = [kind for kind in (annotation, *typing.get_args(annotation)) if isinstance(kind, type)]
    return next(filter(dataclasses.is_dataclass, kinds), None)


def optional_sections(section: type, path: str = "") -> Iterator[tuple[str, type]]:
    """The dotted names of the sections that may be left out, with their dataclasses."""
    for name, annotation in fields(section).items():
        if inner := section_of(annotation):
            if inner is not annotation:
                yield path + name, inner
            yield from optional_sections(inner, f"{path}{name}.")


def build(section: type, values: Any, path: str = "") -> Any:
    """A section from what was parsed. Raises SettingsError, named by its place, for what a section refuses itself."""
    content = {name: values[name] for name in fields(section)}
    for name, annotation in fields(section).items():
        if (inner := section_of(annotation)) and content[name] is not None:
            content[name] = build(inner, content[name], f"{path}{name}.")
    try:
        return section(**content)
    except ValueError as error:  # SettingsError among them
        message = str(error)
        raise SettingsError(message if message.startswith(path) else path + message) from None


def check_names(root: type, values: Mapping[Any, Any], section: type | None = None, path: str = "") -> None:
    """Raises SettingsError for an unknown field or a value in a section's place; jsonargparse passes over some."""
    section = section or root
    for name, value in values.items():
        if name not in fields(section):
            raise SettingsError(unknown(root, f"{path}{name}"))
        inner = section_of(fields(section)[name])
        if inner and isinstance(value, Mapping):
            check_names(root, value, inner, f"{path}{name}.")
        elif inner and value is not None:
            raise SettingsError(_no_section(root, f"{path}{name}", value))


class SectionHelp(argparse.Action):
    """`--student.model.lora.help`: the fields of an optional section inside another one."""

    def __init__(self, **given: Any) -> None:
        super().__init__(nargs=0, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **given)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        section = jsonargparse.ArgumentParser(prog=parser.prog)
        section.add_class_arguments(self.const, self.dest.removesuffix(".help"))
        section.print_help()
        parser.exit()


_TAKES = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text; quote it in YAML",
    "list": "a list such as [a, b]", "dict": "a mapping such as {name: value}",
}  # fmt: skip


def sentence(root: type, error: BaseException) -> str:
    """The innermost complaint of jsonargparse, with the field's dotted name, its value, and what it takes."""
    text = re.sub(r"<class '([^']+)'>", r"\1", str(error)).replace("typing.", "")
    path = ".".join(re.findall(r"[Pp]arser key \"([^\"]+)\":$", text, re.MULTILINE))
    dot = path and f"{path}."
    if found := re.search(r"Option '([^']+)' is not accepted|nrecognized arguments: --([^\s=]+)", text):
        return unknown(root, f"{dot}{found[1] or found[2]}")
    if found := re.search(r"Group '([^']+)' does not accept option '([^']+)'", text):
        return unknown(root, f"{dot}{found[1]}.{found[2]}")
    if found := re.search(r"arguments are required: (\S+)|[Kk]ey \"([^\"]+)\" is required", text):
        return f"{dot}{found[1] or found[2]} is required"
    given = re.search(r"Got value: (.*)|NestedArg\(.*val='(.*)'\)|Given value: (.*)|Unable to load config '(.*)'", text)
    value = next(filter(None, given.groups()), "") if given else ""
    if re.search("dot import path|Not a valid subclass|Unable to load config", text):
        return _no_section(root, path, value)
    kinds = dict.fromkeys(re.findall(r"Expected an? (\w+(?:\[.*?\])?)", text))
    kinds.pop("NoneType", None)
    if not kinds:
        return f"{dot and path + ': '}{' '.join(text.split())}"
    return f"{path}: {value} is not {' or '.join(map(_takes, kinds))}"


def unknown(root: type, path: str) -> str:
    """A field that is not there: where it was looked for, and what is there instead."""
    section: type | None = root
    parts = path.split(".")
    for depth, part in enumerate(parts):
        known = fields(section) if section else {}
        if part not in known:
            close = difflib.get_close_matches(part, known, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            where = ".".join(parts[:depth]) or f"the {root.__name__.lower()}"
            return f"{'.'.join(parts[: depth + 1])} is not a field{hint}; {where} takes {', '.join(known)}"
        section = section_of(known[part])
    return f"{path} is not a field"


def _no_section(root: type, path: str, value: object) -> str:
    section: Any = root
    for part in path.split("."):
        section = section_of(fields(section)[part])
    return f"{path}: {value} is not a section; it takes {', '.join(fields(section))}"


def _takes(kind: str) -> str:
    name, _, choices = kind.partition("[")
    return f"one of {choices[:-1].replace(chr(39), '')}" if name == "Literal" else _TAKES.get(kind, kind)
