"""Batches at a service that fails or differs, and runs that are killed or interrupted at any moment."""

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.errors import RunError
from tests.annotation.batch_runs import answers, batch, direct, remote, run
from tests.annotation.test_annotate import ROOT
from tests.annotation.test_annotate_endpoint import posts
from tests.models.batch_server import BatchServer


def test_lost_replies_and_failing_calls_do_not_make_a_second_batch(tmp_path: Path) -> None:
    samples = posts(tmp_path, 20)
    _, ledger = direct(tmp_path, samples)
    failing = {("POST", "/files"): [500, 503], ("POST", "/batches"): [429, 500], ("GET", "/batches/batch_0"): [502]}
    dropped = [("POST", "/batches"), ("GET", "/files/file-2/content")]

    def refuse(method: str, path: str) -> int | None:
        return failing[method, path].pop(0) if failing.get((method, path)) else None

    def drop(method: str, path: str) -> bool:
        return (method, path) in dropped and dropped.remove((method, path)) is None

    with BatchServer(refuse_call=refuse, drop_reply=drop) as server:
        run(tmp_path, samples, remote(server.url, max_attempts=8), batch())
        assert len(server.batches) == 2 and server.paid_twice == 0
    assert answers(tmp_path) == ledger and not any(failing.values())


@pytest.mark.parametrize(
    ("fields", "problem", "refuse", "message"),
    [
        ({}, "Enqueued token limit reached", None, "has not accepted batch batch_0 .*Enqueued token limit reached"),
        ({}, "", (404, "/batches"), r"does not have the batch API \(status 404\): not here.*; set submit: files"),
        ({}, "", (401, "/batches"), r"requires a key, but api_key_env is not set \(status 401\)"),
        ({}, "", (500, "/batches/batch_0"), "the batch API at .* does not answer, after 4 attempts: status 500"),
        ({}, "", (404, "/batches/batch_0"), "does not know the batch batch_0 .*its requests are asked again"),
    ],
)
def test_a_service_that_refuses_is_explained(
    fields: Any, problem: str, refuse: tuple[int, str] | None, message: str, tmp_path: Path
) -> None:
    samples = posts(tmp_path, 12)
    with BatchServer(problem=problem, batch_fields=fields) as server:
        if refuse is not None:
            server.refuse_call = lambda method, path: refuse[0] if path == refuse[1] else None
        with pytest.raises(RunError, match=message):
            run(tmp_path, samples, remote(server.url), batch())
        server.problem, server.refuse_call = "", lambda method, path: None
        done, _ = run(tmp_path, samples, remote(server.url), batch())
        assert server.paid_twice == 0
    assert len(done) == 12


def test_unknown_states_and_missing_fields_are_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = posts(tmp_path, 12)
    with BatchServer(polls=4) as server:
        normal = server.shown

        def shown(each: dict[str, Any]) -> dict[str, Any]:
            content = {
                n: v for n, v in normal(each).items() if n not in ("request_counts", "metadata", "error_file_id")
            }
            return content | ({"status": "QUEUED"} if each["polls"] < 3 else {})

        server.shown = shown  # type: ignore[method-assign]
        done, _ = run(tmp_path, samples, remote(server.url), batch())
    assert len(done) == 12
    assert caplog.text.count("'queued' is no known state of a batch; it is waited for") == 1


def test_the_key_is_sent_and_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCH_TEST_KEY", "sk-very-secret-1")
    samples = posts(tmp_path, 12)
    with BatchServer() as server:
        server.refuse_call = lambda method, path: 400 if path == "/batches" else None
        with pytest.raises(RunError) as error:
            run(tmp_path, samples, remote(server.url, api_key_env="BATCH_TEST_KEY"), batch())
        assert set(server.keys) == {"Bearer sk-very-secret-1"}
    assert "sk-very-secret-1" not in str(error.value) and "***" in str(error.value)


# ---- kills ----


