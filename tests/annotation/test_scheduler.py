"""Many dialogues at once: a bounded window, no barriers, outcomes in order, nothing asked or encoded twice."""

import threading
import weakref
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from distill.annotation.annotate import AnnotateSettings, Kept, Tally, annotate
from distill.annotation.cached_teacher import CachedTeacher, Question
from distill.annotation.ledger import Ledger
from distill.annotation.scheduler import run_conversations
from distill.errors import RunError
from distill.models.endpoint import reasoner as module
from distill.models.reasoner import Answer, Sampling
from distill.task.sample import Sample
from tests.models.openai_server import LABELS, Server, endpoint, posts, rationale
from tests.models.openai_server import Question as Asked


def twice(sample: Sample) -> Generator[Question, Answer, str]:
    """A dialogue of one question and, on the answer "more", another one."""
    answer = yield Question("predict")
    if answer.text == "more":
        answer = yield Question("predict", Sampling(0.3, attempt=1))
    return f"{sample.id}: {answer.text}"


class Here:
    """A model on this machine, asked in groups; `more` are those that are asked twice."""

    name = "here"

    def __init__(self, more: Sequence[str] = ()) -> None:
        self.more = more
        self.groups: list[tuple[int, int]] = []  # attempt, size

    def reason(
        self, samples: Sequence[Sample], template: str = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, Answer]]:
        self.groups.append((sampling.attempt, len(samples)))
        for index, sample in enumerate(samples):
            again = sample.id in self.more and not sampling.attempt
            yield index, Answer("more" if again else f"yes {sampling.attempt}", True)


def texts(count: int, taken: list[str] | None = None) -> Iterator[Sample]:
    """Posts without a picture, made up as they are taken."""
    for n in range(count):
        if taken is not None:
            taken.append(f"s{n}")
        yield Sample(f"s{n}", f"post {n}", label=LABELS.names[n % 3])


def memory(folder: Path, teacher: Any, chunk: int = 64) -> CachedTeacher:
    return CachedTeacher(teacher, LABELS, Ledger(folder / "ledger.jsonl"), chunk)


# ---- a model on this machine ----


def test_questions_of_one_kind_are_asked_together_and_outcomes_come_in_order(tmp_path: Path) -> None:
    teacher = Here(more=["s0", "s7", "s8"])
    told: list[tuple[int, int]] = []
    samples = list(texts(20))
    found = list(
        run_conversations(samples, twice, memory(tmp_path, teacher, 8), lambda *progress: told.append(progress))
    )
    assert found == [f"s{n}: yes {int(n in (0, 7, 8))}" for n in range(20)]
    assert teacher.groups == [(0, 8), (0, 8), (0, 4), (1, 3)]
    assert told == [(n, 20) for n in range(1, 21)]


def test_no_more_samples_are_taken_than_the_window_holds(tmp_path: Path) -> None:
    taken: list[str] = []
    teacher = Here(more=["s0"])
    found = run_conversations(texts(500, taken), twice, memory(tmp_path, teacher, 2))
    assert taken == []
    assert next(found) == "s0: yes 1"  # which waited until its question was the one that most wait for
    assert len(taken) == 64 * 2
    for n in range(1, 400):
        assert next(found).startswith(f"s{n}:")
        assert len(taken) <= n + 1 + 64 * 2


def test_without_a_teacher_dialogues_end_by_themselves(tmp_path: Path) -> None:
    def silent(sample: Sample) -> Generator[Question, Answer, str]:
        return sample.id
        yield

    assert list(run_conversations(texts(300), silent, None)) == [f"s{n}" for n in range(300)]


# ---- an endpoint ----


def test_one_slow_answer_holds_up_no_other_and_keeps_its_place(tmp_path: Path) -> None:
    """The first answer comes only when all the others have been asked; a barrier anywhere would wait for ever."""
    others = threading.Event()
    asked: Counter[str] = Counter()

    def answer(question: Asked) -> str:
        first = 'post 0"' in question.text
        asked["first" if first else "other"] += 1
        if asked["other"] == 200:
            others.set()
        if first:
            assert others.wait(20)
        return "more" if first and question.body["temperature"] == 0 else "yes"

    with Server(answer=answer) as server:
        found = list(run_conversations(texts(201), twice, memory(tmp_path, endpoint(server.url, concurrency=4))))
    assert found == [f"s{n}: yes" for n in range(201)] and server.most_at_once <= 4


