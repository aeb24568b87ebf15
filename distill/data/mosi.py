"""Reader of utterances with continuous sentiment (CMU-MOSI, CMU-MOSEI): CSV with a header, or JSONL.

The columns are `id`, `text` and `label` (a number), and optionally `image`, `aspect` and `split`. With a `split`
column, the same file can be given for all three splits: each split uses its own rows.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from distill.data import jsonl
from distill.data.jsonl import Row
from distill.data.tables import csv_rows, number, split_name


def read(path: Path, split: str) -> Iterator[Row]:
    """Yield the rows of one file that belong to `split`. Labels are floats; an empty label is None.

    Raises:
        SettingsError: two columns of a CSV file have the same name.
    """
    for row in csv_rows(path) if path.suffix.casefold() == ".csv" else jsonl.read(path):
        if row.problem is not None:
            yield row
            continue
        try:
            if split_name(row.fields.get("split") or split) == split:
                yield replace(row, fields={**row.fields, "label": number(row.fields.get("label"))})
        except ValueError as error:
            yield Row(row.number, row.fields, str(error))
