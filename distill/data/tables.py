"""CSV files with a header, and what their columns hold: splits and numbers."""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from distill.data.jsonl import Row
from distill.data.text import decode_lines
from distill.errors import SettingsError

_ALIASES = {"dev": "validation", "val": "validation", "valid": "validation"}


def require(row: Mapping[str, object], *columns: str) -> None:
    """Raise ValueError for the first of these columns that a row does not have."""
    for name in columns:
        if name not in row:
            raise ValueError(f"has no column {name}")


def split_name(value: object) -> str:
    """The split that a column names. Raises ValueError for an unknown one."""
    name = str(value).strip().casefold()
    name = _ALIASES.get(name, name)
    if name not in ("train", "validation", "test"):
        raise ValueError(f"unknown split {name!r}; the splits are train, validation, test")
    return name


def number(value: object) -> float | None:
    """A label on a continuous scale; None if it is empty. Raises ValueError if it is no finite number."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError
        found = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"label {str(value)[:40]!r} is not a number") from None
    if not math.isfinite(found):
        raise ValueError(f"label {value} is not a finite number")
    return found


def csv_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a CSV file with a header, numbered by the line on which they start. An empty cell is None.

    Raises:
        SettingsError: two columns have the same name.
    """
    lines = decode_lines(path.read_bytes())
    reader = csv.reader(io.StringIO("\n".join(line for line, _ in lines), newline=""))
    header: list[str] = []
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(number, problem=f"is not valid CSV: {error}")
            continue
        if not header:
            header = [name.strip() for name in cells]
            if twice := [name for name, count in Counter(header).items() if name and count > 1]:
                raise SettingsError(f"{path.name} has the column {twice[0]} twice; rename one of them")
        elif cells:
            fields = {name: cell or None for name, cell in zip(header, cells, strict=False)}
            problem = None if len(cells) == len(header) else f"has {len(cells)} cells instead of {len(header)}"
            yield Row(number, fields, problem, lines[min(number, len(lines)) - 1][1])
