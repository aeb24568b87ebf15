"""Many dialogues with one teacher at once; what comes of them is handed on in their order.

A dialogue is a generator about one sample: it yields a question, is sent the answer, and returns its outcome.
"""

import operator
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Generic, TypeVar

from distill.annotation.cached_teacher import CachedTeacher, Question
from distill.models.endpoint import Endpoint
from distill.models.endpoint.pool import as_completed
from distill.models.reasoner import Answer
from distill.task import prompts
from distill.task.sample import Sample

T = TypeVar("T")

Dialogue = Generator[Question, Answer, T]

Progress = Callable[[int, int], None]
"""Told how many samples are settled, and how many there are; 0 where nobody knows."""

_WINDOW = 64
"""Dialogues that are open, or wait for an earlier one, for each sample that the teacher is handed at once."""


def run_conversations(
    samples: Iterable[Sample],
    dialogue: Callable[[Sample], Dialogue[T]],
    teacher_cache: CachedTeacher | None,
    progress: Progress | None = None,
) -> Iterator[T]:
    """What comes of a dialogue about each sample, in the samples' order, as soon as it and all before it are settled.

    A bounded window of samples is open at a time, and no sample is taken before it can be opened. An endpoint is asked
    the next question, of whatever sample, as soon as one is answered. A model on this machine is asked the question
    that most of the open samples wait for.

    Args:
        teacher_cache: the teacher; None where no dialogue asks anything.

    Raises:
        RunError: the teacher cannot be asked any more, or the ledger cannot be written; what was paid for is kept.
    """
    window: deque[_Open[T]] = deque()
    size = _WINDOW * (1 if teacher_cache is None else teacher_cache.at_once)
    total = operator.length_hint(samples)

    def opened() -> Iterator[_Open[T]]:
        for sample in samples:
            window.append(_Open(sample, dialogue(sample)))
            yield window[-1]

    def room() -> bool:
        return len(window) < size

    if teacher_cache is not None and isinstance(teacher_cache.teacher, Endpoint):
        over = _each_on_its_own(opened(), teacher_cache, room)
    else:
        over = _in_groups(opened(), teacher_cache, room)
    for settled, _ in enumerate(over, start=1):
        if progress is not None:
            progress(settled, total)
        while window and window[0].question is None:
            yield window.popleft().outcome


class _Open(Generic[T]):
    """A dialogue that has begun: the question that waits, None once there is an outcome."""

    outcome: T

    def __init__(self, sample: Sample, dialogue: Dialogue[T]) -> None:
        self.sample = sample
        self._dialogue = dialogue
        self._go_on(None)

    def tell(self, answer: Answer) -> None:
        self._go_on(answer)

    def _go_on(self, answer: Answer | None) -> None:
        try:
            question = next(self._dialogue) if answer is None else self._dialogue.send(answer)
        except StopIteration as end:
            self.outcome, question = end.value, None
        self.question: Question | None = question  # last: who sees that there is none, on another thread, finds one


def _each_on_its_own(
    opened: Iterator[_Open[T]], teacher_cache: CachedTeacher, room: Callable[[], bool]
) -> Iterator[_Open[T]]:
    """Dialogues with an endpoint as they end, each on a thread, so that its pictures are encoded once."""
    teacher = teacher_cache.teacher
    assert isinstance(teacher, Endpoint)

    def talk(one: _Open[T], stop: threading.Event) -> bool:
        post = teacher.open(one.sample)
        while one.question is not None and not stop.is_set():
            answer = teacher_cache.ask(post, one.question, stop)
            if answer.error is None or not stop.is_set():  # else it is cut short, and says nothing about the sample
                one.tell(answer)
        return one.question is None

    for one, ended in as_completed(talk, opened, teacher_cache.at_once, room):
        if ended:
            yield one


def _in_groups(
    opened: Iterator[_Open[T]], teacher_cache: CachedTeacher | None, room: Callable[[], bool]
) -> Iterator[_Open[T]]:
    """Dialogues with a model on this machine as they end; it is asked one question about many samples."""
    waiting: list[_Open[T]] = []
    more = True
    while more or waiting:
        while more and room():
            one = next(opened, None)
            more = one is not None
            if one is not None and one.question is None:
                yield one
            elif one is not None:
                waiting.append(one)
        if not waiting:
            continue
        assert teacher_cache is not None
        # labels before rationales; then what most wait for, so that a few are never asked about while many wait
        kinds = Counter(one.question for one in waiting if one.question is not None)
        kind = max(kinds, key=lambda question: (question.template in prompts.SCORED, kinds[question]))
        group = [one for one in waiting if one.question == kind]
        for index, answer in teacher_cache.answers([one.sample for one in group], [kind] * len(group)):
            group[index].tell(answer)
            if group[index].question is None:
                yield group[index]
        waiting = [one for one in waiting if one.question is not None]
