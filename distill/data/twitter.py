"""Reader of TomBERT's layout of Twitter-2015 and Twitter-2017 (Yu and Jiang, IJCAI 2019): one row per post and target.

A file is tab-separated, without quoting. Its columns are index, label (0, 1, 2), image name, text with `$T$` in place
of the target, and target.
"""

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
        SettingsError: the file numbers its labels from -1 or from 1.
    """
    rows = [(number, line.split("\t"), encoding) for number, line, encoding in lines(path)]
    _check_numbering(path, {cells[1].strip() for _, cells, _ in rows if len(cells) == COLUMNS})
    for number, cells, encoding in rows:
        if number == 1 and cells[0].strip() == "index":
            continue
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
                "label": LABELS.get(label, label),
                "images": [f"{images}/{image}"] if image else [],
            },
            encoding=encoding,
        )


def _check_numbering(path: Path, labels: set[str]) -> None:
    """Raise SettingsError for other numbers than 0 to 2: they would be read as another class, or dropped."""
    if "-1" in labels or ("3" in labels and "0" not in labels):
        found = ", ".join(sorted(labels & {"-1", "0", "1", "2", "3"}, key=int))
        known = ", ".join(f"{number} ({name})" for number, name in LABELS.items())
        raise SettingsError(f"{path.name} has the labels {found}; data.source twitter takes {known}; renumber them")
