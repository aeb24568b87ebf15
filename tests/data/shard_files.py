"""Shards of posts for tests: JSONL, Parquet with pictures in it, and WebDataset."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(shade: int) -> bytes:
    """A PNG file."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (shade % 256, 0, 0)).save(content, "PNG")
    return content.getvalue()


def rows(shard: int, count: int) -> list[dict[str, Any]]:
    labels = ("negative", "neutral", "positive")
    return [{"id": f"{shard}-{n}", "text": f"post {n} " * (n % 5 + 1), "label": labels[n % 3]} for n in range(count)]


def jsonl(path: Path, rows: Iterable[Mapping[str, Any] | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def parquet(path: Path, rows: list[dict[str, Any]], group: int = 4) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def webdataset(path: Path, samples: Iterable[Mapping[str, bytes]]) -> Path:
    """A tar of samples: the content of their files by suffix, in order."""
    with tarfile.open(path, "w") as file:
        for number, sample in enumerate(samples):
            for suffix, content in sample.items():
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    return path
