"""Trees of settings dataclasses: their fields and ranges, construction from parsed values, and error messages.

A field declares what it takes in its type: `batch_size: Count = 2`, `risk: Annotated[float, Range(0, 1)] = 0.1`. The
base class `Settings` checks it. This module is independent of the recipe; `recipe.py` defines the root of the tree.
"""

import argparse
import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jsonargparse
import yaml

from distill.errors import SettingsError
from distill.masking import is_variable_name

LARGEST = 2**31 - 1
"""Largest number of any field."""


class Range(NamedTuple):
    """The numbers that a field takes: from `low` to `high`, both included unless `above` or `below` is set."""

    low: float = -LARGEST
    high: float = LARGEST
    above: bool = False
    below: bool = False
    step: int = 1

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, as the end of a sentence; None if it is in the range."""
        over_low = value > self.low if self.above else value >= self.low
        under_high = value < self.high if self.below else value <= self.high
        if over_low and under_high and (self.step == 1 or value % self.step == 0):
            return None
        takes = f"at most {self.high}" if over_low and self.high == LARGEST and value > LARGEST else str(self)
        return f"is {_short(value)}; it takes {takes}"

    def __str__(self) -> str:
        low, high = f"{self.low:.10g}", f"{self.high:.10g}"
        if self.low == -LARGEST and self.high == LARGEST:
            text = "a finite number"
        elif self.high == LARGEST:
            text = f"more than {low}" if self.above else f"{low} or more"
        elif self.above or self.below:
            text = f"{'above' if self.above else 'at least'} {low}, {'below' if self.below else 'at most'} {high}"
        else:
            text = f"{low} to {high}"
        return text if self.step == 1 else f"a multiple of {self.step}, {text}"

    def __repr__(self) -> str:  # in --help
        return str(self)


class VariableName:
    """The name of an environment variable, or nothing. A message never repeats the value, which may be a key."""

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, as the end of a sentence; None if it is a name."""
        if not value or is_variable_name(value):
            return None
        return "takes the name of an environment variable that holds the key, such as TEACHER_API_KEY, not a key"

    def __repr__(self) -> str:
        return "name of a variable"


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
InnerFraction = Annotated[float, Range(0, 1, above=True, below=True)]
Seconds = Annotated[float, Range(0, 1_000_000, above=True)]
Variable = Annotated[str, VariableName()]


def limit_of(annotation: Any) -> Range | VariableName | None:
    """What the type of a field, optional or not, declares that it takes; None if it declares nothing."""
    for kind in (annotation, *typing.get_args(annotation)):
        for limit in getattr(kind, "__metadata__", ()):
            return limit
    return None


@dataclass
class Settings:
    """Base class of the sections, which checks the values on construction."""

    def __post_init__(self) -> None:
        check_limits(self)


def check_limits(section: Any) -> None:
    """Raise SettingsError for a value of a section that its field does not take."""
    for name, annotation in fields(type(section)).items():
        limit, value = limit_of(annotation), getattr(section, name)
        if isinstance(value, str) and "\0" in value:
            raise SettingsError(f"{name} contains a NUL character")
        if limit is not None and value is not None and (problem := limit.problem(value)):
            raise SettingsError(f"{name} {problem}")


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
    if not isinstance(values, Mapping | jsonargparse.Namespace):  # jsonargparse takes a list for a section
        raise SettingsError(_not_a_section_message(section, path.removesuffix("."), values))
    content = {name: values[name] for name in fields(section) if not _takes_default(section, name, values[name])}
    for name, value in content.items():
        if (inner := section_of(fields(section)[name])) and value is not None:
            content[name] = build(inner, value, f"{path}{name}.")
        else:
            content[name] = _plain(value)
    try:
        return section(**content)
    except ValueError as error:  # SettingsError among them
        message = str(error)
        raise SettingsError(message if message.startswith(path) else path + message) from None


def _plain(value: Any) -> Any:
    """A value without the namespaces that jsonargparse makes of mappings with class_path."""
    if isinstance(value, jsonargparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number and a date as text, tells a blank value from null, and refuses a name given twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node


_BLANK = object()
_Loader.add_constructor("tag:yaml.org,2002:null", lambda _, node: None if node.value else _BLANK)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def read_yaml(section: type, text: str) -> Any:
    """The content of a YAML document about a section.

    A blank section (`cascade:`) is read as an empty one, {}; another blank field is left out if it does not take null.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: the text is not valid YAML.
    """
    return _without_blanks(section, yaml.load(text, Loader=_Loader))


def _without_blanks(section: type | None, content: Any) -> Any:
    if isinstance(content, list):
        return [_without_blanks(None, item) for item in content]
    if not isinstance(content, dict):
        return None if content is _BLANK else content
    filled: dict[Any, Any] = {}
    for name, value in content.items():
        annotation = fields(section).get(name) if section else None
        inner = section_of(annotation)
        if value is _BLANK and inner:
            filled[name] = {}
        elif value is not _BLANK or annotation is None or type(None) in typing.get_args(annotation):
            filled[name] = _without_blanks(inner, value)
    return filled


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
            raise SettingsError(_not_a_section_message(inner, f"{path}{name}", value))


def _takes_default(section: type, name: str, value: Any) -> bool:
    """Whether a field was left blank that has a default and does not take null."""
    if value is not None or type(None) in typing.get_args(fields(section)[name]):
        return False
    (item,) = (item for item in dataclasses.fields(section) if item.name == name)
    return item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING


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
    if found := re.search(r"arguments are required: ([^\s,]+)|[Kk]ey \"([^\"]+)\" is required", text):
        return f"{dot}{found[1] or found[2]} is required"
    if "integer string conversion" in text:
        return f"{path} is a number with too many digits"
    given = re.search(r"Got value: (.*)|NestedArg\(.*val='(.*)'\)|Given value: (.*)|Unable to load config '(.*)'", text)
    value = next(filter(None, given.groups()), "") if given else ""
    if re.search("import path|nested key|Not a valid subclass|Unable to load config", text):
        section: Any = root
        for part in path.split("."):
            section = section_of(fields(section).get(part)) if section else None
        if section:
            return _not_a_section_message(section, path, value)
        return f"{path}: {_short(value)} is not a value that it takes"
    kinds = dict.fromkeys(re.findall(r"Expected an? (\w+(?:\[.*?\])?)", text))
    kinds.pop("NoneType", None)
    if not kinds and "Union subtypes" in text:
        return f"{path}: {_short(value)} is not a value that it takes"
    if not kinds:
        return f"{dot and path + ': '}{' '.join(text.split())}"
    return f"{path}: {_short(value)} is not {' or '.join(map(_type_name, kinds))}"


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


def _not_a_section_message(section: type, path: str, value: object) -> str:
    return f"{path}: {_short(value)} is not a section; its fields are {', '.join(fields(section))}"


def _type_name(kind: str) -> str:
    name, _, choices = kind.partition("[")
    return f"one of {choices[:-1].replace(chr(39), '')}" if name == "Literal" else _TYPE_NAMES.get(kind, kind)


def _short(value: object, length: int = 80) -> str:
    """A value as text in a message: the beginning of a long one."""
    text = "a huge number" if isinstance(value, int) and abs(value) >= 10**length else str(value)
    return text if len(text) <= length else f"{text[:length]}…"
