"""Records of offline runs that end anywhere."""

import struct
from pathlib import Path

import pytest

from distill.tracking.records import is_empty, remove_incomplete_end
from tests.tracking.test_lineage import run_stage

HEADER = b":W&B" + bytes(3)


def write(entries: list[bytes]) -> tuple[bytes, list[int]]:
    """A record and the ends of its entries, by the format's description."""
    content, ends = HEADER, []
    for entry in entries:
        first = True
        while True:
            left = 32768 - len(content) % 32768
            if left < 7:
                content += bytes(left)
                continue
            part, entry = entry[: left - 7], entry[left - 7 :]
            kind = (1 if first else 4) if not entry else (2 if first else 3)
            content += struct.pack("<IHB", 0, len(part), kind) + part
            first = False
            if not entry:
                break
        ends.append(len(content))
    return content, ends


def test_a_record_is_cut_after_its_last_complete_entry(tmp_path: Path) -> None:
    content, ends = write([bytes(n) for n in (0, 5, 32768 - 40, 100, 80_000, 32768 - 7, 1, 0)])
    path = tmp_path / "run-1.wandb"
    for size in {*range(0, len(content), 997), *(end + step for end in [0, 7, *ends] for step in (-1, 0, 1, 8))}:
        if not 0 <= size <= len(content):
            continue
        path.write_bytes(content[:size])
        kept = max((end for end in ends if end <= size), default=min(size, 7))
        assert remove_incomplete_end(path) == (kept < size or kept <= 7), size
        assert path.stat().st_size == kept and is_empty(path) == (kept <= 7)


def test_a_record_of_wandb_is_complete(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    run_stage(tmp_path, "annotate", "data", mode="offline")
    wandb.teardown()  # it has then been written
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = path.read_bytes()
    assert not remove_incomplete_end(path) and path.read_bytes() == content and not is_empty(path)
