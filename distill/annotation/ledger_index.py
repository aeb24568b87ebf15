"""Index of a ledger in a temporary SQLite database, so that memory does not grow with the number of answers."""

import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from distill.errors import RunError

_CACHE_KIB = 1024


class LedgerIndex:
    """Offset and length of each key's line in the ledger. Thread-safe. Its content is lost when it is closed.

    Raises:
        RunError: the folder for temporary files is full or not writable.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # An empty name makes a private temporary file, deleted on close; it is rebuilt when the ledger is opened.
        self._connection = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        columns = "key BLOB PRIMARY KEY, start INTEGER, length INTEGER, used INTEGER"
        with self._table() as table:
            for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_CACHE_KIB}"):
                table.execute(f"PRAGMA {setting}")
            table.execute(f"CREATE TABLE line ({columns}) WITHOUT ROWID")

    def __len__(self) -> int:
        with self._table() as table:
            return int(table.execute("SELECT count(*) FROM line").fetchone()[0])

    def close(self) -> None:
        """Close and delete the database."""
        with self._lock:
            self._connection.close()

    def load(self, lines: Iterable[tuple[bytes, int, int]], *, used: bool = False) -> None:
        """Add lines as (key, offset, length); the last line of a key replaces earlier ones."""
        with self._table() as table:
            table.execute("BEGIN")
            table.executemany(f"REPLACE INTO line VALUES (?, ?, ?, {used:d})", lines)
            table.execute("COMMIT")

    def find(self, key: bytes) -> tuple[int, int] | None:
        """Offset and length of a key's line; None for an unknown key."""
        with self._table() as table:
            location = table.execute("SELECT start, length FROM line WHERE key = ?", (key,)).fetchone()
        return location and (int(location[0]), int(location[1]))

    def starting_with(self, prefix: bytes) -> list[bytes]:
        """The keys that start with a prefix, in order. Its last byte must be below 255."""
        with self._table() as table:
            end = prefix[:-1] + bytes([prefix[-1] + 1])
            return [
                bytes(row[0]) for row in table.execute("SELECT key FROM line WHERE key >= ? AND key < ?", (prefix, end))
            ]

    def mark_used(self, key: bytes) -> bool:
        """Mark a key as used. Returns True the first time, False later or for an unknown key."""
        with self._table() as table:
            return table.execute("UPDATE line SET used = 1 WHERE key = ? AND used = 0", (key,)).rowcount == 1

    @contextmanager
    def _table(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._connection
            except sqlite3.Error as error:
                raise RunError(
                    f"the index of a ledger cannot be written to the folder for temporary files: {error}"
                ) from error
