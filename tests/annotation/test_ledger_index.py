"""The ledger index: lookup, replacement by later lines, and bounded memory."""

import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from distill.annotation.ledger_index import LedgerIndex
from distill.errors import RunError

ROOT = Path(__file__).parents[2]


def keys(count: int) -> list[bytes]:
    return [sha256(str(number).encode()).hexdigest().encode() for number in range(count)]


def test_the_last_line_of_a_key_is_found() -> None:
    index = LedgerIndex()
    index.load([(b"a", 0, 10), (b"b", 10, 5), (b"a", 15, 7)])
    index.load([(b"c", 22, 1)], used=True)
    assert [index.find(key) for key in (b"a", b"b", b"c", b"d")] == [(15, 7), (10, 5), (22, 1), None]
    assert len(index) == 3


def test_keys_are_found_by_their_start() -> None:
    index = LedgerIndex()
    index.load([(key, 0, 1) for key in (b"a", b"a y", b"a x", b"ab", b"b", b"A")])
    assert index.starting_with(b"a ") == [b"a x", b"a y"] and index.starting_with(b"c") == []


def test_mark_used_is_true_only_the_first_time() -> None:
    index = LedgerIndex()
    index.load([(b"a", 0, 10)])
    index.load([(b"new", 10, 10)], used=True)
    marked = [index.mark_used(key) for key in (b"a", b"a", b"new", b"unknown")]
    assert marked == [True, False, False, False]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_the_lines_are_not_held_in_memory() -> None:
    """Measured as the resident memory of a process, because SQLite does not allocate from the Python heap."""
    program = """
import re
from pathlib import Path
from distill.annotation.ledger_index import LedgerIndex
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
index = LedgerIndex()
index.load((b"%064d" % (n * 7919 % 100_003), n, 1000) for n in range(10_000))
before = resident()
index.load((b"%064d" % (n * 7919 % 100_003), n, 1000) for n in range(100_000))
print(len(index), resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT)
    lines, grown_kib = map(int, done.stdout.split())
    assert lines == 100_000 and grown_kib < 3000  # their keys alone are 6 MB


def test_a_database_error_is_raised_as_a_run_error() -> None:
    index = LedgerIndex()
    index._connection.execute("PRAGMA max_page_count = 2")  # as on a full disk
    with pytest.raises(RunError, match="folder for temporary files"):
        index.load((key, 0, 1) for key in keys(1000))
    index.close()
    with pytest.raises(RunError, match="closed"):
        index.find(b"a")
