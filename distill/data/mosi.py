"""Reader of utterances with continuous sentiment (CMU-MOSI, CMU-MOSEI): CSV with a header, or JSONL.

The columns are `id`, `text` and `label` (a number), and optionally `image`, `aspect` and `split`. With a `split`
column, the same file can be given for all three splits: each split uses its own rows.
"""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from distill.data import jsonl
from distill.data.jsonl import Row
from distill.data.text import decode_lines
from distill.errors import SettingsError

SPLIT_ALIASES = {"dev": "validation", "val": "validation", "valid": "validation"}
"""Values of the `split` column that are accepted besides train, validation and test."""


def read(path: Path, split: str) -> Iterator[Row]:
    """Yield the rows of one file that belong to `split`. Labels are floats; an empty label is None.

    Raises:
        SettingsError: two columns of a CSV file have the same name.
    """
    for row in _csv(path) if path.suffix.casefold() == ".csv" else jsonl.read(path):
        if row.problem is not None:
            yield row
            continue
        own = str(row.fields.get("split") or split).strip().casefold()
        own = SPLIT_ALIASES.get(own, own)
        if own not in ("train", "validation", "test"):
            yield Row(row.number, row.fields, f"unknown split {own!r}; the splits are train, validation, test")
        elif own == split:
            try:
                yield replace(row, fields={**row.fields, "label": _number(row.fields.get("label"))})
            except ValueError as error:
                yield Row(row.number, row.fields, str(error))


def _number(value: object) -> float | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"label {str(value)[:40]!r} is not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"label {value} is not a finite number")
    return number


def _csv(path: Path) -> Iterator[Row]:
    """Yield the rows of a CSV file, numbered by the line on which they start. An empty cell is None.

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
