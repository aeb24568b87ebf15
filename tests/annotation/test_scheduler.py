"""The scheduler: a bounded window, no barriers, results in order, nothing requested or encoded again."""

import threading
import weakref
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from distill.annotation.annotate import AnnotateSettings, AnnotationCounts, Kept, annotate
from distill.annotation.cached_teacher import CachedTeacher, TeacherQuery
from distill.annotation.ledger import Ledger
from distill.annotation.scheduler import run_conversations
from distill.errors import RunError
from distill.models.endpoint import message as module
from distill.models.reasoner import Answer, Sampling
from distill.task.sample import Sample
from tests.models.openai_server import LABELS, ChatRequest, Server, endpoint, posts, rationale


def ask_once_or_twice(sample: Sample) -> Generator[TeacherQuery, Answer, str]:
    """A conversation of one query and, after the answer "more", a second one."""
    answer = yield TeacherQuery("predict")
    if answer.text == "more":
        answer = yield TeacherQuery("predict", Sampling(0.3, attempt=1))
    return f"{sample.id}: {answer.text}"


class LocalTeacher:
    """A model on this machine that records its batches; it answers "more" once for the ids in `more`."""

    name = "local"

    def __init__(self, more: Sequence[str] = ()) -> None:
        self.more = more
        self.batches: list[tuple[int, int]] = []  # attempt, size

    def reason(
        self, samples: Sequence[Sample], template: str = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, Answer]]:
        self.batches.append((sampling.attempt, len(samples)))
        for index, sample in enumerate(samples):
            is_more = sample.id in self.more and not sampling.attempt
            yield index, Answer("more" if is_more else f"yes {sampling.attempt}", True)


def texts(count: int, taken: list[str] | None = None) -> Iterator[Sample]:
    """Generate posts without images; `taken` collects their ids."""
    for n in range(count):
        if taken is not None:
            taken.append(f"s{n}")
        yield Sample(f"s{n}", f"post {n}", label=LABELS.names[n % 3])


def cached_teacher(folder: Path, teacher: Any, chunk: int = 64) -> CachedTeacher:
    return CachedTeacher(teacher, LABELS, Ledger(folder / "ledger.jsonl"), chunk)


# ---- a model on this machine ----


def test_equal_queries_form_batches_and_results_come_in_order(tmp_path: Path) -> None:
    teacher = LocalTeacher(more=["s0", "s7", "s8"])
    reported: list[tuple[int, int]] = []
    samples = list(texts(20))
    cached = cached_teacher(tmp_path, teacher, 8)
    found = list(run_conversations(samples, ask_once_or_twice, cached, lambda *done: reported.append(done)))
    assert found == [f"s{n}: yes {int(n in (0, 7, 8))}" for n in range(20)]
    assert teacher.batches == [(0, 8), (0, 8), (0, 4), (1, 3)]
    assert reported == [(n, 20) for n in range(1, 21)]


def test_no_more_samples_are_taken_than_the_window_holds(tmp_path: Path) -> None:
    taken: list[str] = []
    teacher = LocalTeacher(more=["s0"])
    found = run_conversations(texts(500, taken), ask_once_or_twice, cached_teacher(tmp_path, teacher, 2))
    assert taken == []
    assert next(found) == "s0: yes 1"  # its second query waits until it is the most frequent one
    assert len(taken) == 64 * 2
    for n in range(1, 400):
        assert next(found).startswith(f"s{n}:")
        assert len(taken) <= n + 1 + 64 * 2


def test_conversations_without_queries_need_no_teacher(tmp_path: Path) -> None:
    def without_queries(sample: Sample) -> Generator[TeacherQuery, Answer, str]:
        return sample.id
        yield

    assert list(run_conversations(texts(300), without_queries, None)) == [f"s{n}" for n in range(300)]


# ---- an endpoint ----


def test_a_slow_answer_delays_no_other_request_and_keeps_the_order(tmp_path: Path) -> None:
    """The first answer is sent only after all other requests; a barrier would deadlock."""
    others = threading.Event()
    asked: Counter[str] = Counter()

    def answer(request: ChatRequest) -> str:
        first = 'post 0"' in request.text
        asked["first" if first else "other"] += 1
        if asked["other"] == 200:
            others.set()
        if first:
            assert others.wait(20)
        return "more" if first and request.body["temperature"] == 0 else "yes"

    with Server(answer=answer) as server:
        teacher = cached_teacher(tmp_path, endpoint(server.url, concurrency=4))
        found = list(run_conversations(texts(201), ask_once_or_twice, teacher))
    assert found == [f"s{n}: yes" for n in range(201)] and server.max_in_flight <= 4


