"""A teacher with a memory: asked once, remembered for what it was asked, and counted as it was paid."""

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.annotation.cached_teacher import CachedTeacher, Question, read_scores
from distill.annotation.ledger import Ledger
from distill.errors import RunError
from distill.models.reasoner import Answer, ClassScores, Cost, Sampling
from distill.task.labels import LabelSpace
from distill.task.prompts import EarlierAnswers
from distill.task.sample import Sample
from tests.models.openai_server import LABELS, Server, endpoint, posts


class Teacher:
    """Answers with the text of the post; counts what it was asked."""

    name = "teacher"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def classify(self, samples: Sequence[Sample], earlier: object = None) -> ClassScores:
        self.asked += [sample.id for sample in samples]
        return ClassScores(np.tile([0.1, 0.2, 0.7], (len(samples), 1)), np.ones(len(samples)))

    def reason(
        self, samples: Sequence[Sample], template: str = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, Answer]]:
        for index, sample in reversed(list(enumerate(samples))):
            self.asked.append(sample.id)
            yield index, Answer(sample.text, True, error="refused" if sample.text == "bad" else None)


def test_a_teacher_with_a_memory_is_asked_once(tmp_path: Path) -> None:
    samples = [Sample(f"s{i}", text) for i, text in enumerate(["a", "b", "a", "bad", "c"])]
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        teacher = Teacher()
        memory = CachedTeacher(teacher, LabelSpace(), ledger, chunk=2)
        found = dict(memory.reason(samples, "predict", Sampling()))
        assert [found[i].text for i in range(5)] == ["a", "b", "a", "bad", "c"]
        assert sorted(teacher.asked) == ["s0", "s1", "s3", "s4"]
        again = Teacher()
        memory = CachedTeacher(again, LabelSpace(), ledger, chunk=2)
        assert dict(memory.reason(samples, "predict", Sampling())) == found
        assert again.asked == ["s3"]
        assert memory.paid.answers == 3
        assert len(ledger) == 3


def test_probabilities_are_remembered_for_their_labels_only(tmp_path: Path) -> None:
    samples = [Sample("s0", "a"), Sample("s1", "b")]
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        teacher = Teacher()
        for _ in range(2):
            found = dict(CachedTeacher(teacher, LabelSpace(), ledger, chunk=64).scores(samples))
            assert read_scores(found[1])[0] == [0.1, 0.2, 0.7]
            whole = CachedTeacher(teacher, LabelSpace(), ledger, chunk=64).classify(samples)
            assert whole.probabilities.tolist() == [[0.1, 0.2, 0.7]] * 2 and whole.label_mass.tolist() == [1, 1]
        assert teacher.asked == ["s0", "s1"]
        dict(CachedTeacher(teacher, LabelSpace.from_names(["bad", "so so", "good"]), ledger, chunk=64).scores(samples))
        assert teacher.asked == ["s0", "s1"] * 2


class Reader(Teacher):
    """A teacher that classifies by what was said before, counts the cost, and leaves the post "bad" unanswered."""

    def classify(self, samples: Sequence[Sample], earlier: Any = None) -> ClassScores:
        self.asked += [sample.id for sample in samples]
        said = [0.5 if earlier is None else earlier[i].student_confidence for i in range(len(samples))]
        mass = np.array([float(sample.text != "bad") for sample in samples])
        costs = tuple(Cost(1, 100 + i, 2, 0.25) for i in range(len(samples)))
        return ClassScores(np.array([[p, 0, 1 - p] for p in said]), mass, costs)


