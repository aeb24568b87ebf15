"""Trees of settings dataclasses, independent of the recipe: construction and error messages."""

from dataclasses import dataclass, field
from typing import Any, Literal

import jsonargparse
import pytest

from distill.errors import SettingsError
from distill.settings import build, check_names, fields, optional_sections, parse_error_message, section_of


@dataclass
class Wheel:
    """A wheel."""

    size: int = 20
    """Inches."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise SettingsError(f"size is {self.size}; it takes 1 or more")


@dataclass
class Cart:
    """A cart."""

    colour: Literal["red", "blue"] = "red"
    """Paint."""
    front: Wheel = field(default_factory=Wheel)
    """The front wheel."""
    spare: Wheel | None = None
    """An optional spare wheel."""
    load: float | None = None
    """Kilograms."""
    tags: dict[str, Any] = field(default_factory=dict)
    """Free-form properties."""


@dataclass
class Train:
    """Carts."""

    first: Cart = field(default_factory=Cart)
    """The first cart."""
    last: Cart | None = None
    """The last cart."""


def parsed(*arguments: str) -> Train:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Train, None)
    return build(Train, parser.parse_args(list(arguments)))


def test_sections_are_found_in_required_and_optional_fields() -> None:
    assert section_of(Cart) is Cart and section_of(fields(Train)["last"]) is Cart
    assert section_of(dict[str, Any]) is None and section_of(Literal["red"]) is None and section_of(int | None) is None
    assert list(optional_sections(Train)) == [("first.spare", Wheel), ("last", Cart), ("last.spare", Wheel)]


def test_parsed_values_become_dataclasses() -> None:
    train = parsed("--first.front.size", "3", "--last", "{}", "--last.spare.size", "9", "--first.tags.wood", "oak")
    assert train == Train(Cart(front=Wheel(3), tags={"wood": "oak"}), Cart(spare=Wheel(9)))
    assert parsed() == Train()


@pytest.mark.parametrize("place", ["first.front", "first.spare", "last.spare"])
def test_an_error_of_a_section_has_its_dotted_name(place: str) -> None:
    with pytest.raises(SettingsError, match=rf"^{place}.size is 0; it takes 1 or more$"):
        parsed(f"--{place}.size", "0")


def test_a_list_is_not_a_section() -> None:
    with pytest.raises(SettingsError) as error:
        parsed("--last.front", "[4]")  # jsonargparse accepts it
    assert str(error.value) == "last.front: [4] is not a section; its fields are size"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"frist": {}}, "frist is not a field (did you mean first?); the fields of the train are first, last"),
        (
            {"last": {"spare": {"sise": 1}}},
            "last.spare.sise is not a field (did you mean size?); the fields of last.spare are size",
        ),
        ({"first": {7: 1}}, "first.7 is not a field; the fields of first are colour, front, spare, load, tags"),
        ({"first": {"front": 20}}, "first.front: 20 is not a section; its fields are size"),
        ({"last": ["cart"]}, "last: ['cart'] is not a section; its fields are colour, front, spare, load, tags"),
    ],
)
def test_unknown_names_raise_with_the_known_ones(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(SettingsError) as error:
        check_names(Train, values)
    assert str(error.value) == message


def test_known_names_pass_and_mappings_accept_any_key() -> None:
    check_names(Train, {"last": None, "first": {"tags": {"any": {"thing": 1}}, "spare": {}, "colour": "pink"}})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--first.colour", "pink"], "first.colour: pink is not one of red, blue"),
        (["--last.colour", "pink"], "last.colour: pink is not one of red, blue"),
        (["--last.spare.size", "big"], "last.spare.size: big is not a whole number"),
        (["--first.load", "heavy"], "first.load: heavy is not a number"),
        (["--first.tags", "[1]"], "first.tags: [1] is not a mapping such as {name: value}"),
        (["--last.spare", "4"], "last.spare: 4 is not a section; its fields are size"),
        (
            ["--last.spare.sise", "4"],
            "last.spare.sise is not a field (did you mean size?); the fields of last.spare are size",
        ),
        (["--other"], "other is not a field; the fields of the train are first, last"),
    ],
)
def test_an_error_of_the_parser_becomes_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises((jsonargparse.ArgumentError, ValueError, TypeError)) as error:
        parsed(*arguments)
    assert parse_error_message(Train, error.value) == message


def test_an_unknown_error_is_kept_on_one_line() -> None:
    assert parse_error_message(Train, ValueError("something\n  quite   new")) == "something quite new"
