"""The ledger of paid answers: one line each, appended as they come, so that no answer is ever paid for twice.

A line is written whole and reaches the disk before its answer is handed on. What a crash may leave behind is a torn
last line, which is cut off when the ledger is opened again. `memory.py` asks a teacher through it.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from distill.annotation.ledger_index import LedgerIndex
from distill.errors import RunError
from distill.models.reasoner import Answer, Sampling
from distill.task import prompts

log = logging.getLogger(__name__)


def key(model: str, template: str, sampling: Sampling, prompt: str, images: Sequence[str] = ()) -> str:
    """What an answer is kept under: SHA-256 over everything that it depends on, the prompts' version included.

    Args:
        images: the `digest` of each picture, in the order in which the model sees them.
    """
    question = [model, prompts.VERSION, template, asdict(sampling), prompt, list(images)]
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes. Raises OSError for a file that cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class Paid:
    """What was paid for answers, be it today or on an earlier day."""

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, answer: Answer) -> None:
        """Count one more answer."""
        self.answers += 1
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens


class Ledger:
    """An append-only JSONL file of answers, open in one process at a time; threads may share it.

    In memory is only where the lines stand. `paid` counts the answers that were used since the ledger was opened, new
    or old, each of them once.

    Raises:
        RunError: another process holds the ledger, or it cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.paid = Paid()
        self._lock = threading.Lock()
        self._disk = threading.Lock()  # held by the one thread that waits for the disk
        self._written = self._safe = 0  # bytes of the file; those on the disk
        self._lines: list[tuple[bytes, int, int]] = []  # of those between, as the index takes them
        self._failure: OSError | RunError | None = None  # of the disk: what was not on it by then never will be
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
            raise RunError(f"another process is annotating into {path}; wait for it or stop it") from None
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
        """Hand the ledger back; closing gives up the lock. A second call does nothing."""
        with self._disk, self._lock:
            if self._file >= 0:
                self._index.close()
                os.close(self._file)
                self._file = -1

    def get(self, key: str) -> Answer | None:
        """The answer paid for under a key, read back from the file."""
        place = self._index.find(key.encode())
        if place is None:
            return None
        start, length = place
        _, answer = _read(os.pread(self._file, length, start))
        with self._lock:
            if self._index.use(key.encode()):
                self.paid.add(answer)
        return answer

    def put(self, key: str, meta: Mapping[str, Any], answer: Answer) -> None:
        """Write one answer and wait until it is on the disk; `meta` says for a reader what was asked.

        Threads that wait at the same time wait for the same write to the disk.

        Raises:
            RunError: the disk is full or fails; the file then ends with its last whole line.
            ValueError: the answer has an error, so nothing was paid.
        """
        if answer.error is not None:
            raise ValueError("an answer that never came was not paid for")
        paid = {name: value for name, value in asdict(answer).items() if name != "error"}
        text = json.dumps({"key": key, **meta, "answer": paid}, ensure_ascii=False)
        line = text.encode("utf-8", "replace") + b"\n"  # a lone surrogate has no UTF-8
        try:
            self._sync(self._append(key.encode(), line))
        except OSError as error:
            raise RunError(f"an answer could not be written to {self.path}: {error.strerror}") from error
        with self._lock:
            self.paid.add(answer)

    def _append(self, key: bytes, line: bytes) -> int:
        """Write one line behind the others; returns where it ends."""
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
            self._lines.append((key, start, len(line)))
            self._written = start + len(line)
            return self._written

    def _sync(self, end: int) -> None:
        """Wait until all before `end` is on the disk and in the index; of threads that wait, one does it for all."""
        with self._disk:
            if self._failure is not None:
                raise self._failure
            if self._safe >= end:
                return
            with self._lock:
                written, lines, self._lines = self._written, self._lines, []
            try:
                os.fsync(self._file)
            except OSError as error:
                with self._lock:
                    self._failure = error
                    os.ftruncate(self._file, self._safe)
                raise
            try:
                self._index.load(lines, used=True)
            except RunError as error:
                self._failure = error
                raise
            self._safe = written

    def _load(self) -> None:
        """Read what was paid, a line at a time; end the file with a whole line, cutting what a crash tore."""
        with self.path.open("rb") as file:
            self._index.load(self._whole(file))
        self._written = self._safe = os.fstat(self._file).st_size

    def _whole(self, file: IO[bytes]) -> Iterator[tuple[bytes, int, int]]:
        """Keys, offsets and lengths of the whole lines."""
        start = 0
        for number, line in enumerate(file, 1):
            torn = not line.endswith(b"\n")
            try:
                yield _read(line)[0], start, len(line)
            except (ValueError, KeyError, TypeError):
                if torn:
                    log.warning("%s ends with a torn line, as a crash leaves it; it is cut off", self.path)
                    os.ftruncate(self._file, start)
                else:
                    log.warning("%s, line %d is unreadable; its answer will be asked again", self.path, number)
            else:
                if torn:
                    os.write(self._file, b"\n")
            if torn:
                return
            start += len(line)


def _read(line: bytes) -> tuple[bytes, Answer]:
    """Key and answer of a line. Raises ValueError, KeyError or TypeError for any other shape."""
    entry = json.loads(line)
    return str(entry["key"]).encode(), Answer(**entry["answer"])
