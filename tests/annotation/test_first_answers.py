"""The first answers of a stage: the stage ends if all are invalid, and a rerun asks nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.annotation.cached_teacher import CachedTeacher
from distill.annotation.first_answers import FirstAnswers
from distill.annotation.ledger import Ledger
from distill.annotation.scheduler import run_conversations
from distill.annotation.scores import scores_text
from distill.errors import RunError
from distill.models.reasoner import Answer, Sampling
from distill.task.prompts import Template
from distill.task.sample import Sample
from tests.annotation.test_scheduler import LocalTeacher, ask_once_or_twice, texts
from tests.models.openai_server import LABELS, ChatRequest, Server, endpoint, posts, rationale

POST = Sample("s", "words", label="positive")
GOOD = Answer(rationale("positive"), True)
PROSE = Answer("I would\nrather not\x1b[31m say.", True)


def first(limit: int = 3) -> FirstAnswers:
    return FirstAnswers("annotate", LABELS, limit)


def label(mass: float, reply: str = "", calls: int = 1) -> Answer:
    return Answer(scores_text(np.full(3, 1 / 3), mass, reply), True, calls=calls)


@pytest.mark.parametrize(
    ("template", "answer", "message"),
    [
        ("predict", PROSE, r"such as 'I would\\nrather not\\x1b\[31m say\.' \(Text_analysis is missing\); use another"),
        ("explain", Answer(rationale("happy"), True), r"\(Prediction is 'happy', not one label\); .* task\.labels"),
        ("reason", Answer(rationale("positive"), False), r"\(the token limit .*\); raise annotate\.max_new_tokens"),
        ("predict", Answer(rationale("positive", "as the given label says"), True), r"\(says 'the given label'\)"),
        ("classify", label(0, "Who knows?"), r"such as 'Who knows\?' \(none names .*: negative, neutral, positive\)"),
        ("review", label(0), r"such as '' \(none names a label"),
        ("predict", Answer("x" * 200, True), r"such as 'x{80}…' \("),
    ],
)
def test_the_sentence_quotes_an_answer_and_says_what_is_wrong(template: Template, answer: Answer, message: str) -> None:
    answers = first()
    answers.add((POST, template, answer), (POST, template, answer))
    with pytest.raises(RunError, match=rf"^annotate: the first 3 answers are all invalid, .*{message}") as caught:
        answers.add((POST, template, answer))
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert str(caught.value).endswith("or set stop_after_invalid to 0")


def test_the_most_frequent_fault_is_named() -> None:
    cut = Answer("cut", False)
    with pytest.raises(RunError, match=r"such as 'cut' \(the token limit"):
        first(3).add((POST, "predict", PROSE), (POST, "predict", cut), (POST, "predict", cut))


def test_one_valid_answer_is_enough_for_its_kind() -> None:
    answers = first()
    answers.add((POST, "predict", PROSE), (POST, "predict", GOOD), *[(POST, "explain", PROSE)] * 9)
    answers.end()
    with pytest.raises(RunError):
        answers.add(*[(POST, "classify", label(0))] * 3)


def test_a_wrong_prediction_and_an_uncertain_label_are_valid() -> None:
    answers = first(1)
    answers.add((POST, "predict", Answer(rationale("negative"), True)), (POST, "classify", label(float("nan"))))
    answers.add((POST, "predict", PROSE), (POST, "classify", label(0)))  # more than the limit of one
    assert answers.end() is None


def test_requests_without_an_answer_say_nothing() -> None:
    answers = first()
    answers.add(*[(POST, "predict", Answer("", False, error="filtered", kind="filtered"))] * 9)
    assert answers.end() is None
    answers.add((POST, "predict", PROSE))
    with pytest.raises(RunError, match="the first 1 answers"):
        answers.end()


def test_sampled_answers_count_each() -> None:
    with pytest.raises(RunError, match="the first 10 answers"):
        first(10).add(*[(POST, "classify", label(0, calls=5))] * 2)


def test_at_the_end_fewer_answers_are_enough() -> None:
    answers = first(50)
    answers.add((POST, "predict", PROSE), (POST, "predict", PROSE))
    with pytest.raises(RunError, match="the first 2 answers"):
        answers.end()


def test_zero_never_stops() -> None:
    answers = first(0)
    answers.add(*[(POST, "predict", PROSE)] * 99)
    assert answers.end() is None


# ---- in a stage ----


def run(folder: Path, teacher: Any, samples: Any, limit: int = 20) -> list[str]:
    with Ledger(folder / "ledger.jsonl") as ledger:
        cached = CachedTeacher(teacher, LABELS, ledger, 8, first_answers=first(limit))
        return list(run_conversations(samples, ask_once_or_twice, cached))


def lines(folder: Path) -> int:
    return (folder / "ledger.jsonl").read_bytes().count(b"\n")


@pytest.mark.parametrize("concurrency", [1, 4])
def test_an_endpoint_is_not_asked_again_without_a_change(tmp_path: Path, concurrency: int) -> None:
    """Every other post is asked twice, so a rerun meets answers in another order than the first run."""

    def answer(request: ChatRequest) -> str:
        number = int(request.text.partition("post ")[2].partition('"')[0])
        return "more" if number % 2 and not request.body["temperature"] else "I am sorry."

    with Server(answer=answer, delay_s=0.002) as server:
        with pytest.raises(RunError, match="the first 20 answers") as stopped:
            run(tmp_path, endpoint(server.url, concurrency=concurrency), texts(300))
        paid = server.requests
        assert 20 <= paid <= 20 + 2 * concurrency and lines(tmp_path) == paid, "no answer in flight is lost"
        for _ in range(3):
            with pytest.raises(RunError) as again:
                run(tmp_path, endpoint(server.url, concurrency=concurrency), texts(300))
            assert str(again.value) == str(stopped.value)
        assert server.requests == paid
        assert len(run(tmp_path, endpoint(server.url), texts(300), limit=0)) == 300, "the setting lets it go on"
        assert server.requests == lines(tmp_path) == 450, "and nothing is paid twice"


def test_another_model_goes_on(tmp_path: Path) -> None:
    with Server(answer=lambda request: rationale("positive") if request.body["model"] == "new" else "?") as server:
        with pytest.raises(RunError):
            run(tmp_path, endpoint(server.url), texts(60))
        teacher = endpoint(server.url)
        teacher.settings.model = teacher.name = "new"
        assert len(run(tmp_path, teacher, texts(60))) == 60


@pytest.mark.parametrize("valid_at", [0, 15])
def test_a_run_with_a_valid_answer_is_resumed(tmp_path: Path, valid_at: int) -> None:
    """The valid answer is among the first; only invalid ones follow."""

    def answer(request: ChatRequest) -> str:
        return rationale("positive") if f'post {valid_at}"' in request.text else "?"

    with Server(answer=answer) as server:
        for count in (40, 80):
            assert len(run(tmp_path, endpoint(server.url, concurrency=1), texts(count))) == count
        assert server.requests == 80


def test_a_model_on_this_machine_is_stopped_as_well(tmp_path: Path) -> None:
    teacher = LocalTeacher()
    with pytest.raises(RunError, match="such as 'yes 0'"):
        run(tmp_path, teacher, texts(100))
    assert lines(tmp_path) == 20 and sum(size for _, size in teacher.batches) == 24
    again = LocalTeacher()
    with pytest.raises(RunError):
        run(tmp_path, again, texts(100))
    assert again.batches == []


@pytest.mark.parametrize("ask", ["reason", "classify"])
def test_single_questions_are_counted_as_well(tmp_path: Path, ask: str) -> None:
    """As `evaluate` and `calibrate` ask them; five answers are sampled for each label."""

    def question(cached: CachedTeacher, samples: list[Sample]) -> object:
        return dict(cached.reason(samples, "predict", Sampling())) if ask == "reason" else cached.classify(samples)

    samples = [Sample(f"s{i}", f"{i}", post.images) for i, post in enumerate(posts(tmp_path, 60))]
    with Server(answer=lambda request: "I am sorry.") as server:
        stopped, requests = list[str](), list[int]()
        for _ in range(2):
            with Ledger(tmp_path / "ledger.jsonl") as ledger, pytest.raises(RunError) as caught:
                question(CachedTeacher(endpoint(server.url), LABELS, ledger, 8, first_answers=first(20)), samples)
            stopped.append(str(caught.value))
            requests.append(server.requests)
    assert requests[0] == requests[1] <= 20 + 8 * (5 if ask == "classify" else 1)
    assert stopped[0] == stopped[1] and "'I am sorry." in stopped[0]
