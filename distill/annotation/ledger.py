"""The ledger of paid answers: one line each, appended as they come, so that no answer is ever paid for twice.

A line is written whole and reaches the disk before the next question is settled. What a crash may leave behind is a
torn last line, which is cut off when the ledger is opened again. `Memory` is a teacher who is asked through it.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from distill.errors import RunError
from distill.models.endpoint import Endpoint
from distill.models.reasoner import Answer, ClassScores, Cost, Reasoner, Sampling
from distill.task import prompts
from distill.task.labels import LabelSpace
from distill.task.prompts import Earlier, Template
from distill.task.sample import Sample

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
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_scores(answer: Answer) -> tuple[list[float], float]:
    """Probabilities [K] and label mass from the line that a classification left in the ledger."""
    probabilities, mass = json.loads(answer.text)
    return probabilities, mass


class Ledger:
    """An append-only JSONL file of answers, open in one process at a time; threads may share it.

    Raises:
        RunError: another process holds the ledger, or it cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._answers: dict[str, Answer] = {}
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise RunError(f"the ledger {path} cannot be opened: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._load()
        except BlockingIOError:
            os.close(self._file)
            raise RunError(f"another process is annotating into {path}; wait for it or stop it") from None
        except OSError as error:
            os.close(self._file)
            raise RunError(f"the ledger {path} cannot be used: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._answers)

    def close(self) -> None:
        """Hand the ledger back; closing gives up the lock. A second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def get(self, key: str) -> Answer | None:
        """The answer paid for under a key."""
        return self._answers.get(key)

    def put(self, key: str, meta: Mapping[str, Any], answer: Answer) -> None:
        """Write one answer and wait until it is on the disk; `meta` says for a reader what was asked.

        Raises:
            RunError: the disk is full or fails; the file then ends with its last whole line.
            ValueError: the answer has an error, so nothing was paid.
        """
        if answer.error is not None:
            raise ValueError("an answer that never came was not paid for")
        paid = {name: value for name, value in asdict(answer).items() if name != "error"}
        text = json.dumps({"key": key, **meta, "answer": paid}, ensure_ascii=False)
        line = text.encode("utf-8", "replace") + b"\n"  # a lone surrogate has no UTF-8
        with self._lock:
            end = os.fstat(self._file).st_size
            try:
                if os.write(self._file, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._file)
            except OSError as error:
                os.ftruncate(self._file, end)
                raise RunError(f"an answer could not be written to {self.path}: {error.strerror}") from error
            self._answers[key] = answer

    def _load(self) -> None:
        """Read what was paid; end the file with a whole line, cutting what a crash tore."""
        content = self.path.read_bytes()
        *lines, rest = content.split(b"\n")
        for number, line in enumerate(lines, 1):
            if not self._read(line):
                log.warning("%s, line %d is unreadable; its answer will be asked again", self.path, number)
        if rest and self._read(rest):
            os.write(self._file, b"\n")
        elif rest:
            log.warning("%s ends with a torn line, as a crash leaves it; it is cut off", self.path)
            os.ftruncate(self._file, len(content) - len(rest))

    def _read(self, line: bytes) -> bool:
        try:
            entry = json.loads(line)
            self._answers[str(entry["key"])] = Answer(**entry["answer"])
        except (ValueError, KeyError, TypeError):
            return False
        return True


@dataclass
class Memory:
    """A Reasoner that is asked only what its ledger does not hold; `paid` is every answer that was used, old or new."""

    teacher: Reasoner
    labels: LabelSpace
    ledger: Ledger
    chunk: int
    paid: dict[str, Answer] = field(default_factory=dict)
    digests: dict[Path, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = self.teacher.name

    def reason(
        self, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, Answer]]:
        """As `Reasoner.reason`; each new answer is in the ledger before it is handed on."""

        def ask(indices: Sequence[int]) -> Iterator[tuple[int, Answer]]:
            return self.teacher.reason([samples[index] for index in indices], template, sampling)

        return self._ask(samples, template, sampling, ask)

    def classify(self, samples: Sequence[Sample], earlier: Sequence[Earlier] | None = None) -> ClassScores:
        """As `Reasoner.classify`; where the teacher did not answer, the labels are equally likely, at a mass of 0.

        The costs are those of the answers when they were paid for, were it on another day.
        """
        probabilities = np.full((len(samples), len(self.labels)), 1 / len(self.labels))
        mass = np.zeros(len(samples))
        costs = [Cost()] * len(samples)
        silent: dict[int, str] = {}
        for index, answer in self.scores(samples, earlier):
            costs[index] = answer.cost
            if answer.error is None:
                probabilities[index], mass[index] = read_scores(answer)
            else:
                silent[index] = answer.error
        if silent:
            index, why = min(silent.items())
            found = (self.name, len(silent), len(samples), samples[index].id, why)
            log.warning("%s left %d of %d posts unanswered; the first, %s: %s", *found)
        return ClassScores(probabilities, mass, tuple(costs))

    def scores(
        self, samples: Sequence[Sample], earlier: Sequence[Earlier] | None = None
    ) -> Iterator[tuple[int, Answer]]:
        """Label scores as they come: pairs of a sample's index and an answer that `read_scores` reads."""

        def ask(indices: Sequence[int]) -> Iterator[tuple[int, Answer]]:
            said = None if earlier is None else [earlier[index] for index in indices]
            return self._scores([samples[index] for index in indices], said)

        return self._ask(samples, "classify" if earlier is None else "review", Sampling(), ask, earlier)

    def _scores(self, samples: Sequence[Sample], earlier: Sequence[Earlier] | None) -> Iterator[tuple[int, Answer]]:
        if isinstance(self.teacher, Endpoint):  # each is paid for, so each is handed over as it comes
            for index, scored in self.teacher.scores(samples, earlier):
                text = json.dumps([scored.probabilities.tolist(), float(scored.label_mass)])
                yield index, replace(scored.answer, text=text)
            return
        found = self.teacher.classify(samples, earlier)
        costs = found.costs or (Cost(calls=1),) * len(samples)
        for index, (row, mass, cost) in enumerate(zip(found.probabilities, found.label_mass, costs, strict=True)):
            error = None if mass != 0 else "the model gave no answer"
            yield index, Answer(json.dumps([row.tolist(), float(mass)]), True, error=error, **asdict(cost))

    def _ask(
        self,
        samples: Sequence[Sample],
        template: Template,
        sampling: Sampling,
        ask: Callable[[Sequence[int]], Iterator[tuple[int, Answer]]],
        earlier: Sequence[Earlier] | None = None,
    ) -> Iterator[tuple[int, Answer]]:
        waiting: dict[str, list[int]] = {}  # samples that are alike share one answer
        for index, sample in enumerate(samples):
            try:
                name = self._key(sample, template, sampling, None if earlier is None else earlier[index])
                waiting.setdefault(name, []).append(index)
            except OSError as error:
                yield index, Answer("", finished=False, error=f"an image cannot be read: {error}", calls=0)
        for name in list(waiting):
            if (answer := self.ledger.get(name)) is not None:
                self.paid[name] = answer
                for index in waiting.pop(name):
                    yield index, answer
        names = list(waiting)
        meta: dict[str, Any] = {"model": self.teacher.name, "version": prompts.VERSION, "template": template}
        meta |= {"temperature": sampling.temperature, "attempt": sampling.attempt}
        for part in (names[begin : begin + self.chunk] for begin in range(0, len(names), self.chunk)):
            for position, answer in ask([waiting[name][0] for name in part]):
                name = part[position]
                if answer.error is None:
                    self.ledger.put(name, {"id": samples[waiting[name][0]].id, **meta}, answer)
                    self.paid[name] = answer
                for index in waiting[name]:
                    yield index, answer

    def _key(self, sample: Sample, template: Template, sampling: Sampling, earlier: Earlier | None) -> str:
        question = prompts.render(template, sample, self.labels, earlier)
        if template in prompts.SCORED:  # the probabilities are those of these labels
            question += "\n" + ", ".join(self.labels.names)
            if isinstance(self.teacher, Endpoint):
                question += f"\n{self.teacher.settings.agreement_samples}"
        for path in sample.images:
            if path not in self.digests:
                self.digests[path] = digest(path)
        return key(self.teacher.name, template, sampling, question, [self.digests[path] for path in sample.images])
