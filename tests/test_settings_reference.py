"""The generated settings page: every field with its default, and help texts as `--help` prints them."""

import dataclasses
import io
import re
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from distill import recipe
from distill.recipe import Recipe
from distill.settings import fields, section_of
from distill.settings_reference import field_help, page, sections


@dataclass
class Inner:
    """Inside.

    More about it.
    """

    size: int = 3
    """How many | <at most>."""


@dataclass
class Base:
    """A base."""

    colour: Literal["red", "blue"] = "red"
    """Paint."""
    tags: dict[str, Any] = field(default_factory=dict)
    """Of the
    base."""


@dataclass
class Root(Base):
    """The root."""

    needed: str = dataclasses.field(kw_only=True)
    """Must be given."""
    inner: Inner = field(default_factory=lambda: Inner(size=5))
    """Always there."""
    other: Inner | None = None
    """There or not."""


def paths(section: type, path: str = "") -> list[tuple[str, Any]]:
    """Every field of values with its dotted name and dataclass field, found without the code under test."""
    found = []
    for item in dataclasses.fields(section):
        inner = section_of(fields(section)[item.name])
        found += paths(inner, f"{path}{item.name}.") if inner else [(path + item.name, item)]
    return found


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def test_sections_come_in_order_with_their_own_defaults() -> None:
    root, inner, other = sections(Root)
    assert (root.name, inner.name, other.name) == ("", "inner", "other")
    assert (root.summary, inner.summary) == ("The root.", "Inside.")
    assert (inner.optional, other.optional) == (False, True)
    assert {entry.name: entry.default for entry in root.fields} == {
        "colour": '`"red"`', "tags": "`{}`", "needed": "required", "inner": "`{}`", "other": "`null`",
    }  # fmt: skip
    assert [entry.default for entry in inner.fields + other.fields] == ["`5`", "`3`"]


def test_types_are_written_as_a_recipe_takes_them() -> None:
    types = {entry.name: entry.type for section in sections(Recipe) for entry in section.fields}
    assert types["data.source"] == "`jsonl`, `twitter`, `mvsa`, `mosi`, `mmsa`, `meld`, `postcards`, `clips`, `stream`"
    assert types["task.labels"] == "`list[str]` or `null`"
    assert types["annotate.endpoint.prompt_price"] == "`float` (0 or more) or `null`"
    assert types["trainer"] == "`dict[str, any]`"


def test_help_is_that_of_the_class_and_its_bases() -> None:
    assert field_help(Root) == {
        "colour": "Paint.", "tags": "Of the base.", "needed": "Must be given.", "inner": "Always there.",
        "other": "There or not.",
    }  # fmt: skip


def test_cells_cannot_break_the_table() -> None:
    assert "| How many \\| &lt;at most>. |" in page(Root, "Title", "Intro.")


def test_every_field_of_a_recipe_is_on_the_page_with_default_and_help() -> None:
    text = page(Recipe, "Settings", "All fields.")
    rows = dict(re.findall(r'^\| <code id="([\w.]+)">.*?</code> (\|.*)$', text, re.MULTILINE))
    expected = dict(paths(Recipe))
    assert len(expected) > 100 and set(rows) == set(expected)
    help_of = {entry.name: entry.help for section in sections(Recipe) for entry in section.fields}
    for name, item in expected.items():
        default = {None: "null", True: "true", False: "false"}.get(item.default) if _is_plain(item.default) else None
        if default is None and isinstance(item.default, int):
            default = str(item.default)
        assert default is None or f"| `{default}` | " in rows[name], name
        assert len(help_of[name]) > 3 and rows[name].endswith(" |"), name
    assert "| `0.3` | " in rows["student.distillation.weight"] and "| required | " in rows["name"]
    assert '| `{"reason": 1.0, "classify": 1.0}` | ' in rows["student.tasks"]


def test_help_is_what_the_command_line_prints() -> None:
    printed = io.StringIO()
    with redirect_stdout(printed), pytest.raises(SystemExit):
        recipe.parser("run").parse_args(["--student.help"])
    words = " ".join(printed.getvalue().split())
    (student,) = (section for section in sections(Recipe) if section.name == "student")
    for entry in student.fields:
        if entry.section is None:
            assert entry.help in words, entry.name