def test_a_blocked_answer_bounds_the_samples_taken(tmp_path: Path) -> None:
    release, taken = threading.Event(), list[str]()

    def answer(request: ChatRequest) -> str:
        assert release.wait(20) if 'post 0"' in request.text else True
        return "yes"

    def conversation(sample: Sample) -> Generator[TeacherQuery, Answer, str]:
        answer = yield TeacherQuery("predict")
        if sample.id == f"s{64 * 4 - 1}":  # the last sample of the window
            release.set()
        return answer.text

    with Server(answer=answer) as server:
        teacher = cached_teacher(tmp_path, endpoint(server.url, concurrency=2))
        found = run_conversations(texts(1000, taken), conversation, teacher)
        assert next(found) == "yes"
        assert len(taken) <= 64 * 4 + 1
        found.close()  # type: ignore[attr-defined]


def test_samples_are_released_when_their_results_are_yielded(tmp_path: Path) -> None:
    """A small number of samples is alive, for any number of samples."""
    alive, most = 0, 0

    def on_release() -> None:
        nonlocal alive
        alive -= 1

    def watched() -> Iterator[Sample]:
        nonlocal alive, most
        for sample in texts(600):
            alive, most = alive + 1, max(most, alive + 1)
            weakref.finalize(sample, on_release)
            yield sample
            del sample

    def answer(request: ChatRequest) -> str:
        return rationale(LABELS.names[int(request.text.partition("post ")[2].partition('"')[0]) % 3])

    counts = AnnotationCounts()
    with Server(answer=answer) as server, Ledger(tmp_path / "ledger.jsonl") as ledger:
        for item in annotate(watched(), LABELS, endpoint(server.url), AnnotateSettings(), ledger, counts):
            assert isinstance(item, Kept)
        assert (counts.n, counts.summary["paid"]["answers"]) == (600, 600)
    assert most <= 60  # eight are open with a concurrency of four, and some wait for an earlier one


def test_images_are_encoded_once_per_post(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: Counter[str] = Counter()
    original = module.jpeg_bytes

    def counted(path: Path, *limits: int) -> Any:
        encoded[path.name] += 1
        return original(path, *limits)

    monkeypatch.setattr(module, "jpeg_bytes", counted)
    samples = [Sample(f"s{n}", f"post {n}", post.images, label="positive") for n, post in enumerate(posts(tmp_path, 9))]
    counts = AnnotationCounts()
    with Server(rates={"500": 0.3}, answer=lambda request: "what?") as server, Ledger(tmp_path / "l.jsonl") as ledger:
        teacher = endpoint(server.url, max_attempts=30, backoff_s=0.001)
        assert len(list(annotate(samples, LABELS, teacher, AnnotateSettings(), ledger, counts))) == 9
    assert counts.summary["paid"]["answers"] == 9 * 4 < server.requests
    assert encoded.total() == 9


def test_equal_samples_share_one_request_even_in_flight(tmp_path: Path) -> None:
    equal = [Sample(f"s{n}", "the same post", label="neutral") for n in range(20)]
    with Server(delay_s=0.05, answer=lambda request: rationale("neutral")) as server:
        teacher = cached_teacher(tmp_path, endpoint(server.url, concurrency=8))
        assert len(list(run_conversations(equal, ask_once_or_twice, teacher))) == 20
        assert server.requests == 1 and teacher.paid.answers == 1


def test_a_cancelled_conversation_has_no_result(tmp_path: Path) -> None:
    """The key expires while other requests wait for a retry: paid answers are kept, and no result is invented."""
    found: list[str] = []
    busy = threading.Event()

    def refuse(body: dict[str, Any]) -> tuple[int, str] | None:
        if 'post 30"' in str(body):
            busy.set()
            return 429, "busy"
        return (401, "expired") if busy.is_set() and server.requests > 40 else None

    with Server(answer=lambda request: "more", refuse=refuse, headers={"Retry-After": "30"}) as server:
        teacher = cached_teacher(tmp_path, endpoint(server.url, concurrency=4))
        with pytest.raises(RunError, match="key"):
            for result in run_conversations(texts(500), ask_once_or_twice, teacher):
                found.append(result)
    assert all(result.endswith(": more") for result in found)
    assert teacher.paid.answers == server.paid
