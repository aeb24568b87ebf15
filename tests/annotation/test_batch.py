"""Batch files against a service with that API: the same ledger as by direct calls, whatever comes back and when."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.annotation.annotate import AnnotateSettings, AnnotationCounts, Kept, annotate
from distill.annotation.batch import Batches
from distill.annotation.cached_teacher import CachedTeacher, Start
from distill.annotation.first_answers import FirstAnswers
from distill.annotation.ledger import Ledger
from distill.errors import RunError
from distill.models.endpoint import BatchSettings, Endpoint, EndpointSettings
from distill.task.sample import Sample
from tests.annotation.test_annotate import LABELS, ROOT
from tests.annotation.test_annotate_endpoint import posts
from tests.models.batch_server import BatchServer, Line
from tests.models.openai_server import COLOURS, ChatRequest, token


def remote(url: str, **settings: Any) -> Endpoint:
    fast = {"backoff_s": 0.002, "max_attempts": 4, "concurrency": 8, "prompt_price": 1.0, "completion_price": 10.0}
    return Endpoint(EndpointSettings(url, "big-vl", **(fast | settings)), LABELS)


def batch(**settings: Any) -> BatchSettings:
    return BatchSettings(**({"poll_s": 0.01} | settings))


def run(
    folder: Path, samples: list[Sample], teacher: Endpoint, settings: BatchSettings | None, **fields: Any
) -> tuple[list[Any], dict[str, Any]]:
    """What the stage does: fill the ledger, annotate, close the batches. Returns results and summary."""
    counts, found = AnnotationCounts(), list[Batches]()

    def prefill(cached: CachedTeacher, start: Start) -> None:
        found.append(Batches(cached, folder, settings, "test", "annotate"))
        found[0].fill(samples, [start])

    options = AnnotateSettings(batch=settings, **fields)
    first = FirstAnswers("annotate", LABELS, 50)
    with Ledger(folder / "ledger.jsonl") as ledger:
        results = list(
            annotate(samples, LABELS, teacher, options, ledger, counts, first_answers=first, prefill=prefill)
        )
        summary = counts.summary | {"batch": found[0].summary}
        found[0].close()
    return results, summary


def answers(folder: Path) -> dict[str, str]:
    """The text of each answer in a ledger, which has each once."""
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    found = {line["key"]: line["answer"]["text"] for line in lines}
    assert len(found) == len(lines)
    return found


def direct(folder: Path, samples: list[Sample], **fields: Any) -> tuple[list[Any], dict[str, str]]:
    """Results and answers by direct calls."""
    with BatchServer() as server:
        results, _ = run(folder / "direct", samples, remote(server.url), None, **fields)
    return results, answers(folder / "direct")


def reordered(lines: list[Line]) -> list[Line]:
    return random.Random(0).sample(lines, len(lines))


def duplicated(lines: list[Line]) -> list[Line]:
    return [*lines, *lines[::2]]


def partial(lines: list[Line]) -> list[Line]:
    return lines[: 2 * len(lines) // 3]


def foreign(lines: list[Line]) -> list[Line]:
    return [lines[0] | {"custom_id": "ab" * 32}, {"custom_id": 7}, *lines]  # type: ignore[list-item]


@pytest.mark.parametrize(
    "results", [lambda lines: lines, reordered, duplicated, partial, foreign], ids=lambda f: f.__name__
)
def test_batches_and_direct_calls_give_the_same_ledger(tmp_path: Path, results: Callable[..., list[Line]]) -> None:
    samples = posts(tmp_path, 60)
    expected, ledger = direct(tmp_path, samples)
    with BatchServer(results=results) as server:
        done, summary = run(tmp_path, samples, remote(server.url), batch())
        assert server.paid_twice == 0 or results is partial  # what is not in the results is asked again
        calls = len(server.calls)
        again, _ = run(tmp_path, samples, remote(server.url), batch())
        assert again == done and len(server.calls) == calls, "the second time nothing is asked"
    assert done == expected and answers(tmp_path) == ledger
    assert all(isinstance(item, Kept) for item in done) and summary["explained"] == 12
    assert summary["batch"]["rounds"] >= 2 and summary["batch"]["answers"] >= (60 if results is partial else 70)
    assert summary["paid"]["by_batch"]["answers"] == summary["batch"]["answers"]


def test_bodies_are_those_of_direct_calls_and_files_keep_the_limits(tmp_path: Path) -> None:
    samples = posts(tmp_path, 30)
    with BatchServer() as one, BatchServer() as other:
        run(tmp_path / "a", samples, remote(one.url), None)
        run(tmp_path / "b", samples, remote(other.url), batch(max_requests=7, max_mb=0.02))
        sent = [json.dumps(request.body, sort_keys=True) for request in one.received]
        lines = [line for each in other.batches.values() for line in other.lines(each)]
        batched = [json.dumps(line["body"], sort_keys=True) for line in lines]
        assert sorted(sent) == sorted(batched + [json.dumps(r.body, sort_keys=True) for r in other.received])
        assert {(line["method"], line["url"]) for line in lines} == {("POST", "/v1/chat/completions")}
        assert all(len(line["custom_id"]) == 64 for line in lines) and len({line["custom_id"] for line in lines}) == 35
        uploads = [other.files[each["input_file_id"]] for each in other.batches.values()]
        assert len(uploads) > 5 and all(len(data) <= 20_000 and data.count(b"\n") <= 7 for data in uploads)
    assert not list((tmp_path / "b").glob("batches/*/requests-*"))


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


def test_labels_are_scored_in_batches(tmp_path: Path) -> None:
    samples = [Sample(f"s{i}", f"post {i}", sample.images) for i, sample in enumerate(posts(tmp_path, 12))]

    def logprobs(request: ChatRequest) -> list[dict[str, Any]]:
        return [token(request.sentiment, **(dict.fromkeys(COLOURS, 0.02) | {request.sentiment: 0.96}))]

    fields = {"unlabelled": "keep_confident", "confidence": 0.85}
    with BatchServer(logprobs=logprobs) as server:
        expected, _ = run(tmp_path / "direct", samples, remote(server.url), None, **fields)
    with BatchServer(logprobs=logprobs) as server:
        done, _ = run(tmp_path, samples, remote(server.url), batch(), **fields)
        assert server.requests == 2 and server.batched == 22, "one question of each kind is asked directly"
    assert done == expected and answers(tmp_path) == answers(tmp_path / "direct")


def test_labels_without_logprobs_are_left_to_direct_calls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = [Sample(f"s{i}", f"post {i}", sample.images) for i, sample in enumerate(posts(tmp_path, 6))]
    with BatchServer() as server:
        done, summary = run(tmp_path, samples, remote(server.url), batch(), unlabelled="keep_confident", confidence=0.8)
    assert len(done) == 6 and summary["unlabelled"]["kept"] == 6
    assert "requests are asked one by one: labels without log-probabilities take several answers each" in caplog.text


def test_what_a_filter_refuses_is_not_asked_again(tmp_path: Path) -> None:
    samples = posts(tmp_path, 12)

    def script(request: ChatRequest) -> tuple[int, Any] | None:
        return (400, {"error": {"message": "flagged", "code": "content_filter"}}) if "post 7" in request.text else None

    with BatchServer(script=script) as server:
        done, _ = run(tmp_path, samples, remote(server.url), batch())
        asked = [line for each in server.batches.values() for line in server.lines(each) if "post 7" in str(line)]
        assert len(asked) == 1 and not any("post 7" in request.text for request in server.received)
    assert [(item.id, item.reason) for item in done if not isinstance(item, Kept)] == [("s7", "filtered")]


def test_a_large_request_is_asked_directly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = posts(tmp_path, 8)
    samples[5] = Sample("s5", "post 5 " + "word " * 2000, samples[5].images, label=samples[5].label)
    with BatchServer() as server:
        done, _ = run(tmp_path, samples, remote(server.url), batch(max_mb=0.008))
        assert [request for request in server.received if "post 5" in request.text]
    assert len(done) == 8
    assert "1 requests are larger than batch.max_mb and asked one by one, such as that of post s5" in caplog.text


def test_prices_of_batches_are_their_own(tmp_path: Path) -> None:
    samples = posts(tmp_path, 10)
    with BatchServer() as server:
        _, summary = run(tmp_path, samples, remote(server.url), batch(prompt_price=0.5, completion_price=5.0))
        paid = summary["paid"]
        assert paid["answers"] == 12 and paid["by_batch"]["answers"] == 11
        assert paid["cost"] == pytest.approx((1 * 200 + 11 * 100) / 1e6)
        _, summary = run(tmp_path, samples, remote(server.url), batch())
    assert summary["paid"]["cost"] is None, "the price of batches is not known"


def test_files_are_left_for_the_user_and_read_when_there_are_results(tmp_path: Path) -> None:
    samples = posts(tmp_path, 20)
    expected, ledger = direct(tmp_path, samples)
    settings = batch(submit="files", max_requests=15)
    with BatchServer() as server:
        for number in (1, 2):
            with pytest.raises(RunError, match="wait for answers; run for each: vllm run-batch -i ") as error:
                run(tmp_path, samples, remote(server.url), settings)
            folder = tmp_path / "batches" / f"round-{number}"
            assert str(folder) in str(error.value) and not server.requests and not server.calls
            for requests in sorted(folder.glob("requests-*.jsonl")):
                with pytest.raises(RunError, match="wait for answers"):
                    run(tmp_path, samples, remote(server.url), settings)
                results = folder / requests.name.replace("requests", "results")
                (folder / "part").write_text("".join(vllm_run_batch(server, requests)))
                (folder / "part").rename(results)
        done, summary = run(tmp_path, samples, remote(server.url), settings)
        assert not server.received
    assert done == expected and answers(tmp_path) == ledger
    assert summary["batch"] == {"rounds": 2, "requests": 24, "answers": 24, "without_answer": {}}


def vllm_run_batch(server: BatchServer, requests: Path) -> list[str]:
    """The output of `vllm run-batch`: results in another order, with an id of its own."""
    lines = []
    for line in map(json.loads, requests.read_text().splitlines()):
        batch = {"input_file_id": server.store(json.dumps(line).encode()), "polls": 0}
        server.end(batch, "completed", 1)
        lines.append(server.files[batch["output_file_id"]].decode())
    return lines[::-1]


def test_without_the_section_what_was_answered_is_used_and_the_rest_asked(tmp_path: Path) -> None:
    samples = posts(tmp_path, 20)
    _, ledger = direct(tmp_path, samples)
    with BatchServer() as server:
        with pytest.raises(RunError, match="wait for answers"):
            run(tmp_path, samples, remote(server.url), batch(submit="files", max_requests=12))
        folder = tmp_path / "batches" / "round-1"
        (folder / "results-0001.jsonl").write_text("".join(vllm_run_batch(server, folder / "requests-0001.jsonl")))
        run(tmp_path, samples, remote(server.url), None)
        assert server.requests == len(ledger) - 12 and server.paid_twice == 0
    assert answers(tmp_path) == ledger


def test_a_batch_at_the_service_is_not_forgotten_without_the_section(tmp_path: Path) -> None:
    samples = posts(tmp_path, 12)
    with BatchServer(polls=None) as server:
        server.refuse_call = lambda method, path: 403 if method == "GET" and server.batches else None
        with pytest.raises(RunError, match="status 403"):
            run(tmp_path, samples, remote(server.url), batch())
        server.refuse_call = lambda method, path: None
        with pytest.raises(RunError, match=r"annotate\.batch is gone, but batch batch_0 with 1. requests goes on"):
            run(tmp_path, samples, remote(server.url), None)
        server.polls = 1
        run(tmp_path, samples, remote(server.url), None)
        assert server.paid_twice == 0 and len(server.batches) == 1 and server.requests > 1
    assert answers(tmp_path)


def test_other_settings_use_what_they_can_and_leave_a_running_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = posts(tmp_path, 12)
    with BatchServer(polls=None) as server:
        server.refuse_call = lambda method, path: 403 if method == "GET" and server.batches else None
        with pytest.raises(RunError, match="status 403"):
            run(tmp_path, samples, remote(server.url), batch())
        server.refuse_call, server.polls = lambda method, path: None, 2
        run(tmp_path, samples, remote(server.url), batch(), max_new_tokens=99)
        assert server.batches["batch_0"]["polls"] == 0 and "POST" not in {m for m, p in server.calls if "cancel" in p}
        assert "these settings do not need the batch batch_0 at http" in caplog.text
        run(tmp_path, samples, remote(server.url), batch())
        assert server.batches["batch_0"]["status"] == "completed" and server.paid_twice == 0


# ---- services that fail or differ ----


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
        ({}, "", (404, "/files"), r"does not have the batch API \(status 404\): not here.*; set submit: files"),
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


def test_a_round_without_any_answer_ends_the_stage(tmp_path: Path) -> None:
    samples = posts(tmp_path, 12)
    with BatchServer(expires=lambda number: True, final="expired") as server:
        with pytest.raises(RunError, match=r"no answer to any of 1[12] requests \(1[12] batch_expired\)"):
            run(tmp_path, samples, remote(server.url), batch())
        server.expires = lambda number: False
        done, _ = run(tmp_path, samples, remote(server.url), batch())
    assert len(done) == 12


def test_a_model_off_the_format_is_found_before_a_batch_is_paid_for(tmp_path: Path) -> None:
    samples = posts(tmp_path, 80)
    with BatchServer(answer=lambda request: "I would rather not say.") as server:
        with pytest.raises(RunError, match="the first 50 answers are all invalid"):
            run(tmp_path, samples, remote(server.url), batch())
        assert not server.batches and server.requests == 50


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
from tests.annotation.test_batch import batch, remote, run, Sample, LABELS
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
