"""Reference page of a settings tree: every field with its dotted name, type, default and help, as Markdown tables.

The documentation is built from it (`docs/hooks.py`), so the page cannot differ from what a recipe accepts.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import docstring_parser

from distill.settings import section_of

REQUIRED = "required"


@dataclass(frozen=True)
class FieldEntry:
    """One field: its dotted name, type, default and help; `section` is set where the field holds a section."""

    name: str
    type: str
    default: str
    help: str
    section: str | None = None


@dataclass(frozen=True)
class SectionEntry:
    """One section: its dotted name (empty for the root), what it is for, and its fields."""

    name: str
    summary: str
    optional: bool
    fields: tuple[FieldEntry, ...]


def sections(root: type) -> list[SectionEntry]:
    """All sections of a settings dataclass, the root first, each followed by the sections inside it."""
    return list(_sections(root, "", optional=False, values=None))


def page(root: type, title: str, intro: str) -> str:
    """A Markdown page with one table per section. Anchors are the dotted names of sections and fields."""
    parts = [f"# {title}", intro]
    for section in sections(root):
        depth = min(section.name.count(".") + 2, 3)
        heading = f"`{section.name}`" if section.name else "Top level"
        parts.append(f"{'#' * depth} {heading} {{ #{section.name or 'top-level'} }}")
        null = " The section is optional: without it, it is `null`." if section.optional else ""
        parts.append(_escape(section.summary) + null)
        rows = ["| Field | Type | Default | Description |", "| --- | --- | --- | --- |"]
        rows += [_row(entry) for entry in section.fields]
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def field_help(section: type) -> dict[str, str]:
    """The string below each field of a dataclass, inherited fields included, on one line."""
    found: dict[str, str] = {}
    for kind in reversed(section.__mro__):
        if dataclasses.is_dataclass(kind):
            parsed = docstring_parser.parse_from_object(kind)
            found |= {param.arg_name: " ".join((param.description or "").split()) for param in parsed.params}
    return {item.name: found.get(item.name, "") for item in dataclasses.fields(section)}


def _sections(section: type, path: str, *, optional: bool, values: Any) -> Iterator[SectionEntry]:
    help_of, entries, inner_sections = field_help(section), [], []
    for item in dataclasses.fields(section):
        name = f"{path}.{item.name}" if path else item.name
        default = getattr(values, item.name) if values is not None else _default(item)
        inner = section_of(item.type)
        if inner is None:
            entries.append(FieldEntry(name, _type(item.type), _value(default), help_of[item.name]))
            continue
        inner_optional = inner is not item.type
        shown = _value(None if inner_optional and default is None else {})
        entries.append(FieldEntry(name, "section", shown, help_of[item.name], section=name))
        inner_sections.append((inner, name, inner_optional, default if dataclasses.is_dataclass(default) else None))
    summary = " ".join((section.__doc__ or "").split("\n\n")[0].split())
    yield SectionEntry(path, summary, optional, tuple(entries))
    for inner, name, inner_optional, default in inner_sections:
        yield from _sections(inner, name, optional=inner_optional, values=default)


def _default(item: "dataclasses.Field[Any]") -> Any:
    if item.default is not dataclasses.MISSING:
        return item.default
    return item.default_factory() if item.default_factory is not dataclasses.MISSING else dataclasses.MISSING


def _value(value: Any) -> str:
    """A default as YAML takes it, in one line."""
    return REQUIRED if value is dataclasses.MISSING else f"`{json.dumps(value, ensure_ascii=False)}`"


def _type(annotation: Any) -> str:
    """A type in the words of a recipe: `str`, `list[str]`, or the values that a field takes."""
    if annotation is None or annotation is types.NoneType:
        return "`null`"
    if annotation is Any:
        return "any"
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return f"{_type(parts[0])} ({parts[1]})"
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(part) for part in parts)
    if origin is not None:
        return f"`{origin.__name__}[{', '.join(_type(part).strip('`') for part in parts)}]`"
    return f"`{annotation.__name__}`"


def _row(entry: FieldEntry) -> str:
    section, dot, last = entry.name.rpartition(".")
    name = f'<code id="{entry.name}">{section}{dot}{"<wbr>" if dot else ""}{last}</code>'  # may break at the last dot
    if entry.section is not None:
        name = f"[`{entry.name}`](#{entry.section})"
    return f"| {name} | {entry.type} | {entry.default} | {_escape(entry.help)} |"


def _escape(text: str) -> str:
    """Text in a table cell: no cell separators, no HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;")