def test_a_stuck_answer_bounds_what_is_taken(tmp_path: Path) -> None:
    release, taken = threading.Event(), list[str]()

    def answer(question: Asked) -> str:
        assert release.wait(20) if 'post 0"' in question.text else True
        return "yes"

    def asked(sample: Sample) -> Generator[Question, Answer, str]:
        answered = yield Question("predict")
        if sample.id == f"s{64 * 4 - 1}":  # the last one of the window
            release.set()
        return answered.text

    with Server(answer=answer) as server:
        found = run_conversations(texts(1000, taken), asked, memory(tmp_path, endpoint(server.url, concurrency=2)))
        assert next(found) == "yes"
        assert len(taken) <= 64 * 4 + 1
        found.close()  # type: ignore[attr-defined]


def test_samples_are_let_go_as_they_are_handed_on(tmp_path: Path) -> None:
    """However many samples there are, few are alive at once; and no answer outlives its sample."""
    alive, most = 0, 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def watched() -> Iterator[Sample]:
        nonlocal alive, most
        for sample in texts(600):
            alive, most = alive + 1, max(most, alive + 1)
            weakref.finalize(sample, gone)
            yield sample
            del sample

    def answer(question: Asked) -> str:
        return rationale(LABELS.names[int(question.text.partition("post ")[2].partition('"')[0]) % 3])

    tally = Tally()
    with Server(answer=answer) as server, Ledger(tmp_path / "ledger.jsonl") as ledger:
        for item in annotate(watched(), LABELS, endpoint(server.url), AnnotateSettings(), ledger, tally):
            assert isinstance(item, Kept)
        assert (tally.n, tally.summary["paid"]["answers"]) == (600, 600)
    assert most <= 60  # eight are open at four questions at once, and some wait for an earlier one


def test_pictures_are_encoded_once_however_often_their_post_is_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: Counter[str] = Counter()
    real = module.jpeg

    def counted(path: Path, *limits: int) -> Any:
        encoded[path.name] += 1
        return real(path, *limits)

    monkeypatch.setattr(module, "jpeg", counted)
    samples = [Sample(f"s{n}", f"post {n}", post.images, label="positive") for n, post in enumerate(posts(tmp_path, 9))]
    tally = Tally()
    with Server(rates={"500": 0.3}, answer=lambda question: "what?") as server, Ledger(tmp_path / "l.jsonl") as ledger:
        teacher = endpoint(server.url, max_attempts=30, backoff_s=0.001)
        assert len(list(annotate(samples, LABELS, teacher, AnnotateSettings(), ledger, tally))) == 9
    assert tally.summary["paid"]["answers"] == 9 * 4 < server.requests
    assert encoded.total() == 9


def test_samples_that_are_alike_share_one_answer_even_in_flight(tmp_path: Path) -> None:
    alike = [Sample(f"s{n}", "the very same post", label="neutral") for n in range(20)]
    with Server(delay_s=0.05, answer=lambda question: rationale("neutral")) as server:
        teacher = memory(tmp_path, endpoint(server.url, concurrency=8))
        assert len(list(run_conversations(alike, twice, teacher))) == 20
        assert server.requests == 1 and teacher.paid.answers == 1


def test_a_dialogue_that_is_cut_short_has_no_outcome(tmp_path: Path) -> None:
    """The endpoint dies while others wait for their next try: what was paid is kept, and nothing is made up."""
    found: list[str] = []
    busy = set()

    def refuse(body: dict[str, Any]) -> tuple[int, str] | None:
        if 'post 30"' in str(body):
            busy.add("post 30")
            return 429, "busy"
        return (401, "expired") if busy and server.requests > 40 else None

    with Server(answer=lambda question: "more", refuse=refuse, headers={"Retry-After": "30"}) as server:
        teacher = memory(tmp_path, endpoint(server.url, concurrency=4))
        with pytest.raises(RunError, match="key"):
            for outcome in run_conversations(texts(500), twice, teacher):
                found.append(outcome)
    assert all(outcome.endswith(": more") for outcome in found)
    assert teacher.paid.answers == server.paid
