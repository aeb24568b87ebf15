"""Where answers stand: found again, replaced by later ones, and out of memory."""

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


def test_lines_are_found_by_their_keys_and_the_last_one_counts() -> None:
    index = LedgerIndex()
    index.load([(b"a", 0, 10), (b"b", 10, 5), (b"a", 15, 7)])
    index.load([(b"c", 22, 1)], used=True)
    assert [index.find(key) for key in (b"a", b"b", b"c", b"d")] == [(15, 7), (10, 5), (22, 1), None]
    assert len(index) == 3


def test_a_key_is_used_for_the_first_time_once() -> None:
    index = LedgerIndex()
    index.load([(b"a", 0, 10)])
    index.load([(b"new", 10, 10)], used=True)
    assert [index.use(b"a"), index.use(b"a"), index.use(b"new"), index.use(b"unknown")] == [True, False, False, False]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the memory of a process")
def test_the_lines_are_not_held_in_memory() -> None:
    """SQLite's memory is not Python's, so that a process tells how much it has."""
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


def test_a_failing_database_ends_the_run_in_one_sentence() -> None:
    index = LedgerIndex()
    index._connection.execute("PRAGMA max_page_count = 2")  # as on a full disk
    with pytest.raises(RunError, match="folder for temporary files"):
        index.load((key, 0, 1) for key in keys(1000))
    index.close()
    with pytest.raises(RunError, match="closed"):
        index.find(b"a")
