"""The ledger of paid answers: an append-only JSONL file, so that no answer is paid for twice.

An answer is flushed to disk before it is used. A crash can leave a truncated last line, which is removed when the
ledger is opened again. `cached_teacher.py` requests answers through the ledger.
"""

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import IO, Any, Self

from distill.annotation.ledger_index import LedgerIndex
from distill.data.media_cache import fetch
from distill.errors import RunError
from distill.files import finite
from distill.models.reasoner import Answer, Sampling
from distill.task import prompts

log = logging.getLogger(__name__)

_MERGED = 4096  # lines of another ledger for one flush


def key(
    model: str,
    template: str,
    sampling: Sampling,
    prompt: str,
    images: Sequence[str] = (),
    clips: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Key of an answer: SHA-256 over everything that the answer depends on, including the version of the prompts.

    Args:
        images: the `digest` of each image, in the order of the message.
        clips: the `digest` of the video and of the sound, and how the video is sampled; empty without both.
    """
    inputs = [model, prompts.VERSION, template, asdict(sampling), prompt, list(images)]
    inputs += [dict(clips)] if clips else []  # the keys of posts without clips are those of earlier versions
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes. Raises OSError if the file cannot be read."""
    fetch(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class PaidTotals:
    """Number of paid answers and their tokens, including answers paid for in earlier runs."""

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, answer: Answer) -> None:
        """Add one answer."""
        self.answers += 1
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens


class LedgerInUse(RunError):
    """Another process has the ledger open."""


Entry = tuple[str, Mapping[str, Any], Answer]
"""An answer with its key and the fields that describe its request; see `Ledger.put`."""


class Ledger:
    """An append-only JSONL file of answers. Thread-safe; one process can open it at a time.

    An answer of a server is identified by its key and the server's address, because two servers may give one name to
    different models. Answers of a model on this machine, and those that earlier versions wrote, have no address.

    Answers are not held in memory; an index has the offsets of their lines. `paid` counts the answers that were used
    since the ledger was opened, new or old, each once; `by_batch` those among them that came from a batch.

    Raises:
        LedgerInUse: another process has the ledger open.
        RunError: it cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.paid, self.by_batch = PaidTotals(), PaidTotals()
        self._lock = threading.Lock()
        self._sync_lock = threading.Lock()  # held by the thread that calls fsync
        self._written = self._synced = 0  # bytes written to the file; bytes flushed to disk
        self._unsynced: list[tuple[bytes, int, int]] = []  # key, offset and length of lines not yet flushed
        self._failure: OSError | RunError | None = None  # a failed flush; nothing is written after it
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise RunError(f"the ledger {path} cannot be opened: {error.strerror}") from error
        self._index = LedgerIndex()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._load()
        except BlockingIOError:
            self.close()
            raise LedgerInUse(f"another process uses the ledger {path}; wait for it or stop it") from None
        except OSError as error:
            self.close()
            raise RunError(f"the ledger {path} cannot be used: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._index)

    def close(self) -> None:
        """Close the file and release its lock. A second call does nothing."""
        with self._sync_lock, self._lock:
            if self._file >= 0:
                self._index.close()
                os.close(self._file)
                self._file = -1

    def get(self, key: str, address: str = "") -> Answer | None:
        """The answer of a key from an address, read from the file; None if there is none."""
        identity = _identity(key, address)
        location = self._index.find(identity)
        if location is None:
            return None
        start, length = location
        _, answer, in_batch = _read(os.pread(self._file, length, start))
        with self._lock:
            if self._index.mark_used(identity):
                self._count(answer, in_batch)
        return answer

    def _count(self, answer: Answer, in_batch: bool) -> None:
        for totals in (self.paid, self.by_batch) if in_batch else (self.paid,):
            totals.add(answer)

    def addresses(self, key: str) -> list[str]:
        """The addresses that gave an answer to a key, in order; the first is empty if one has no address."""
        prefix, known = _identity(key, ""), self._index.find(key.encode()) is not None
        found = self._index.starting_with(prefix + b" ")
        return [""] * known + [identity[len(prefix) + 1 :].decode() for identity in found]

    def put(self, key: str, meta: Mapping[str, Any], answer: Answer) -> None:
        """Write one answer and wait until it is on disk. Threads that wait at the same time share one flush.

        Args:
            meta: fields that describe the request to a reader of the file. `base_url`: the address of the server;
                `batch`: the file of requests, of an answer from a batch.

        Raises:
            RunError: the disk is full or fails; the file then ends with its last complete line.
            ValueError: the answer has an error, so it was not paid for.
        """
        self.put_all([(key, meta, answer)])

    def put_all(self, entries: Sequence[Entry]) -> None:
        """Write answers as `put` does, with one flush for all."""
        end = 0
        for key, meta, answer in entries:
            if answer.error is not None:
                raise ValueError("an answer with an error was not paid for")
            paid = finite({name: value for name, value in asdict(answer).items() if name not in ("error", "kind")})
            text = json.dumps({"key": key, **meta, "answer": paid}, ensure_ascii=False)
            line = text.encode("utf-8", "replace") + b"\n"  # lone surrogates cannot be encoded
            try:
                end = self._append(_identity(key, meta.get("base_url", "")), line)
            except OSError as error:
                raise self._not_written(error) from error
        try:
            self._sync(end)
        except OSError as error:
            raise self._not_written(error) from error
        with self._lock:
            for _, meta, answer in entries:
                self._count(answer, "batch" in meta)

    def merge(self, path: Path) -> None:
        """Add the lines of another ledger whose answers this one does not have; no thread may write meanwhile.

        A second call adds nothing, so a merge that was interrupted can be repeated.

        Raises:
            LedgerInUse: another process has that ledger open.
            RunError: one of them cannot be read or written.
        """
        with Ledger(path) as other, path.open("rb") as file:
            lines = (line for line in other._complete_lines(file) if other._index.find(line[0]) == line[1:])
            new = (line for line in lines if self._index.find(line[0]) is None)
            try:
                while chunk := list(islice(new, _MERGED)):
                    for identity, start, length in chunk:
                        self._append(identity, os.pread(other._file, length, start))
                    self._sync(self._written, used=False)
            except OSError as error:
                raise self._not_written(error) from error

    def _not_written(self, error: OSError) -> RunError:
        return RunError(f"an answer could not be written to {self.path}: {error.strerror}")

    def _append(self, key: bytes, line: bytes) -> int:
        """Append one line. Returns the size of the file after it."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            start = self._written
            try:
                if os.write(self._file, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                os.ftruncate(self._file, start)
                raise
            self._unsynced.append((key, start, len(line)))
            self._written = start + len(line)
            return self._written

    def _sync(self, end: int, *, used: bool = True) -> None:
        """Wait until the first `end` bytes are on disk and indexed. One of the waiting threads flushes for all."""
        with self._sync_lock:
            if self._failure is not None:
                raise self._failure
            if self._synced >= end:
                return
            with self._lock:
                written, lines, self._unsynced = self._written, self._unsynced, []
            try:
                os.fsync(self._file)
            except OSError as error:
                with self._lock:
                    self._failure = error
                    os.ftruncate(self._file, self._synced)
                raise
            try:
                self._index.load(lines, used=used)
            except RunError as error:
                self._failure = error
                raise
            self._synced = written

    def _load(self) -> None:
        """Index the file line by line. Afterwards the file ends with a complete line."""
        with self.path.open("rb") as file:
            self._index.load(self._complete_lines(file))
        self._written = self._synced = os.fstat(self._file).st_size

    def _complete_lines(self, file: IO[bytes]) -> Iterator[tuple[bytes, int, int]]:
        """Yield key, offset and length of every valid line; remove a truncated last line."""
        start = 0
        for number, line in enumerate(file, 1):
            truncated = not line.endswith(b"\n")
            try:
                yield _read(line)[0], start, len(line)
            except (ValueError, KeyError, TypeError):
                if truncated:
                    log.warning("%s ends with a truncated line, probably from a crash; the line is removed", self.path)
                    os.ftruncate(self._file, start)
                else:
                    log.warning("%s, line %d cannot be read; its answer will be requested again", self.path, number)
            else:
                if truncated:
                    os.write(self._file, b"\n")
            if truncated:
                return
            start += len(line)


def _read(line: bytes) -> tuple[bytes, Answer, bool]:
    """Identity and answer of a line, and whether it is from a batch, whose seconds are unknown: null, read as NaN.

    Raises:
        ValueError, KeyError, TypeError: the line is malformed.
    """
    entry = json.loads(line)
    answer = Answer(**entry["answer"])
    if answer.seconds is None:
        answer = replace(answer, seconds=math.nan)
    return _identity(str(entry["key"]), str(entry.get("base_url", ""))), answer, "batch" in entry


def _identity(key: str, address: str) -> bytes:
    """Key of an answer in the index."""
    return f"{key} {address}".encode() if address else key.encode()
