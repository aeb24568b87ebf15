"""Results of batches: expired, refused, damaged and hostile lines."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.errors import RunError
from tests.annotation.batch_runs import answers, batch, direct, remote, run
from tests.annotation.test_annotate_endpoint import posts
from tests.models.batch_server import BatchServer, Line
from tests.models.openai_server import ChatRequest


def test_expired_and_refused_lines_are_asked_again_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = posts(tmp_path, 40)
    _, ledger = direct(tmp_path, samples)
    refused = {"status": 503, "left": 4}

    def script(request: ChatRequest) -> tuple[int, Any] | None:
        if "post 2" in request.text and refused["left"] > 0:
            refused["left"] -= 1
            return 503, {"error": {"message": "overloaded"}}
        return None

    with BatchServer(expires=lambda number: number % 4 == 3, script=script, final="expired") as server:
        _, summary = run(tmp_path, samples, remote(server.url), batch(rounds=2))
        assert server.paid_twice == 0
    assert answers(tmp_path) == ledger
    counted = summary["batch"]["without_answer"]
    assert counted["batch_expired"] >= 10 and counted["status 503"] >= 3
    assert "requests have no answer: batch_expired (" in caplog.text and "not executed in time" in caplog.text


def test_a_damaged_line_is_named_and_the_others_are_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = posts(tmp_path, 20)
    _, ledger = direct(tmp_path, samples)
    cut = [True]

    def as_text(text: str) -> str:
        return text[: len(text) // 2] if cut and cut.pop() else text

    with BatchServer(as_text=as_text) as server:
        run(tmp_path, samples, remote(server.url), batch())
    assert answers(tmp_path) == ledger
    assert re.search(r"results-0001.jsonl: line \d+ cannot be read \(1 in all\); the other lines are used", caplog.text)


def test_results_of_which_no_line_can_be_read_are_not_asked_again(tmp_path: Path) -> None:
    samples = posts(tmp_path, 3)
    with BatchServer(as_text=lambda _: "<html>Moved</html>\n") as server:
        for _ in range(2):
            with pytest.raises(RunError, match=r"results-0001\.jsonl has no result of .*: to ask again, delete"):
                run(tmp_path, samples, remote(server.url), batch())
        assert len(server.batches) == 1
        server.as_text = lambda text: text
        shutil.rmtree(tmp_path / "batches" / "round-1")  # its answers are given up
        done, _ = run(tmp_path, samples, remote(server.url), batch())
        assert len(done) == 3 and len(server.batches) > 1


HOSTILE = [
    "",
    "null",
    "[]",
    '"text"',
    "{}",
    '{"custom_id": null}',
    '{"custom_id": "KEY"}',
    '{"custom_id": "KEY", "response": null, "error": null}',
    '{"custom_id": "KEY", "response": [], "error": "expired"}',
    '{"custom_id": "KEY", "response": {"status_code": {}, "body": {}}}',
    '{"custom_id": "KEY", "response": {"status_code": 200, "body": []}}',
    '{"custom_id": "KEY", "response": {"status_code": 200, "body": {"choices": []}}}',
    '{"custom_id": "KEY", "response": {"status_code": 200, "body": {"choices": [{"message": {"content": null}}]}}}',
    '{"custom_id": "KEY", "response": {"status_code": 200, "body": "<html>"}}',
    '{"custom_id": "KEY", "response": {"status_code": "401", "body": {"error": {"message": "no key"}}}}',
    '{"custom_id": "KEY", "response": {"status_code": 404, "body": {"error": {"message": "model not found"}}}}',
    '{"custom_id": "KEY", "response": {"status_code": 1e400, "body": {}}}',
    '{"custom_id": "KEY", "error": {"code": ["x"], "message": {"a": 1}}}',
    '{"custom_id": "\\u0000", "response": {}}',
    "[" * 100_000,
]


def test_hostile_lines_are_counted_and_asked_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = posts(tmp_path, 40)
    _, ledger = direct(tmp_path, samples)
    first = [True]

    def as_text(text: str) -> str:
        if not (first and first.pop()):
            return text
        good = text.splitlines()
        keys = [json.loads(line)["custom_id"] for line in good]
        bad = [line.replace("KEY", key) for line, key in zip(HOSTILE, keys, strict=False)]
        return "\ufeff" + "\r\n".join(bad + good[len(bad) :])

    with BatchServer(as_text=as_text) as server:
        _, summary = run(tmp_path, samples, remote(server.url), batch())
    assert answers(tmp_path) == ledger
    assert summary["batch"]["without_answer"]["missing"] >= 5 and sum(summary["batch"]["without_answer"].values()) >= 20
    assert "results of no request, such as" in caplog.text and "the other lines are used" in caplog.text


@pytest.mark.parametrize(
    "as_text",
    [
        lambda text: "\ufeff" + text.replace("\n", "\r\n"),
        lambda text: json.dumps([json.loads(line) for line in text.splitlines()]),
        lambda text: re.sub(r'"custom_id": "(\w+)"', r'"custom_id": " \1\\n"', text),
    ],
    ids=["a mark and other line ends", "one list", "spaces in ids"],
)
def test_results_in_another_form_are_read(as_text: Callable[[str], str], tmp_path: Path) -> None:
    samples = posts(tmp_path, 20)
    _, ledger = direct(tmp_path, samples)
    with BatchServer(as_text=as_text) as server:
        _, summary = run(tmp_path, samples, remote(server.url), batch())
        assert server.paid_twice == 0 and not summary["batch"]["without_answer"]
    assert answers(tmp_path) == ledger


def test_errors_are_counted_by_their_reason_and_their_words_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = posts(tmp_path, 20)
    errors = [
        ({"status_code": 500, "request_id": "r"}, {"error": {"message": "engine died", "code": 500}}),
        ({"status_code": 400, "body": None}, {"object": "error", "message": "too long", "code": 400}),
        (None, {"code": "half \ud83d", "message": "half \ud83d"}),
        (None, {"code": "content_filter", "message": "filtered \ud83d"}),
    ]
    first = [True]

    def results(lines: list[Line]) -> list[Line]:
        if not (first and first.pop()):
            return lines
        bad = [{"custom_id": line["custom_id"], "response": r, "error": e} for line, (r, e) in zip(lines, errors)]  # noqa: B905
        return bad + lines[len(bad) :]

    with BatchServer(results=results) as server:
        _, summary = run(tmp_path, samples, remote(server.url), batch())
    assert summary["batch"]["without_answer"] == {"status 500": 1, "status 400": 1, "half ?": 1, "filtered": 1}
    assert "engine died" in caplog.text and "too long" in caplog.text and "{" not in caplog.text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8"])
def test_results_of_the_user_that_are_not_of_the_file_are_refused(encoding: str, tmp_path: Path) -> None:
    samples = posts(tmp_path, 9)
    teacher, settings = remote("http://127.0.0.1:9/v1"), batch(submit="files")
    with pytest.raises(RunError, match="wait for answers"):
        run(tmp_path, samples, teacher, settings)
    results = tmp_path / "batches/round-1/results-0001.jsonl"
    results.write_text(json.dumps({"custom_id": "ab" * 32, "error": "x"}), encoding=encoding)
    for _ in range(2):
        with pytest.raises(RunError, match=r"results-0001\.jsonl has no result of .*: correct it, or delete it"):
            run(tmp_path, samples, teacher, settings)
    results.unlink()
    with pytest.raises(RunError, match=r"9 requests in 1 files of .*round-1 wait for answers"):
        run(tmp_path, samples, teacher, settings)
