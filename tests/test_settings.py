"""Trees of settings dataclasses, apart from the recipe: what is built, and what each mistake is called."""

from dataclasses import dataclass, field
from typing import Any, Literal

import jsonargparse
import pytest

from distill.errors import SettingsError
from distill.settings import build, check_names, fields, optional_sections, section_of, sentence


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
    """One more, or none."""
    load: float | None = None
    """Kilograms."""
    tags: dict[str, Any] = field(default_factory=dict)
    """Whatever is known about it."""


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


def test_a_section_is_a_dataclass_always_or_optionally() -> None:
    assert section_of(Cart) is Cart and section_of(fields(Train)["last"]) is Cart
    assert section_of(dict[str, Any]) is None and section_of(Literal["red"]) is None and section_of(int | None) is None
    assert list(optional_sections(Train)) == [("first.spare", Wheel), ("last", Cart), ("last.spare", Wheel)]


def test_what_was_parsed_becomes_the_dataclasses_it_stands_for() -> None:
    train = parsed("--first.front.size", "3", "--last", "{}", "--last.spare.size", "9", "--first.tags.wood", "oak")
    assert train == Train(Cart(front=Wheel(3), tags={"wood": "oak"}), Cart(spare=Wheel(9)))
    assert parsed() == Train()


@pytest.mark.parametrize("place", ["first.front", "first.spare", "last.spare"])
def test_what_a_section_refuses_itself_is_named_by_its_place(place: str) -> None:
    with pytest.raises(SettingsError, match=rf"^{place}.size is 0; it takes 1 or more$"):
        parsed(f"--{place}.size", "0")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"frist": {}}, "frist is not a field (did you mean first?); the train takes first, last"),
        (
            {"last": {"spare": {"sise": 1}}},
            "last.spare.sise is not a field (did you mean size?); last.spare takes size",
        ),
        ({"first": {7: 1}}, "first.7 is not a field; first takes colour, front, spare, load, tags"),
        ({"first": {"front": 20}}, "first.front: 20 is not a section; it takes size"),
        ({"last": ["cart"]}, "last: ['cart'] is not a section; it takes colour, front, spare, load, tags"),
    ],
)
def test_names_that_are_not_there_are_refused_with_those_that_are(values: dict[Any, Any], complaint: str) -> None:
    with pytest.raises(SettingsError) as error:
        check_names(Train, values)
    assert str(error.value) == complaint


def test_names_that_are_there_pass_and_free_mappings_hold_any() -> None:
    check_names(Train, {"last": None, "first": {"tags": {"any": {"thing": 1}}, "spare": {}, "colour": "pink"}})


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--first.colour", "pink"], "first.colour: pink is not one of red, blue"),
        (["--last.colour", "pink"], "last.colour: pink is not one of red, blue"),
        (["--last.spare.size", "big"], "last.spare.size: big is not a whole number"),
        (["--first.load", "heavy"], "first.load: heavy is not a number"),
        (["--first.tags", "[1]"], "first.tags: [1] is not a mapping such as {name: value}"),
        (["--last.spare", "4"], "last.spare: 4 is not a section; it takes size"),
        (["--last.spare.sise", "4"], "last.spare.sise is not a field (did you mean size?); last.spare takes size"),
        (["--other"], "other is not a field; the train takes first, last"),
    ],
)
def test_a_complaint_of_the_parser_becomes_one_sentence(arguments: list[str], complaint: str) -> None:
    with pytest.raises((jsonargparse.ArgumentError, ValueError, TypeError)) as error:
        parsed(*arguments)
    assert sentence(Train, error.value) == complaint


def test_a_complaint_that_nobody_foresaw_is_kept_on_one_line() -> None:
    assert sentence(Train, ValueError("something\n  quite   new")) == "something quite new"
