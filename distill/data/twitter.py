"""Reader of TomBERT's layout of Twitter-2015 and Twitter-2017 (Yu and Jiang, IJCAI 2019): one row per post and target.

A file is tab-separated, without quoting. Its columns are index, label (0, 1, 2), image name, text with `$T$` in place
of the target, and target.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from distill.data.jsonl import Row, lines
from distill.errors import SettingsError

LABELS = {"0": "negative", "1": "neutral", "2": "positive"}
COLUMNS = 5
TARGET = "$T$"


def read(path: Path, images: str) -> Iterator[Row]:
    """Yield the rows of one file. An id is the file's stem and the row's index, since every file has its own indices.

    Args:
        images: folder of the images, relative to the data root.

    Raises:
        SettingsError: the file numbers its labels otherwise, for example from -1 or from 1.
    """
    rows = [(number, line.split("\t"), encoding) for number, line, encoding in lines(path)]
    if rows and not re.search(r"\d", rows[0][1][0]) and LABELS.keys().isdisjoint(rows[0][1][1:2]):
        rows = rows[1:]  # the header
    _check_numbering(path, {_number(cells[1]) for _, cells, _ in rows if len(cells) == COLUMNS})
    for number, cells, encoding in rows:
        fields = {"id": f"{path.stem}-{cells[0].strip()}"}
        if len(cells) != COLUMNS:
            yield Row(number, fields, f"has {len(cells)} columns instead of {COLUMNS}")
            continue
        _, label, image, text, aspect = (cell.strip() for cell in cells)
        if not aspect:
            yield Row(number, fields, "has no target")
            continue
        yield Row(
            number,
            {
                **fields,
                "text": text.replace(TARGET, aspect),
                "aspect": aspect,
                "label": LABELS.get(_number(label), label),
                "images": [f"{images}/{image}"] if image else [],
            },
            encoding=encoding,
        )


def _number(label: str) -> str:
    """A whole number in its shortest form ("1.0" and "+1" are 1); another label as it is."""
    found = re.fullmatch(r"([+-]?)(\d+)(?:\.0*)?", label.strip().replace("\u2212", "-"))
    return f"{int(found[1] + found[2])}" if found else label


def _check_numbering(path: Path, labels: set[str]) -> None:
    """Raise SettingsError for other numbers than 0 to 2: they would be read as another class, or dropped."""
    if labels & {"-2", "-1"} or ("3" in labels and ("0" not in labels or "4" in labels)):
        found = ", ".join(sorted(labels & {str(number) for number in range(-2, 5)}, key=int))
        known = ", ".join(f"{number} ({name})" for number, name in LABELS.items())
        raise SettingsError(f"{path.name} has the labels {found}; data.source twitter takes {known}; renumber them")
