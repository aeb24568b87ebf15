"""A teacher with a ledger: requests only those answers that the ledger does not have."""

import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from distill.annotation.first_answers import FirstAnswers, GivenAnswer
from distill.annotation.ledger import Ledger, PaidTotals, digest, key
from distill.annotation.scores import read_scores, scores_text
from distill.data.clips import VideoSettings
from distill.models.endpoint import Endpoint, EndpointSettings
from distill.models.endpoint.message import MediaError, UserMessage
from distill.models.endpoint.pool import as_completed
from distill.models.reasoner import Answer, ClassScores, Cost, Reasoner, Sampling
from distill.task import prompts
from distill.task.labels import LabelSpace
from distill.task.prompts import EarlierAnswers, Template
from distill.task.sample import Sample

log = logging.getLogger(__name__)

T = TypeVar("T")

_DIGEST_CACHE_SIZE = 4096  # digests of files


@dataclass(frozen=True)
class TeacherQuery:
    """A request about a sample: the template, the sampling settings and, for a *review*, the earlier answers."""

    template: Template = "reason"
    sampling: Sampling = Sampling()
    earlier: EarlierAnswers | None = None


Conversation = Generator[TeacherQuery, Answer, T]
"""About one sample: it yields a query, is sent the answer, and returns its result."""

Start = Callable[[Sample], Conversation[Any]]
"""Begins a conversation about a sample."""


