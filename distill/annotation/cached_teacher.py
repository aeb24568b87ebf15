"""A teacher with a memory: asked only what its ledger of paid answers does not hold."""

import contextlib
import json
import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from distill.annotation.ledger import Ledger, Paid, digest, key
from distill.data.images import ImageError
from distill.models.endpoint import Endpoint, EndpointSettings
from distill.models.endpoint.pool import as_completed
from distill.models.endpoint.reasoner import UserMessage
from distill.models.reasoner import Answer, ClassScores, Cost, Reasoner, Sampling
from distill.task import prompts
from distill.task.labels import LabelSpace
from distill.task.prompts import EarlierAnswers, Template
from distill.task.sample import Sample

log = logging.getLogger(__name__)

_DIGESTS = 4096  # of pictures that were asked about last


def read_scores(answer: Answer) -> tuple[list[float], float]:
    """Probabilities [K] and label mass from the line that a classification left in the ledger."""
    probabilities, mass = json.loads(answer.text)
    return probabilities, mass


@dataclass(frozen=True)
class Question:
    """What is asked about a sample: the template, how the answer is drawn, and for a review what was said before."""

    template: Template = "reason"
    sampling: Sampling = Sampling()
    earlier: EarlierAnswers | None = None


class CachedTeacher:
    """A Reasoner that is asked only what its ledger does not hold; threads may share it.

    `at_once` is how many samples it deals with at a time. A model on this machine is handed `chunk` of them; with an
    endpoint half of them may have a question in flight, while the others encode pictures or wait for the disk.
    """

    def __init__(self, teacher: Reasoner, labels: LabelSpace, ledger: Ledger, chunk: int) -> None:
        self.name = teacher.name
        self.teacher, self.labels, self.ledger, self.chunk = teacher, labels, ledger, chunk
        in_flight = teacher.settings.concurrency if isinstance(teacher, Endpoint) else 1
        self.at_once = 2 * in_flight if isinstance(teacher, Endpoint) else chunk
        self._slots = threading.BoundedSemaphore(in_flight)
        self._digest = lru_cache(_DIGESTS)(digest)
        self._lock = threading.Lock()
        self._asked: dict[str, Future[Answer]] = {}

    @property
    def paid(self) -> Paid:
        """What the answers that were used cost, old or new, each counted once."""
        return self.ledger.paid

    def reason(
        self, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, Answer]]:
        """As `Reasoner.reason`; each new answer is in the ledger before it is handed on."""
        return self.answers(samples, [Question(template, sampling)] * len(samples))

    def classify(self, samples: Sequence[Sample], earlier: Sequence[EarlierAnswers] | None = None) -> ClassScores:
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
        self, samples: Sequence[Sample], earlier: Sequence[EarlierAnswers] | None = None
    ) -> Iterator[tuple[int, Answer]]:
        """Label scores as they come: pairs of a sample's index and an answer that `read_scores` reads."""
        if earlier is None:
            return self.answers(samples, [Question("classify")] * len(samples))
        return self.answers(samples, [Question("review", earlier=said) for said in earlier])

    def ask(self, post: UserMessage, question: Question, stop: threading.Event) -> Answer:
        """One answer of an endpoint; threads that ask the same wait for one answer.

        Args:
            stop: set when nobody waits for the answer any more.

        Raises:
            RunError: the endpoint cannot be asked any more, or the ledger cannot be written.
        """
        try:
            name = self._key(post.sample, question)
        except OSError as error:
            return _unreadable(error)
        with self._lock:
            first = name not in self._asked
            asked = self._asked.setdefault(name, Future())
        if first:
            try:
                asked.set_result(self.ledger.get(name) or self._buy(name, post, question, stop))
            except BaseException as error:  # noqa: BLE001 - it belongs to all that wait
                asked.set_exception(error)
            with self._lock:
                del self._asked[name]
        return asked.result()

    def _buy(self, name: str, post: UserMessage, question: Question, stop: threading.Event) -> Answer:
        assert isinstance(self.teacher, Endpoint)
        with contextlib.suppress(ImageError, OSError):  # it is the answer that says so
            post.encode()  # before it takes up a slot
        with self._slots:
            if question.template in prompts.SCORED:
                scored = self.teacher.score(post, question.earlier, stop)
                text = json.dumps([scored.probabilities.tolist(), float(scored.label_mass)])
                answer = replace(scored.answer, text=text)
            else:
                answer = self.teacher.ask(post, question.template, question.sampling, stop)
        return self._keep(name, post.sample, question, answer)

    def _keep(self, name: str, sample: Sample, question: Question, answer: Answer) -> Answer:
        if answer.error is None:
            meta: dict[str, Any] = {"id": sample.id, "model": self.name, "version": prompts.VERSION}
            meta |= {"template": question.template, "temperature": question.sampling.temperature}
            self.ledger.put(name, meta | {"attempt": question.sampling.attempt}, answer)
        return answer

    def answers(self, samples: Sequence[Sample], questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """The answer to each sample's question, as they come; of a model on this machine all are of one kind."""
        teacher = self.teacher
        if isinstance(teacher, Endpoint):

            def ask(index: int, stop: threading.Event) -> Answer:
                return self.ask(teacher.open(samples[index]), questions[index], stop)

            yield from as_completed(ask, range(len(samples)), self.at_once)
            return
        waiting: dict[str, list[int]] = {}  # samples that are alike share one answer
        for index, sample in enumerate(samples):
            try:
                waiting.setdefault(self._key(sample, questions[index]), []).append(index)
            except OSError as error:
                yield index, _unreadable(error)
        for name in list(waiting):
            if (answer := self.ledger.get(name)) is not None:
                for index in waiting.pop(name):
                    yield index, answer
        names = list(waiting)
        for part in (names[begin : begin + self.chunk] for begin in range(0, len(names), self.chunk)):
            firsts = [waiting[name][0] for name in part]
            for position, answer in self._ask([samples[i] for i in firsts], [questions[i] for i in firsts]):
                self._keep(part[position], samples[firsts[position]], questions[firsts[position]], answer)
                for index in waiting[part[position]]:
                    yield index, answer

    def _ask(self, samples: Sequence[Sample], questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """What a model on this machine answers to one chunk."""
        kind = questions[0]
        if kind.template not in prompts.SCORED:
            yield from self.teacher.reason(samples, kind.template, kind.sampling)
            return
        earlier = [question.earlier for question in questions if question.earlier is not None]
        found = self.teacher.classify(samples, earlier or None)
        costs = found.costs or (Cost(calls=1),) * len(samples)
        for index, (row, mass, cost) in enumerate(zip(found.probabilities, found.label_mass, costs, strict=True)):
            error = None if mass != 0 else "the model gave no answer"
            yield index, Answer(json.dumps([row.tolist(), float(mass)]), True, error=error, **asdict(cost))

    def _key(self, sample: Sample, question: Question) -> str:
        text = prompts.render(question.template, sample, self.labels, question.earlier)
        if question.template in prompts.SCORED:  # the probabilities are those of these labels
            text += "\n" + ", ".join(self.labels.names)
            if isinstance(self.teacher, Endpoint):
                text += f"\n{self.teacher.settings.agreement_samples}"
        if isinstance(self.teacher, Endpoint) and sample.images:
            side = self.teacher.settings.max_image_side
            text += "" if side == EndpointSettings.max_image_side else f"\n{side} px"
        return key(self.name, question.template, question.sampling, text, [self._digest(p) for p in sample.images])


def _unreadable(error: OSError) -> Answer:
    return Answer("", finished=False, error=f"an image cannot be read: {error}", calls=0)
