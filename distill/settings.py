"""Trees of settings dataclasses: their fields, construction from parsed values, and error messages.

This module is independent of the recipe; `recipe.py` defines the root of the tree.
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
    """Names and types of the fields of a section."""
    return {item.name: item.type for item in dataclasses.fields(section)}


def section_of(annotation: Any) -> type | None:
    """The dataclass of a section field, optional or not; None if the field is not a section."""
    kinds = [kind for kind in (annotation, *typing.get_args(annotation)) if isinstance(kind, type)]
    return next(filter(dataclasses.is_dataclass, kinds), None)


def optional_sections(section: type, path: str = "") -> Iterator[tuple[str, type]]:
    """Yield the dotted names of the optional sections, with their dataclasses."""
    for name, annotation in fields(section).items():
        if inner := section_of(annotation):
            if inner is not annotation:
                yield path + name, inner
            yield from optional_sections(inner, f"{path}{name}.")


def build(section: type, values: Any, path: str = "") -> Any:
    """Construct a section from parsed values. Raises SettingsError with the dotted name for a value that it rejects."""
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
    """Raise SettingsError for an unknown field or a value in place of a section; jsonargparse ignores some of them."""
    section = section or root
    for name, value in values.items():
        if name not in fields(section):
            raise SettingsError(unknown_field_message(root, f"{path}{name}"))
        inner = section_of(fields(section)[name])
        if inner and isinstance(value, Mapping):
            check_names(root, value, inner, f"{path}{name}.")
        elif inner and value is not None:
            raise SettingsError(_not_a_section_message(root, f"{path}{name}", value))


class SectionHelp(argparse.Action):
    """An option such as `--student.model.lora.help`: prints the help of an optional section inside another one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=0, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        section = jsonargparse.ArgumentParser(prog=parser.prog)
        section.add_class_arguments(self.const, self.dest.removesuffix(".help"))
        section.print_help()
        parser.exit()


_TYPE_NAMES = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text; quote it in YAML",
    "list": "a list such as [a, b]", "dict": "a mapping such as {name: value}",
}  # fmt: skip


def parse_error_message(root: type, error: BaseException) -> str:
    """One line for an error of jsonargparse: the dotted name of the field, its value, and the expected type."""
    text = re.sub(r"<class '([^']+)'>", r"\1", str(error)).replace("typing.", "")
    path = ".".join(re.findall(r"[Pp]arser key \"([^\"]+)\":$", text, re.MULTILINE))
    dot = path and f"{path}."
    if found := re.search(r"Option '([^']+)' is not accepted|nrecognized arguments: --([^\s=]+)", text):
        return unknown_field_message(root, f"{dot}{found[1] or found[2]}")
    if found := re.search(r"Group '([^']+)' does not accept option '([^']+)'", text):
        return unknown_field_message(root, f"{dot}{found[1]}.{found[2]}")
    if found := re.search(r"arguments are required: (\S+)|[Kk]ey \"([^\"]+)\" is required", text):
        return f"{dot}{found[1] or found[2]} is required"
    given = re.search(r"Got value: (.*)|NestedArg\(.*val='(.*)'\)|Given value: (.*)|Unable to load config '(.*)'", text)
    value = next(filter(None, given.groups()), "") if given else ""
    if re.search("dot import path|Not a valid subclass|Unable to load config", text):
        return _not_a_section_message(root, path, value)
    kinds = dict.fromkeys(re.findall(r"Expected an? (\w+(?:\[.*?\])?)", text))
    kinds.pop("NoneType", None)
    if not kinds:
        return f"{dot and path + ': '}{' '.join(text.split())}"
    return f"{path}: {value} is not {' or '.join(map(_type_name, kinds))}"


def unknown_field_message(root: type, path: str) -> str:
    """The message for an unknown field: the closest name, and the fields of its section."""
    section: type | None = root
    parts = path.split(".")
    for depth, part in enumerate(parts):
        known = fields(section) if section else {}
        if part not in known:
            close = difflib.get_close_matches(part, known, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            where = ".".join(parts[:depth]) or f"the {root.__name__.lower()}"
            return f"{'.'.join(parts[: depth + 1])} is not a field{hint}; the fields of {where} are {', '.join(known)}"
        section = section_of(known[part])
    return f"{path} is not a field"


def _not_a_section_message(root: type, path: str, value: object) -> str:
    section: Any = root
    for part in path.split("."):
        section = section_of(fields(section)[part])
    return f"{path}: {value} is not a section; its fields are {', '.join(fields(section))}"


def _type_name(kind: str) -> str:
    name, _, choices = kind.partition("[")
    return f"one of {choices[:-1].replace(chr(39), '')}" if name == "Literal" else _TYPE_NAMES.get(kind, kind)
