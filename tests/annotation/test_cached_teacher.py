"""CachedTeacher: each answer is requested once, keyed by its inputs, and counted when it is used."""

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.annotation.cached_teacher import CachedTeacher, TeacherQuery
from distill.annotation.ledger import Ledger
from distill.annotation.scores import read_scores
from distill.errors import RunError
from distill.models.reasoner import Answer, ClassScores, Cost, Sampling
from distill.task.labels import LabelSpace
from distill.task.prompts import EarlierAnswers
from distill.task.sample import Sample
from tests.models.openai_server import LABELS, Server, endpoint, posts


class Teacher:
    """Answers with the text of the post; records the sample ids."""

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


def test_each_answer_is_requested_once(tmp_path: Path) -> None:
    samples = [Sample(f"s{i}", text) for i, text in enumerate(["a", "b", "a", "bad", "c"])]
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        teacher = Teacher()
        cached = CachedTeacher(teacher, LabelSpace(), ledger, chunk=2)
        answers = dict(cached.reason(samples, "predict", Sampling()))
        assert [answers[i].text for i in range(5)] == ["a", "b", "a", "bad", "c"]
        assert sorted(teacher.asked) == ["s0", "s1", "s3", "s4"]
        again = Teacher()
        cached = CachedTeacher(again, LabelSpace(), ledger, chunk=2)
        assert dict(cached.reason(samples, "predict", Sampling())) == answers
        assert again.asked == ["s3"]
        assert cached.paid.answers == 3
        assert len(ledger) == 3


def test_probabilities_are_cached_per_label_space(tmp_path: Path) -> None:
    samples = [Sample("s0", "a"), Sample("s1", "b")]
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        teacher = Teacher()
        for _ in range(2):
            answers = dict(CachedTeacher(teacher, LabelSpace(), ledger, chunk=64).scores(samples))
            assert read_scores(answers[1])[0] == [0.1, 0.2, 0.7]
            scores = CachedTeacher(teacher, LabelSpace(), ledger, chunk=64).classify(samples)
            assert scores.probabilities.tolist() == [[0.1, 0.2, 0.7]] * 2 and scores.label_mass.tolist() == [1, 1]
        assert teacher.asked == ["s0", "s1"]
        dict(CachedTeacher(teacher, LabelSpace.from_names(["bad", "so so", "good"]), ledger, chunk=64).scores(samples))
        assert teacher.asked == ["s0", "s1"] * 2


class ReviewTeacher(Teacher):
    """Classifies by the earlier student confidence, returns costs, and leaves the post "bad" unanswered."""

    def classify(self, samples: Sequence[Sample], earlier: Any = None) -> ClassScores:
        self.asked += [sample.id for sample in samples]
        confidences = [0.5 if earlier is None else earlier[i].student_confidence for i in range(len(samples))]
        mass = np.array([float(sample.text != "bad") for sample in samples])
        costs = tuple(Cost(1, 100 + i, 2, 0.25) for i in range(len(samples)))
        return ClassScores(np.array([[p, 0, 1 - p] for p in confidences]), mass, costs)