class CachedTeacher:
    """A `Reasoner` that takes answers from its ledger and requests the others from `teacher`. Thread-safe.

    `max_parallel` is the number of samples to process in parallel. For a model on this machine it is `chunk`, the batch
    size. For an endpoint it is twice the `concurrency`: half of the threads have a request in flight, while the others
    encode images or wait for the disk. `known` has answers by key that the ledger lacks and that are not requested.

    Args:
        other_servers: addresses of servers that give another model the same name; their answers are not used.
        first_answers: counts the answers, and ends the stage if the first ones are all invalid; None: nothing does.
    """

    def __init__(
        self,
        teacher: Reasoner,
        labels: LabelSpace,
        ledger: Ledger,
        chunk: int,
        other_servers: Collection[str] = (),
        first_answers: FirstAnswers | None = None,
    ) -> None:
        self.name = teacher.name
        self.teacher, self.labels, self.ledger, self.chunk = teacher, labels, ledger, chunk
        concurrency = teacher.settings.concurrency if isinstance(teacher, Endpoint) else 1
        self.max_parallel = 2 * concurrency if isinstance(teacher, Endpoint) else chunk
        self._address = teacher.settings.address if isinstance(teacher, Endpoint) else ""
        self.other_servers, self._notices = other_servers, set[str]()
        self.first_answers = first_answers or FirstAnswers("", labels, 0)
        self._slots = threading.BoundedSemaphore(concurrency)
        self._digest = lru_cache(_DIGEST_CACHE_SIZE)(digest)
        self._lock = threading.Lock()
        self._in_flight: dict[str, Future[Answer]] = {}
        self.known: dict[str, Answer] = {}

    @property
    def paid(self) -> PaidTotals:
        """Totals of the answers that were used, new or old, each counted once."""
        return self.ledger.paid

    def reason(
        self, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, Answer]]:
        """See `Reasoner.reason`. A new answer is in the ledger before it is yielded."""
        return self._recalled_answers(samples, [TeacherQuery(template, sampling)] * len(samples))

    def classify(self, samples: Sequence[Sample], earlier: Sequence[EarlierAnswers] | None = None) -> ClassScores:
        """See `Reasoner.classify`. A sample without an answer has uniform probabilities and a label mass of 0.

        The cost of an answer from the ledger is what it cost when it was paid for.
        """
        probabilities = np.full((len(samples), len(self.labels)), 1 / len(self.labels))
        mass = np.zeros(len(samples))
        costs = [Cost()] * len(samples)
        errors: dict[int, str] = {}
        for index, answer in self.scores(samples, earlier):
            costs[index] = answer.cost
            if answer.error is None:
                probabilities[index], mass[index] = read_scores(answer)
            else:
                errors[index] = answer.error
        if errors:
            index, error = min(errors.items())
            values = (self.name, len(errors), len(samples), samples[index].id, error)
            log.warning("%s left %d of %d posts unanswered; the first, %s: %s", *values)
        return ClassScores(probabilities, mass, tuple(costs))

    def scores(
        self, samples: Sequence[Sample], earlier: Sequence[EarlierAnswers] | None = None
    ) -> Generator[tuple[int, Answer]]:
        """Yield (sample index, answer) in completion order; `read_scores` reads an answer."""
        if earlier is None:
            return self._recalled_answers(samples, [TeacherQuery("classify")] * len(samples))
        return self._recalled_answers(samples, [TeacherQuery("review", earlier=item) for item in earlier])

    def recall(self, samples: Iterable[Sample], conversation: Start) -> Iterator[Sample]:
        """Follow the conversations about the first samples as far as the ledger has the answers, before any request.

        They are so many that a run which ended because its first answers were all invalid ends again for nothing.

        Returns:
            All the samples.

        Raises:
            RunError: the answers in the ledger are all invalid; see `FirstAnswers`.
        """
        remaining, given = iter(samples), list[GivenAnswer]()
        if not self.first_answers.limit or not len(self.ledger):
            return remaining
        first = list(islice(remaining, self.first_answers.limit + self.max_parallel))
        for sample in first:
            with contextlib.suppress(OSError):
                for query, answer in self.replay(sample, conversation(sample)):
                    given += [] if answer is None else [(sample, query.template, answer)]
        self.first_answers.recall(*given)
        return chain(first, remaining)

    def replay(self, sample: Sample, conversation: Conversation[Any]) -> Iterator[tuple[TeacherQuery, Answer | None]]:
        """Follow a conversation with the known answers, until one is not known: None. Raises OSError (`ledger_key`)."""
        with contextlib.suppress(StopIteration):
            query = next(conversation)
            while True:
                ledger_key = self.ledger_key(sample, query)
                answer = self._known(ledger_key)
                yield query, answer
                if answer is None:
                    return
                query = conversation.send(answer)

    def _recalled_answers(
        self, samples: Sequence[Sample], queries: Sequence[TeacherQuery]
    ) -> Generator[tuple[int, Answer]]:
        remaining = iter(queries)

        def conversation(_: Sample) -> Conversation[None]:
            yield next(remaining)

        self.recall(samples, conversation)
        yield from self.answers(samples, queries)

    def ask(self, message: UserMessage, query: TeacherQuery, stop: threading.Event) -> Answer:
        """One answer of an endpoint. Threads with the same query share one request.

        Args:
            stop: set when the answer is no longer needed.

        Raises:
            RunError: the endpoint no longer answers, or the ledger cannot be written.
        """
        try:
            ledger_key = self.ledger_key(message.sample, query)
        except OSError as error:
            return _unreadable(error)
        with self._lock:
            is_first = ledger_key not in self._in_flight
            future = self._in_flight.setdefault(ledger_key, Future())
        if is_first:
            try:
                future.set_result(self._known(ledger_key) or self._request(ledger_key, message, query, stop))
            except BaseException as error:  # noqa: BLE001 - raised in every thread that waits for the answer
                future.set_exception(error)
            with self._lock:
                del self._in_flight[ledger_key]
        answer = future.result()
        if is_first:
            self.first_answers.add((message.sample, query.template, answer))
        return answer

    def paid_answer(self, ledger_key: str) -> Answer | None:
        """The answer in the ledger: from the teacher's address, else from an unknown one, else from another one.

        Servers move, so the same model name at another address is taken to be the same model and its answers are not
        paid for again, unless `ledger_by_address` is set or the address is that of another server of the recipe.
        """
        answer = self.ledger.get(ledger_key, self._address)
        if answer is not None or not isinstance(self.teacher, Endpoint):
            return answer
        usable = [address for address in self.ledger.addresses(ledger_key) if address not in self.other_servers]
        if not usable:
            return None
        reuse = not self.teacher.settings.ledger_by_address
        if usable[0] or self.other_servers or not reuse:
            self._notify(usable[0] or "an unknown address", reuse)
        return self.ledger.get(ledger_key, usable[0]) if reuse else None

    def _known(self, ledger_key: str) -> Answer | None:
        return self.paid_answer(ledger_key) or self.known.get(ledger_key)

    def _notify(self, address: str, reuse: bool) -> None:
        with self._lock:
            if address in self._notices:
                return
            self._notices.add(address)
        text = "%s has answers of %s from %s, which are used for %s; set ledger_by_address if it serves another model"
        if not reuse:
            text = "%s has answers of %s from %s; they are requested again from %s, because ledger_by_address is set"
        log.warning(text, self.ledger.path, self.name, address, self._address)

    def _request(self, ledger_key: str, message: UserMessage, query: TeacherQuery, stop: threading.Event) -> Answer:
        assert isinstance(self.teacher, Endpoint)
        with contextlib.suppress(MediaError):  # reported by the answer
            self.teacher.encode(message)  # before the slot is taken
        with self._slots:
            if query.template in prompts.SCORED:
                score = self.teacher.score(message, query.earlier, stop)
                text = scores_text(score.probabilities, score.label_mass, score.answer.text)
                answer = replace(score.answer, text=text)
            else:
                answer = self.teacher.ask(message, query.template, query.sampling, stop)
        return self._store(ledger_key, message.sample, query, answer)

    def _store(self, ledger_key: str, sample: Sample, query: TeacherQuery, answer: Answer) -> Answer:
        if answer.error is None:
            self.ledger.put(ledger_key, self.meta(sample, query), answer)
        return answer

    def meta(self, sample: Sample, query: TeacherQuery) -> dict[str, Any]:
        """The fields that describe a request in the ledger."""
        meta: dict[str, Any] = {"id": sample.id, "model": self.name, "version": prompts.VERSION}
        meta |= {"template": query.template, "temperature": query.sampling.temperature}
        meta |= {"base_url": self._address} if self._address else {}
        return meta | {"attempt": query.sampling.attempt}

    def knows(self, sample: Sample, query: TeacherQuery) -> bool:
        """Whether the ledger has an answer that can be used. Raises OSError."""
        return self.paid_answer(self.ledger_key(sample, query)) is not None

    def keep(self, sample: Sample, query: TeacherQuery, answer: Answer) -> Answer:
        """Write an answer that was requested elsewhere to the ledger, unless it has an error. Returns it."""
        return self._store(self.ledger_key(sample, query), sample, query, answer)

    def answers(self, samples: Sequence[Sample], queries: Sequence[TeacherQuery]) -> Iterator[tuple[int, Answer]]:
        """Yield (sample index, answer to its query) in completion order.

        For a model on this machine, all queries must have the same template and sampling settings.
        """
        teacher = self.teacher
        if isinstance(teacher, Endpoint):

            def ask(index: int, stop: threading.Event) -> Answer:
                return self.ask(teacher.message(samples[index]), queries[index], stop)

            yield from as_completed(ask, range(len(samples)), self.max_parallel)
            return
        waiting: dict[str, list[int]] = {}  # samples with the same key share one answer
        for index, sample in enumerate(samples):
            try:
                waiting.setdefault(self.ledger_key(sample, queries[index]), []).append(index)
            except OSError as error:
                yield index, _unreadable(error)
        for ledger_key in list(waiting):
            if (answer := self._known(ledger_key)) is not None:
                first = waiting[ledger_key][0]
                self.first_answers.add((samples[first], queries[first].template, answer))
                for index in waiting.pop(ledger_key):
                    yield index, answer
        keys = list(waiting)
        for chunk in (keys[begin : begin + self.chunk] for begin in range(0, len(keys), self.chunk)):
            firsts = [waiting[ledger_key][0] for ledger_key in chunk]
            for position, answer in self._ask_chunk([samples[i] for i in firsts], [queries[i] for i in firsts]):
                sample, query = samples[firsts[position]], queries[firsts[position]]
                self._store(chunk[position], sample, query, answer)
                self.first_answers.add((sample, query.template, answer))
                for index in waiting[chunk[position]]:
                    yield index, answer

    def _ask_chunk(self, samples: Sequence[Sample], queries: Sequence[TeacherQuery]) -> Iterator[tuple[int, Answer]]:
        """Answers of a model on this machine to one chunk."""
        query = queries[0]
        if query.template not in prompts.SCORED:
            yield from self.teacher.reason(samples, query.template, query.sampling)
            return
        earlier = [item.earlier for item in queries if item.earlier is not None]
        scores = self.teacher.classify(samples, earlier or None)
        costs = scores.costs or (Cost(calls=1),) * len(samples)
        for index, (row, mass, cost) in enumerate(zip(scores.probabilities, scores.label_mass, costs, strict=True)):
            error = None if mass != 0 else "the model gave no answer"
            yield index, Answer(scores_text(row, mass), True, error=error, **asdict(cost))

    def ledger_key(self, sample: Sample, query: TeacherQuery) -> str:
        """The key of an answer in the ledger. Raises OSError if a file of the post cannot be read."""
        text = prompts.render(query.template, sample, self.labels, query.earlier)
        if query.template in prompts.SCORED:  # the probabilities belong to these labels
            text += "\n" + ", ".join(self.labels.names)
            if isinstance(self.teacher, Endpoint):
                text += f"\n{self.teacher.settings.agreement_samples}"
        clips = self._clips(sample)
        if isinstance(self.teacher, Endpoint) and (sample.images or "video" in clips):
            side = self.teacher.settings.max_image_side
            text += "" if side == EndpointSettings.max_image_side else f"\n{side} px"
        images = [self._digest(path) for path in sample.images]
        return key(self.name, query.template, query.sampling, text, images, clips)

    def _clips(self, sample: Sample) -> dict[str, str]:
        """The digests of the video and the sound that are shown, and how the video is sampled.

        Not whether an endpoint gets a video or images: both show the same frames, and it is known only after a refusal.
        The name of a model on this machine says what it is shown and how that is sampled.
        """
        shown: dict[str, Path | None] = {"video": sample.video, "audio": sample.audio}
        if not isinstance(self.teacher, Endpoint):
            return {name: self._digest(path) for name, path in shown.items() if path is not None}
        settings, sampling = self.teacher.settings, self.teacher.clips.settings
        ignored = {"video": settings.video == "ignore", "audio": settings.audio == "ignore"}
        found = {name: self._digest(path) for name, path in shown.items() if path is not None and not ignored[name]}
        if "video" in found and (frames := _sampled(sampling, settings.frames)) != _sampled(VideoSettings(), None):
            found["frames"] = frames
        return found


def _sampled(settings: VideoSettings, limit: int | None) -> str:
    """How the frames of a video are sampled."""
    count = f"{min(settings.frames, limit or settings.frames)}"
    if settings.fps is not None:
        count = f"{settings.fps:g} a second, at most {min(settings.max_frames, limit or settings.max_frames)}"
    return f"{count}, {settings.max_side} px"


def _unreadable(error: OSError) -> Answer:
    return Answer("", finished=False, error=f"a file of the post cannot be read: {error}", calls=0)
