"""The ledger: answers persist, a truncated last line is removed, and only one process writes."""

import errno
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from distill.annotation import ledger as module
from distill.annotation.ledger import Ledger, digest, key
from distill.errors import RunError
from distill.models.reasoner import Answer, Sampling

ANSWER = Answer("words \u2764 and a line\nbreak", True, 12, 7)
CUT = Answer("", False, 3, 0)


def test_answers_are_read_back_from_the_file(tmp_path: Path) -> None:
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


def test_answers_of_one_key_from_several_addresses_are_kept_apart(tmp_path: Path) -> None:
    path, old, new = tmp_path / "ledger.jsonl", "http://old/v1", "http://new/v1"
    with Ledger(path) as ledger:
        ledger.put("a", {"base_url": old}, ANSWER)
        ledger.put("a", {"base_url": new}, CUT)
        ledger.put("ab", {}, CUT)
    for _ in range(2):
        with Ledger(path) as ledger:
            assert (ledger.get("a", old), ledger.get("a", new), ledger.get("a")) == (ANSWER, CUT, None)
            assert (ledger.addresses("a"), ledger.addresses("ab"), ledger.addresses("c")) == ([new, old], [""], [])
            assert ledger.paid.answers == 2
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "a", "ab"]


@pytest.mark.parametrize("truncated", [b'{"key": "c", "answer": {"te', b"\x00\x00\x00", b"\xff\xfe", b'"'])
def test_a_truncated_last_line_is_removed(tmp_path: Path, truncated: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.put("a", {}, ANSWER)
    complete = path.read_bytes()
    path.write_bytes(complete + truncated)
    with Ledger(path) as ledger:
        assert path.read_bytes() == complete
        ledger.put("b", {}, CUT)
    with Ledger(path) as ledger:
        assert (ledger.get("a"), ledger.get("b"), len(ledger)) == (ANSWER, CUT, 2)


def test_a_complete_last_line_without_a_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.put("a", {}, ANSWER)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    with Ledger(path) as ledger:
        ledger.put("b", {}, CUT)
    with Ledger(path) as ledger:
        assert (ledger.get("a"), ledger.get("b")) == (ANSWER, CUT)


def test_every_truncation_of_the_file_keeps_all_complete_lines(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        for name in "abc":
            ledger.put(name, {}, replace(ANSWER, text=name))
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with Ledger(path) as ledger:
            complete = content[:length].count(b"\n") + (content[length : length + 1] == b"\n")
            assert len(ledger) == complete
            assert path.read_bytes()[-1:] in (b"", b"\n")


def test_a_damaged_line_loses_only_its_own_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.put("a", {}, ANSWER)
        ledger.put("b", {}, CUT)
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first[:20] + b"\x00\n" + second)
    with Ledger(path) as ledger:
        assert (ledger.get("a"), ledger.get("b")) == (None, CUT)
    assert "line 1" in caplog.text


def test_a_second_process_cannot_open_the_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    program = f"from pathlib import Path; from distill.annotation.ledger import Ledger; Ledger(Path({str(path)!r}))"
    with Ledger(path):
        other = subprocess.run(
            [sys.executable, "-c", program], check=False, capture_output=True, text=True, cwd=Path(__file__).parents[2]
        )
        assert other.returncode == 1
        assert "LedgerInUse: another process" in other.stderr and str(path) in other.stderr
        with pytest.raises(RunError, match="another process"):
            Ledger(path)
    Ledger(path).close()


def test_a_full_disk_raises_and_leaves_complete_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    real_write = os.write

    def write_half(file: int, line: bytes) -> int:
        return real_write(file, line[: len(line) // 2])

    def write_nothing(file: int, line: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Ledger(path) as ledger:
        ledger.put("a", {}, ANSWER)
        complete = path.read_bytes()
        for write in (write_half, write_nothing):
            monkeypatch.setattr(module.os, "write", write)
            with pytest.raises(RunError, match="No space left"):
                ledger.put("b", {}, ANSWER)
            monkeypatch.undo()
            assert path.read_bytes() == complete
            assert ledger.get("b") is None
        ledger.put("b", {}, ANSWER)
    with Ledger(path) as ledger:
        assert len(ledger) == 2


def test_a_path_that_cannot_be_opened_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="ledger"):
        Ledger(tmp_path / "file" / "ledger.jsonl")
    with pytest.raises(RunError, match="ledger"):
        Ledger(tmp_path)


def test_an_answer_with_an_error_cannot_be_stored(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.jsonl") as ledger, pytest.raises(ValueError, match="paid"):
        ledger.put("a", {}, Answer("", False, error="refused"))


def test_threads_write_complete_lines(tmp_path: Path) -> None:
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


def test_a_key_depends_on_everything_that_determines_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tmp_path / "1.png", tmp_path / "2.png"
    one.write_bytes(b"1")
    other.write_bytes(b"2")
    greedy = Sampling()
    arguments: list[tuple[Any, ...]] = [
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
        ("m", "predict", greedy, "p", [], {"video": digest(one)}),
        ("m", "predict", greedy, "p", [], {"audio": digest(one)}),
        ("m", "predict", greedy, "p", [], {"video": digest(one), "audio": digest(one)}),
        ("m", "predict", greedy, "p", [], {"video": digest(one), "frames": "4"}),
    ]
    keys = {key(*item) for item in arguments}
    monkeypatch.setattr(module.prompts, "VERSION", "another version")
    assert len(keys | {key(*arguments[0])}) == len(arguments) + 1
    monkeypatch.undo()
    assert key(*arguments[0]) in keys
    other.write_bytes(b"1")
    assert digest(one) == digest(other)


def put_in_parallel(ledger: Ledger, count: int) -> list[BaseException | None]:
    """Put one answer on each of `count` threads; the error of each, or None."""
    errors: list[BaseException | None] = [None] * count

    def write(i: int) -> None:
        try:
            ledger.put(f"k{i}", {}, replace(ANSWER, text=str(i)))
        except RunError as error:
            errors[i] = error

    threads = [Thread(target=write, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_waiting_threads_share_one_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_fsync, path = os.fsync, tmp_path / "ledger.jsonl"
    sizes: list[int] = []

    def slow(file: int) -> None:
        if not sizes:  # wait until all other threads have written
            while path.read_bytes().count(b"\n") < 30:
                time.sleep(0.001)
        sizes.append(os.fstat(file).st_size)
        real_fsync(file)

    with Ledger(path) as ledger:
        monkeypatch.setattr(module.os, "fsync", slow)
        assert put_in_parallel(ledger, 30) == [None] * 30
        assert len(sizes) == 2 and sizes[-1] == path.stat().st_size
        ledger.put("late", {}, ANSWER)
        assert sizes[2] == path.stat().st_size
        assert ledger.get("k7") == replace(ANSWER, text="7") and ledger.paid.answers == 31


def test_after_a_failed_flush_only_flushed_answers_remain_and_writes_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.jsonl"

    def failing(file: int) -> None:
        while path.read_bytes().count(b"\n") < 11:  # one flushed line, and ten that wait
            time.sleep(0.001)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Ledger(path) as ledger:
        ledger.put("flushed", {}, ANSWER)
        complete = path.read_bytes()
        monkeypatch.setattr(module.os, "fsync", failing)
        assert all("Input/output error" in str(error) for error in put_in_parallel(ledger, 10))
        monkeypatch.undo()
        with pytest.raises(RunError, match="could not be written"):
            ledger.put("later", {}, ANSWER)
        assert path.read_bytes() == complete and len(ledger) == 1
    with Ledger(path) as ledger:
        ledger.put("later", {}, ANSWER)
        assert (ledger.get("flushed"), ledger.get("later")) == (ANSWER, ANSWER)


def test_used_answers_are_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        for name in "abc":
            ledger.put(name, {}, ANSWER)
        assert (ledger.paid.answers, ledger.paid.prompt_tokens) == (3, 36)
    with Ledger(path) as ledger:
        assert ledger.paid.answers == 0
        for name in "abba":
            ledger.get(name)
        assert (ledger.paid.answers, ledger.paid.prompt_tokens, ledger.paid.completion_tokens) == (2, 24, 14)


def test_the_last_line_of_a_key_counts(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.put("a", {}, ANSWER)
        ledger.put("a", {}, CUT)
        assert ledger.get("a") == CUT
    with Ledger(path) as ledger:
        assert (ledger.get("a"), len(ledger)) == (CUT, 1)


def test_the_key_of_a_post_without_clips_is_that_of_earlier_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.prompts, "VERSION", "5")
    found = key("m", "predict", Sampling(0.5, 9, 1, 2), "p", ["d"])
    assert found == "b553e3ed1f0a11501d526ff7abfdbdad6682d0a3d629def8818c019cc74a5f65"