def test_reviews_are_cached_per_earlier_answers(tmp_path: Path) -> None:
    samples = [Sample("s0", "a"), Sample("s1", "b"), Sample("s2", "a")]
    earlier = [EarlierAnswers("neutral", p, "positive", 0.5) for p in (0.25, 0.75, 1.0)]
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        review_teacher = ReviewTeacher()
        cached = CachedTeacher(review_teacher, LabelSpace(), ledger, chunk=2)
        for _ in range(2):
            scores = cached.classify(samples, earlier)
            assert scores.probabilities[:, 0].tolist() == [0.25, 0.75, 1.0]
            assert review_teacher.asked == ["s0", "s1", "s2"]  # even though two posts are equal
        assert cached.classify(samples).probabilities[:, 0].tolist() == [0.5] * 3
        assert review_teacher.asked == ["s0", "s1", "s2", "s0", "s1"]
        cached.classify(samples[:1], [replace(earlier[0], teacher="negative")])
        assert len(review_teacher.asked) == 6
    templates = [json.loads(line)["template"] for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert templates == ["review"] * 3 + ["classify"] * 2 + ["review"]


def test_costs_are_those_of_the_first_request(tmp_path: Path) -> None:
    samples = [Sample("s0", "a"), Sample("s1", "b")]
    expected = (Cost(1, 100, 2, 0.25), Cost(1, 101, 2, 0.25))
    path = tmp_path / "ledger.jsonl"
    for _ in range(2):
        with Ledger(path) as ledger:
            assert CachedTeacher(ReviewTeacher(), LabelSpace(), ledger, chunk=64).classify(samples).costs == expected
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:  # the format before `calls` and `seconds` existed
        del line["answer"]["calls"], line["answer"]["seconds"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Ledger(path) as ledger:
        review_teacher = ReviewTeacher()
        costs = CachedTeacher(review_teacher, LabelSpace(), ledger, chunk=64).classify(samples).costs
        assert costs == (Cost(1, 100, 2, 0.0), Cost(1, 101, 2, 0.0)) and not review_teacher.asked


def test_an_unanswered_classification_is_requested_again(tmp_path: Path) -> None:
    samples = [Sample("s0", "bad"), Sample("s1", "b")]
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        review_teacher = ReviewTeacher()
        cached = CachedTeacher(review_teacher, LabelSpace(), ledger, chunk=64)
        for _ in range(2):
            scores = cached.classify(samples)
            assert scores.answered.tolist() == [False, True]
            assert scores.probabilities[0] == pytest.approx([1 / 3] * 3)
        assert review_teacher.asked == ["s0", "s1", "s0"] and len(ledger) == 1


def test_another_image_size_is_another_request(tmp_path: Path) -> None:
    samples = posts(tmp_path, 3)
    with Server() as server, Ledger(tmp_path / "ledger.jsonl") as ledger:
        for side, asked in ((1024, 3), (1024, 3), (256, 6), (1024, 6)):
            cached = CachedTeacher(endpoint(server.url, max_image_side=side), LABELS, ledger, chunk=8)
            assert len(dict(cached.reason(samples, "predict", Sampling()))) == 3
            assert server.requests == asked


def test_a_cancelled_classification_is_not_stored(tmp_path: Path) -> None:
    """The key expires at the third of five samples: two equal answers must not count as the agreement of five."""
    with Server() as server, Ledger(tmp_path / "ledger.jsonl") as ledger:
        server.refuse = lambda body: (401, "expired") if server.requests > 2 else None
        cached = CachedTeacher(endpoint(server.url, agreement_samples=5, concurrency=1), LABELS, ledger, chunk=8)
        with pytest.raises(RunError, match="api_key_env"):
            cached.classify(posts(tmp_path, 2))
        assert len(ledger) == 0
        stop, sample = threading.Event(), posts(tmp_path, 1)[0]
        server.refuse = lambda body: stop.set() if server.requests > 4 else None  # type: ignore[func-returns-value]
        message = cached.teacher.message(sample)  # type: ignore[attr-defined]
        answer = cached.ask(message, TeacherQuery("classify"), stop)
        assert answer.error is not None and len(ledger) == 0


def test_an_unreadable_image_gives_an_error(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        cached = CachedTeacher(Teacher(), LabelSpace(), ledger, chunk=64)
        answers = dict(cached.reason([Sample("s0", "a", (tmp_path / "gone.png",))], "predict", Sampling()))
    assert answers[0].error is not None and "gone.png" in answers[0].error


# ---- two addresses ----


def ask_at(server: Server, samples: list[Sample], ledger: Ledger, others: Sequence[str] = (), **settings: Any) -> int:
    """Classify the samples at one server; returns how many requests it got."""
    before = server.requests
    teacher = endpoint(server.url.replace("http://", "http://me:secret@"), **settings)
    CachedTeacher(teacher, LABELS, ledger, chunk=8, other_servers=others).classify(samples)
    return server.requests - before


def test_a_server_that_moved_is_not_paid_again_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples, path = posts(tmp_path, 6), tmp_path / "ledger.jsonl"
    with Server() as old, Server() as new, Ledger(path) as ledger:
        assert ask_at(old, samples[:5], ledger, agreement_samples=1) == 5
        assert ask_at(old, samples[:5], ledger, agreement_samples=1) == 0 and not notices(caplog)
        assert ask_at(new, samples, ledger, agreement_samples=1) == 1
        expected = f"{path} has answers of big-vl from {old.url}, which are used for {new.url}; set ledger_by_address"
        assert [text.startswith(expected) for text in notices(caplog)] == [True]
        caplog.clear()
        assert ask_at(new, samples, ledger, agreement_samples=1, ledger_by_address=True) == 5
        expected = f"{path} has answers of big-vl from {old.url}; they are requested again from {new.url}"
        assert [text.startswith(expected) for text in notices(caplog)] == [True]
        assert ask_at(new, samples, ledger, agreement_samples=1, ledger_by_address=True) == 0
        assert ledger.paid.answers == 11
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["base_url"] for line in lines] == [old.url] * 5 + [new.url] * 6 and "secret" not in path.read_text()


def test_two_servers_of_one_recipe_do_not_share_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Both give their model the same name."""
    samples = posts(tmp_path, 5)
    with Server() as one, Server() as two, Ledger(tmp_path / "ledger.jsonl") as ledger:
        for expected in (5, 0):
            assert ask_at(one, samples, ledger, [two.url], agreement_samples=1) == expected
            assert ask_at(two, samples, ledger, [one.url], agreement_samples=1) == expected
    assert not notices(caplog)


def test_answers_without_an_address_are_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Earlier versions did not record it."""
    samples, path = posts(tmp_path, 5), tmp_path / "ledger.jsonl"
    with Server() as server:
        with Ledger(path) as ledger:
            ask_at(server, samples, ledger, agreement_samples=1)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({k: v for k, v in e.items() if k != "base_url"}) + "\n" for e in lines))
        with Ledger(path) as ledger:
            assert ask_at(server, samples, ledger, agreement_samples=1) == 0 and not notices(caplog)
            assert ask_at(server, samples, ledger, ["http://two/v1"], agreement_samples=1) == 0
            assert len(notices(caplog)) == 1 and "from an unknown address" in notices(caplog)[0]
            assert ask_at(server, samples, ledger, agreement_samples=1, ledger_by_address=True) == 5


def notices(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "distill.annotation.cached_teacher"]