PROGRAM = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tests.annotation.batch_runs import batch, remote, run, Sample, LABELS
folder = Path(sys.argv[1])
samples = [Sample(f"s{{i}}", f"post {{i}}", (folder / f"{{i}}.png",), label=LABELS.names[i % 3]) for i in range(60)]
run(folder, samples, remote(sys.argv[2], timeout_s=600), batch(poll_s=0.2))
"""


def killed(folder: Path, server: BatchServer, when: Callable[[], bool]) -> None:
    """Start the run in a process and kill it at a moment."""
    child = subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder), server.url], cwd=ROOT)
    while not when() and child.poll() is None:
        time.sleep(0.002)
    child.kill()
    assert child.wait() == -signal.SIGKILL


@pytest.mark.parametrize("listed", ["at once", "later"])
def test_killed_between_the_creation_of_a_batch_and_its_id(tmp_path: Path, listed: str) -> None:
    samples = posts(tmp_path, 60)
    _, ledger = direct(tmp_path, samples)
    with BatchServer(polls=None) as server:
        server.drop_reply = lambda method, path: (method, path) == ("POST", "/batches") and bool(time.sleep(60)) is None
        killed(tmp_path, server, lambda: bool(server.batches))
        state = json.loads((tmp_path / "batches/round-1/state.json").read_text())
        assert state["files"][0]["input_file"] and not state["files"][0]["batch"]
        server.drop_reply, looks = lambda method, path: False, []
        if listed == "later":
            normal = server.batches
            hidden = {id: normal.pop(id) for id in list(normal)}

            def refuse(method: str, path: str) -> None:
                if (method, path) == ("GET", "/batches"):
                    looks.append(path)
                    normal.update(hidden if len(looks) > 1 else {})

            server.refuse_call = refuse  # type: ignore[assignment]
        server.polls = 2
        run(tmp_path, samples, remote(server.url), batch(poll_s=0.1))
        assert server.paid_twice == 0 and len(server.batches) == 2
    assert answers(tmp_path) == ledger


def test_killed_while_polling_and_again_in_the_second_round(tmp_path: Path) -> None:
    samples = posts(tmp_path, 60)
    expected, ledger = direct(tmp_path, samples)
    with BatchServer(polls=None) as server:
        killed(tmp_path, server, lambda: any(each["polls"] > 1 for each in server.batches.values()))
        server.polls = 1
        killed(tmp_path, server, lambda: len(server.batches) > 1)
        server.polls = 2
        done, _ = run(tmp_path, samples, remote(server.url), batch())
        assert server.paid_twice == 0 and server.batched + server.requests == len(ledger)
    assert done == expected and answers(tmp_path) == ledger


def test_interrupted_while_polling_says_that_the_batch_goes_on(tmp_path: Path) -> None:
    samples = posts(tmp_path, 60)
    with BatchServer(polls=None) as server:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), server.url]
        child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while not any(each["polls"] > 1 for each in server.batches.values()) and child.poll() is None:
            time.sleep(0.002)
        child.send_signal(signal.SIGINT)
        _, printed = child.communicate()
        assert f"annotate: the batches go on at {server.url} and the next run fetches their answers" in printed
        assert [each["status"] for each in server.batches.values()] == ["in_progress"]
        server.polls = 2
        run(tmp_path, samples, remote(server.url), batch())
        assert server.paid_twice == 0 and len(server.batches) == 2


@pytest.mark.parametrize("counts", [{}, {"request_counts": None}])
@pytest.mark.parametrize("polls", [3, 100])
def test_results_that_are_named_later_are_waited_for(tmp_path: Path, counts: dict[str, Any], polls: int) -> None:
    samples = posts(tmp_path, 20)
    _, ledger = direct(tmp_path, samples)
    with BatchServer(batch_fields=counts) as server:
        poll, left = server.poll, [polls]

        def late(id: str) -> dict[str, Any]:
            shown = poll(id)
            left[0] -= shown["status"] == "completed"
            return shown | ({"output_file_id": None} if left[0] > 0 else {})

        server.poll = late  # type: ignore[method-assign]
        if polls > 10:
            with pytest.raises(RunError, match="no file of results of batch batch_0, which is completed; the"):
                run(tmp_path, samples, remote(server.url), batch())
            left[0] = 1
        run(tmp_path, samples, remote(server.url), batch())
        assert server.paid_twice == 0 and len(server.batches) == 2
    assert answers(tmp_path) == ledger


def test_a_failed_batch_with_all_answers_is_used(tmp_path: Path) -> None:
    samples = posts(tmp_path, 20)
    _, ledger = direct(tmp_path, samples)
    with BatchServer(final="failed") as server:
        run(tmp_path, samples, remote(server.url), batch())
        assert server.paid_twice == 0
    assert answers(tmp_path) == ledger


def test_a_full_disk_names_the_folder_and_the_next_run_goes_on(tmp_path: Path) -> None:
    samples = posts(tmp_path, 40)
    _, ledger = direct(tmp_path, samples)
    no_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with BatchServer() as server:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, no_limit[1]))
        try:
            with pytest.raises(RunError, match=r"^annotate: .*/batches cannot be read or written: File too large"):
                run(tmp_path, samples, remote(server.url), batch())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)
        assert not server.batches
        run(tmp_path, samples, remote(server.url), batch())
        assert server.paid_twice == 0
    assert answers(tmp_path) == ledger
