"""Posts without labels in files of any length, row by row: JSONL, CSV, Parquet, or a folder of pictures."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from distill.data.jsonl import Row, parse_line
from distill.data.text import decode
from distill.errors import SettingsError

FIELDS = ("id", "text", "aspect", "image", "images", "video", "audio")

_BATCH = 256


def rows(path: Path) -> Iterator[Row]:
    """Yield every row of a file, or every file of a folder by name. A row that cannot be read has a `problem`.

    Raises:
        SettingsError: the file is of another kind, or has no column with posts.
        OSError: it cannot be read.
    """
    if path.is_dir():
        return _pictures(path)
    match path.suffix.casefold():
        case ".jsonl":
            return _jsonl(path)
        case ".csv":
            return _csv(path)
        case ".parquet":
            return _parquet(path)
    raise SettingsError(f"{path} is none of JSONL, CSV, Parquet (by its suffix) and a folder of pictures")


def count(path: Path) -> int:
    """The number of rows that `rows` yields."""
    if path.suffix.casefold() == ".parquet" and path.is_file():
        return int(_opened(path).metadata.num_rows)
    return sum(1 for _ in rows(path))


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield parse_line(number, *decode(line.rstrip(b"\r\n")))


def _csv(path: Path) -> Iterator[Row]:
    # bytes that are not UTF-8 become surrogates, which are replaced later as in other texts
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.reader(file, strict=True)
        header = [name.strip() for name in next(reader, [])]
        _check_columns(path, header)
        number = 1
        while True:
            number += 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(number, problem=f"is not valid CSV: {error}")
                continue
            if len(cells) != len(header):
                if cells:
                    yield Row(number, problem=f"has {len(cells)} cells; the header has {len(header)}")
                continue
            values = {name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()}
            yield Row(number, {name: values[name] for name in FIELDS if name in values})


def _parquet(path: Path) -> Iterator[Row]:
    with _opened(path) as file:
        names = file.schema_arrow.names
        _check_columns(path, names)
        number = 0
        for batch in file.iter_batches(_BATCH, columns=[name for name in FIELDS if name in names]):
            for fields in batch.to_pylist():
                number += 1
                yield Row(number, {name: value for name, value in fields.items() if value is not None})


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except ValueError as error:  # pyarrow's ArrowInvalid
        raise SettingsError(f"{path} is not a Parquet file: {error}") from None


def _pictures(folder: Path) -> Iterator[Row]:
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    for number, name in enumerate(names, start=1):
        yield Row(number, {"id": name, "image": name})


def _check_columns(path: Path, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise SettingsError(f"{path}: two columns have the same name")
    if not {"text", "image", "images", "video", "audio"} & set(names):
        known = "text, image, images, video or audio"
        raise SettingsError(f"{path} has no column {known}; its columns are {', '.join(names) or 'none'}")


def write(path: Path, lines: Iterator[dict[str, Any]], columns: dict[str, str]) -> None:
    """Write rows as JSONL, CSV or Parquet, by the suffix of `path`, in constant memory.

    Args:
        columns: names and types (`string`, `int64`, `double`, `bool`) of the columns, in order.
    """
    if path.suffix.casefold() == ".parquet":
        import pyarrow as pa

        schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in columns.items()])
        with pq.ParquetWriter(path, schema) as writer:
            for batch in _batches(lines):
                writer.write_table(pa.Table.from_pylist(batch, schema))
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix.casefold() == ".csv":
            table = csv.DictWriter(file, list(columns), extrasaction="ignore")
            table.writeheader()
            table.writerows(lines)
        else:
            for line in lines:
                row = {name: line.get(name) for name in columns}
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def _batches(lines: Iterator[dict[str, Any]], size: int = 4096) -> Iterator[list[dict[str, Any]]]:
    batch = []
    for line in lines:
        batch.append(line)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
