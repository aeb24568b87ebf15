"""Where each answer stands in its ledger: a temporary database, so that memory does not grow with the answers."""

import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from distill.errors import RunError

_MEMORY_KIB = 1024


class LedgerIndex:
    """Keys with the offset and the length of their lines; it lives as long as it is open, and threads may share it.

    Raises:
        RunError: the folder for temporary files is full or cannot be written.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # no name: a file of its own that vanishes with it; lost with a crash, and read anew from the ledger
        self._connection = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        columns = "key BLOB PRIMARY KEY, start INTEGER, length INTEGER, used INTEGER"
        with self._table() as table:
            for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_MEMORY_KIB}"):
                table.execute(f"PRAGMA {setting}")
            table.execute(f"CREATE TABLE line ({columns}) WITHOUT ROWID")

    def __len__(self) -> int:
        with self._table() as table:
            return int(table.execute("SELECT count(*) FROM line").fetchone()[0])

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            self._connection.close()

    def load(self, lines: Iterable[tuple[bytes, int, int]], *, used: bool = False) -> None:
        """Take in keys, offsets and lengths of lines; of a key given twice the last one stays."""
        with self._table() as table:
            table.execute("BEGIN")
            table.executemany(f"REPLACE INTO line VALUES (?, ?, ?, {used:d})", lines)
            table.execute("COMMIT")

    def find(self, key: bytes) -> tuple[int, int] | None:
        """Offset and length of a key's line."""
        with self._table() as table:
            place = table.execute("SELECT start, length FROM line WHERE key = ?", (key,)).fetchone()
        return place and (int(place[0]), int(place[1]))

    def use(self, key: bytes) -> bool:
        """Whether a key is used for the first time."""
        with self._table() as table:
            return table.execute("UPDATE line SET used = 1 WHERE key = ? AND used = 0", (key,)).rowcount == 1

    @contextmanager
    def _table(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._connection
            except sqlite3.Error as error:
                raise RunError(f"a ledger's index cannot be kept in the folder for temporary files: {error}") from error
