"""The ledger: what is in it stays, what was torn is cut, and nobody else writes to it."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from distill.annotation import ledger as module
from distill.annotation.ledger import Ledger, Memory, digest, key, read_scores
from distill.errors import RunError
from distill.models.reasoner import Answer, ClassScores, Cost, Sampling
from distill.task.labels import LabelSpace
from distill.task.prompts import Earlier
from distill.task.sample import Sample

ANSWER = Answer("words \u2764 and a line\nbreak", True, 12, 7)
CUT = Answer("", False, 3, 0)


def test_answers_come_back_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "annotate" / "ledger.jsonl"
    with Ledger(path) as ledger:
        assert ledger.get("a") is None
        ledger.put("a", {"id": "s1"}, ANSWER)
        ledger.put("b", {"id": "s2"}, CUT)
        assert ledger.get("a") == ANSWER
    with Ledger(path) as ledger:
        assert (ledger.get("a"), ledger.get("b"), len(ledger)) == (ANSWER, CUT, 2)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["s1", "s2"]


@pytest.mark.parametrize("torn", [b'{"key": "c", "answer": {"te', b"\x00\x00\x00", b"\xff\xfe", b'"'])
def test_a_torn_last_line_is_cut(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.put("a", {}, ANSWER)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with Ledger(path) as ledger:
        assert path.read_bytes() == whole
        ledger.put("b", {}, CUT)
    with Ledger(path) as ledger:
        assert (ledger.get("a"), ledger.get("b"), len(ledger)) == (ANSWER, CUT, 2)


def test_a_whole_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.put("a", {}, ANSWER)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    with Ledger(path) as ledger:
        ledger.put("b", {}, CUT)
    with Ledger(path) as ledger:
        assert (ledger.get("a"), ledger.get("b")) == (ANSWER, CUT)


def test_any_cut_of_the_file_keeps_every_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        for name in "abc":
            ledger.put(name, {}, replace(ANSWER, text=name))
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with Ledger(path) as ledger:
            whole = content[:length].count(b"\n") + (content[length : length + 1] == b"\n")
            assert len(ledger) == whole
            assert path.read_bytes()[-1:] in (b"", b"\n")


def test_a_damaged_line_costs_only_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.put("a", {}, ANSWER)
        ledger.put("b", {}, CUT)
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first[:20] + b"\x00\n" + second)
    with Ledger(path) as ledger:
        assert (ledger.get("a"), ledger.get("b")) == (None, CUT)
    assert "line 1" in caplog.text


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    program = f"from pathlib import Path; from distill.annotation.ledger import Ledger; Ledger(Path({str(path)!r}))"
    with Ledger(path):
        other = subprocess.run(
            [sys.executable, "-c", program], check=False, capture_output=True, text=True, cwd=Path(__file__).parents[2]
        )
        assert other.returncode == 1
        assert "RunError: another process" in other.stderr and str(path) in other.stderr
        with pytest.raises(RunError, match="another process"):
            Ledger(path)
    Ledger(path).close()


def test_a_full_disk_ends_the_run_with_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    real = os.write

    def half(file: int, line: bytes) -> int:
        return real(file, line[: len(line) // 2])

    def full(file: int, line: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Ledger(path) as ledger:
        ledger.put("a", {}, ANSWER)
        whole = path.read_bytes()
        for write in (half, full):
            monkeypatch.setattr(module.os, "write", write)
            with pytest.raises(RunError, match="No space left"):
                ledger.put("b", {}, ANSWER)
            monkeypatch.undo()
            assert path.read_bytes() == whole
            assert ledger.get("b") is None
        ledger.put("b", {}, ANSWER)
    with Ledger(path) as ledger:
        assert len(ledger) == 2


def test_a_ledger_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="ledger"):
        Ledger(tmp_path / "file" / "ledger.jsonl")
    with pytest.raises(RunError, match="ledger"):
        Ledger(tmp_path)


def test_an_answer_that_never_came_is_not_paid(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.jsonl") as ledger, pytest.raises(ValueError, match="paid"):
        ledger.put("a", {}, Answer("", False, error="refused"))


def test_threads_write_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:

        def write(begin: int) -> None:
            for i in range(begin, begin + 20):
                ledger.put(f"k{i}", {}, replace(ANSWER, text="x" * i))

        threads = [Thread(target=write, args=(begin,)) for begin in range(0, 100, 20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with Ledger(path) as ledger:
        assert len(ledger) == 100
        assert ledger.get("k77") == replace(ANSWER, text="x" * 77)


def test_a_key_depends_on_everything_that_the_answer_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "1.png", tmp_path / "2.png"
    one.write_bytes(b"1")
    other.write_bytes(b"2")
    greedy = Sampling()
    asked: list[tuple[Any, ...]] = [
        ("m", "predict", greedy, "p", [digest(one), digest(other)]),
        ("m", "predict", greedy, "p", [digest(other), digest(one)]),
        ("m", "predict", greedy, "p", [digest(one)]),
        ("m", "predict", greedy, "p"),
        ("n", "predict", greedy, "p"),
        ("m", "explain", greedy, "p"),
        ("m", "predict", greedy, "q"),
        ("m", "predict", replace(greedy, attempt=1), "p"),
        ("m", "predict", replace(greedy, temperature=0.3), "p"),
        ("m", "predict", replace(greedy, max_new_tokens=1), "p"),
        ("m", "predict", replace(greedy, seed=1), "p"),
    ]
    keys = {key(*question) for question in asked}
    monkeypatch.setattr(module.prompts, "VERSION", "of another day")
    assert len(keys | {key(*asked[0])}) == len(asked) + 1
    monkeypatch.undo()
    assert key(*asked[0]) in keys
    other.write_bytes(b"1")
    assert digest(one) == digest(other)


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
        memory = Memory(teacher, LabelSpace(), ledger, chunk=2)
        found = dict(memory.reason(samples, "predict", Sampling()))
        assert [found[i].text for i in range(5)] == ["a", "b", "a", "bad", "c"]
        assert sorted(teacher.asked) == ["s0", "s1", "s3", "s4"]
        again = Teacher()
        memory = Memory(again, LabelSpace(), ledger, chunk=2)
        assert dict(memory.reason(samples, "predict", Sampling())) == found
        assert again.asked == ["s3"]
        assert len(memory.paid) == 3
        assert len(ledger) == 3


def test_probabilities_are_remembered_for_their_labels_only(tmp_path: Path) -> None:
    samples = [Sample("s0", "a"), Sample("s1", "b")]
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        teacher = Teacher()
        for _ in range(2):
            found = dict(Memory(teacher, LabelSpace(), ledger, chunk=64).scores(samples))
            assert read_scores(found[1])[0] == [0.1, 0.2, 0.7]
            whole = Memory(teacher, LabelSpace(), ledger, chunk=64).classify(samples)
            assert whole.probabilities.tolist() == [[0.1, 0.2, 0.7]] * 2 and whole.label_mass.tolist() == [1, 1]
        assert teacher.asked == ["s0", "s1"]
        dict(Memory(teacher, LabelSpace.from_names(["bad", "so so", "good"]), ledger, chunk=64).scores(samples))
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
    earlier = [Earlier("neutral", p, "positive", 0.5) for p in (0.25, 0.75, 1.0)]
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        reader = Reader()
        memory = Memory(reader, LabelSpace(), ledger, chunk=2)
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
            assert Memory(Reader(), LabelSpace(), ledger, chunk=64).classify(samples).costs == expected
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:  # as they were written before calls and seconds were counted
        del line["answer"]["calls"], line["answer"]["seconds"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Ledger(path) as ledger:
        reader = Reader()
        costs = Memory(reader, LabelSpace(), ledger, chunk=64).classify(samples).costs
        assert costs == (Cost(1, 100, 2, 0.0), Cost(1, 101, 2, 0.0)) and not reader.asked


def test_a_classification_that_never_came_is_asked_again(tmp_path: Path) -> None:
    samples = [Sample("s0", "bad"), Sample("s1", "b")]
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        reader = Reader()
        memory = Memory(reader, LabelSpace(), ledger, chunk=64)
        for _ in range(2):
            scores = memory.classify(samples)
            assert scores.answered.tolist() == [False, True]
            assert scores.probabilities[0] == pytest.approx([1 / 3] * 3)
        assert reader.asked == ["s0", "s1", "s0"] and len(ledger) == 1


def test_an_unreadable_picture_is_no_answer(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        memory = Memory(Teacher(), LabelSpace(), ledger, chunk=64)
        found = dict(memory.reason([Sample("s0", "a", (tmp_path / "gone.png",))], "predict", Sampling()))
    assert found[0].error is not None and "gone.png" in found[0].error