def test_a_review_is_remembered_for_what_was_said_before(tmp_path: Path) -> None:
    samples = [Sample("s0", "a"), Sample("s1", "b"), Sample("s2", "a")]
    earlier = [EarlierAnswers("neutral", p, "positive", 0.5) for p in (0.25, 0.75, 1.0)]
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        reader = Reader()
        memory = CachedTeacher(reader, LabelSpace(), ledger, chunk=2)
        for _ in range(2):
            scores = memory.classify(samples, earlier)
            assert scores.probabilities[:, 0].tolist() == [0.25, 0.75, 1.0]
            assert reader.asked == ["s0", "s1", "s2"]  # though two posts are alike
        assert memory.classify(samples).probabilities[:, 0].tolist() == [0.5] * 3
        assert reader.asked == ["s0", "s1", "s2", "s0", "s1"]
        memory.classify(samples[:1], [replace(earlier[0], teacher="negative")])
        assert len(reader.asked) == 6
    templates = [json.loads(line)["template"] for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert templates == ["review"] * 3 + ["classify"] * 2 + ["review"]


def test_costs_are_those_of_the_day_they_were_paid(tmp_path: Path) -> None:
    samples = [Sample("s0", "a"), Sample("s1", "b")]
    expected = (Cost(1, 100, 2, 0.25), Cost(1, 101, 2, 0.25))
    path = tmp_path / "ledger.jsonl"
    for _ in range(2):
        with Ledger(path) as ledger:
            assert CachedTeacher(Reader(), LabelSpace(), ledger, chunk=64).classify(samples).costs == expected
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:  # as they were written before calls and seconds were counted
        del line["answer"]["calls"], line["answer"]["seconds"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Ledger(path) as ledger:
        reader = Reader()
        costs = CachedTeacher(reader, LabelSpace(), ledger, chunk=64).classify(samples).costs
        assert costs == (Cost(1, 100, 2, 0.0), Cost(1, 101, 2, 0.0)) and not reader.asked


def test_a_classification_that_never_came_is_asked_again(tmp_path: Path) -> None:
    samples = [Sample("s0", "bad"), Sample("s1", "b")]
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        reader = Reader()
        memory = CachedTeacher(reader, LabelSpace(), ledger, chunk=64)
        for _ in range(2):
            scores = memory.classify(samples)
            assert scores.answered.tolist() == [False, True]
            assert scores.probabilities[0] == pytest.approx([1 / 3] * 3)
        assert reader.asked == ["s0", "s1", "s0"] and len(ledger) == 1


def test_a_picture_that_is_sent_larger_is_asked_about_again(tmp_path: Path) -> None:
    samples = posts(tmp_path, 3)
    with Server() as server, Ledger(tmp_path / "ledger.jsonl") as ledger:
        for side, asked in ((1024, 3), (1024, 3), (256, 6), (1024, 6)):
            memory = CachedTeacher(endpoint(server.url, max_image_side=side), LABELS, ledger, chunk=8)
            assert len(dict(memory.reason(samples, "predict", Sampling()))) == 3
            assert server.requests == asked


def test_a_classification_that_is_cut_short_is_not_remembered(tmp_path: Path) -> None:
    """Of five draws the key expires at the third: two alike would pass for the opinion of all five."""
    with Server() as server, Ledger(tmp_path / "ledger.jsonl") as ledger:
        server.refuse = lambda body: (401, "expired") if server.requests > 2 else None
        memory = CachedTeacher(endpoint(server.url, agreement_samples=5, concurrency=1), LABELS, ledger, chunk=8)
        with pytest.raises(RunError, match="api_key_env"):
            memory.classify(posts(tmp_path, 2))
        assert len(ledger) == 0
        stop, post = threading.Event(), posts(tmp_path, 1)[0]
        server.refuse = lambda body: stop.set() if server.requests > 4 else None  # type: ignore[func-returns-value]
        answer = memory.ask(memory.teacher.open(post), Question("classify"), stop)  # type: ignore[attr-defined]
        assert answer.error is not None and len(ledger) == 0


def test_an_unreadable_picture_is_no_answer(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        memory = CachedTeacher(Teacher(), LabelSpace(), ledger, chunk=64)
        found = dict(memory.reason([Sample("s0", "a", (tmp_path / "gone.png",))], "predict", Sampling()))
    assert found[0].error is not None and "gone.png" in found[0].error
