"""Runs many conversations with one teacher in parallel and yields their results in sample order."""

import operator
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from distill.annotation.cached_teacher import CachedTeacher, Conversation, TeacherQuery
from distill.models.endpoint import Endpoint
from distill.models.endpoint.pool import as_completed
from distill.models.reasoner import Answer
from distill.task import prompts
from distill.task.sample import Sample

T = TypeVar("T")

Progress = Callable[[int, int], None]
"""Called with the number of finished samples and the total number of samples (0 if it is unknown)."""

_WINDOW = 64
"""Size of the window as a multiple of `CachedTeacher.max_parallel`."""


def run_conversations(
    samples: Iterable[Sample],
    conversation: Callable[[Sample], Conversation[T]],
    teacher_cache: CachedTeacher | None,
    progress: Progress | None = None,
) -> Iterator[T]:
    """Yield the result of a conversation about each sample, in sample order, as soon as all earlier ones are finished.

    The window of samples that are open, or finished but not yet yielded, is bounded; a sample is taken only when it
    can start. An endpoint receives the next query, of any sample, as soon as a request is answered. A model on this
    machine receives the query that most open samples wait for, in batches.

    Args:
        teacher_cache: the teacher; None if no conversation yields a query.

    Raises:
        RunError: the teacher no longer answers, its first answers are all invalid, or the ledger cannot be written.
            Paid answers are kept.
    """
    window: deque[_OpenConversation[T]] = deque()
    max_window = _WINDOW * (1 if teacher_cache is None else teacher_cache.max_parallel)
    total = operator.length_hint(samples)
    if teacher_cache is not None:
        samples = teacher_cache.recall(samples, conversation)

    def opened() -> Iterator[_OpenConversation[T]]:
        for sample in samples:
            window.append(_OpenConversation(sample, conversation(sample)))
            yield window[-1]

    def has_capacity() -> bool:
        return len(window) < max_window

    if teacher_cache is not None and isinstance(teacher_cache.teacher, Endpoint):
        finished = _run_on_threads(opened(), teacher_cache, has_capacity)
    else:
        finished = _run_in_batches(opened(), teacher_cache, has_capacity)
    for count, _ in enumerate(finished, start=1):
        if progress is not None:
            progress(count, total)
        while window and window[0].query is None:
            yield window.popleft().result


class _OpenConversation(Generic[T]):
    """A conversation that has started. `query` is the pending query; it is None once there is a `result`."""

    result: T

    def __init__(self, sample: Sample, conversation: Conversation[T]) -> None:
        self.sample = sample
        self._conversation = conversation
        self._advance(None)

    def send(self, answer: Answer) -> None:
        """Answer the pending query."""
        self._advance(answer)

    def _advance(self, answer: Answer | None) -> None:
        try:
            query = next(self._conversation) if answer is None else self._conversation.send(answer)
        except StopIteration as end:
            self.result, query = end.value, None
        self.query: TeacherQuery | None = query  # set last: a thread that reads None here can read the result


def _run_on_threads(
    opened: Iterator[_OpenConversation[T]], teacher_cache: CachedTeacher, has_capacity: Callable[[], bool]
) -> Iterator[_OpenConversation[T]]:
    """Yield finished conversations with an endpoint. Each runs on one thread, so that its images are encoded once."""
    teacher = teacher_cache.teacher
    assert isinstance(teacher, Endpoint)

    def run(conversation: _OpenConversation[T], stop: threading.Event) -> bool:
        message = teacher.message(conversation.sample)
        while conversation.query is not None and not stop.is_set():
            answer = teacher_cache.ask(message, conversation.query, stop)
            if answer.error is None or not stop.is_set():  # a cancelled request says nothing about the sample
                conversation.send(answer)
        return conversation.query is None

    for conversation, is_finished in as_completed(run, opened, teacher_cache.max_parallel, has_capacity):
        if is_finished:
            yield conversation


def _run_in_batches(
    opened: Iterator[_OpenConversation[T]], teacher_cache: CachedTeacher | None, has_capacity: Callable[[], bool]
) -> Iterator[_OpenConversation[T]]:
    """Yield finished conversations with a model on this machine, which receives one query about many samples."""
    waiting: list[_OpenConversation[T]] = []
    has_more = True
    while has_more or waiting:
        while has_more and has_capacity():
            conversation = next(opened, None)
            has_more = conversation is not None
            if conversation is not None and conversation.query is None:
                yield conversation
            elif conversation is not None:
                waiting.append(conversation)
        if not waiting:
            continue
        assert teacher_cache is not None
        # Labels come before rationales, then the most frequent query, so that batches stay large.
        counts = Counter(item.query for item in waiting if item.query is not None)
        query = max(counts, key=lambda each: (each.template in prompts.SCORED, counts[each]))
        batch = [item for item in waiting if item.query == query]
        for index, answer in teacher_cache.answers([item.sample for item in batch], [query] * len(batch)):
            batch[index].send(answer)
            if batch[index].query is None:
                yield batch[index]
        waiting = [item for item in waiting if item.query is not None]
