"""Batch files against a service with that API: the same ledger as by direct calls, whatever comes back and when."""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from distill.annotation.annotate import Kept
from distill.annotation.batch import Batches
from distill.annotation.cached_teacher import CachedTeacher, Conversation, Start, TeacherQuery
from distill.annotation.ledger import Ledger
from distill.errors import RunError
from distill.task.prompts import Template
from distill.task.sample import Sample
from tests.annotation.batch_runs import answers, batch, direct, remote, run
from tests.annotation.test_annotate_endpoint import posts
from tests.clip_files import write_clip
from tests.models.batch_server import BatchServer, Line
from tests.models.endpoint.test_message import refusing
from tests.models.hearing_server import PITCHES, parts
from tests.models.hearing_server import answer as hears
from tests.models.openai_server import COLOURS, LABELS, ChatRequest, token


def reordered(lines: list[Line]) -> list[Line]:
    return random.Random(0).sample(lines, len(lines))


def duplicated(lines: list[Line]) -> list[Line]:
    return [*lines, *lines[::2]]


def incomplete(lines: list[Line]) -> list[Line]:
    return lines[: 2 * len(lines) // 3]


def foreign(lines: list[Line]) -> list[Line]:
    return [lines[0] | {"custom_id": "ab" * 32}, {"custom_id": 7}, *lines]  # type: ignore[list-item]


@pytest.mark.parametrize(
    "results", [lambda lines: lines, reordered, duplicated, incomplete, foreign], ids=lambda f: f.__name__
)
def test_batches_and_direct_calls_give_the_same_ledger(tmp_path: Path, results: Callable[..., list[Line]]) -> None:
    samples = posts(tmp_path, 60)
    expected, ledger = direct(tmp_path, samples)
    with BatchServer(results=results) as server:
        done, summary = run(tmp_path, samples, remote(server.url), batch())
        assert server.paid_twice == 0 or results is incomplete  # what is not in the results is asked again
        calls = len(server.calls)
        again, _ = run(tmp_path, samples, remote(server.url), batch())
        assert again == done and len(server.calls) == calls, "the second time nothing is asked"
    assert done == expected and answers(tmp_path) == ledger
    assert all(isinstance(item, Kept) for item in done) and summary["explained"] == 12
    assert summary["batch"]["rounds"] >= 2 and summary["batch"]["answers"] >= (60 if results is incomplete else 70)
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
    for results in tmp_path.glob("batches/*/results-*"):  # they are in the ledger
        results.unlink()
    assert run(tmp_path, samples, remote("http://127.0.0.1:9/v1"), settings)[0] == expected
    states = [json.loads(path.read_text()) for path in tmp_path.glob("batches/*/state.json")]
    assert sum(file["answers"] for state in states for file in state["files"]) == 24


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


def test_videos_and_sound_go_into_the_files_in_the_form_that_the_server_takes(tmp_path: Path) -> None:
    samples = []
    for number in range(6):
        label = list(COLOURS)[number % 3]
        path = write_clip(tmp_path / f"{number}.mp4", [COLOURS[label]] * 10, PITCHES[label])
        samples.append(Sample(label + str(number), f"post {number}", label=label, video=path, audio=path))
    for folder, settings in (("direct", None), ("batch", batch())):
        with BatchServer(answer=hears, refuse=refusing("video_url")) as server:
            done, _ = run(tmp_path / folder, samples, remote(server.url), settings)
            assert len(done) == 6 and all(isinstance(item, Kept) for item in done)
    (made,) = server.batches.values()
    bodies = [line["body"] for line in server.lines(made)]
    assert len(bodies) == 5 and all(parts(body, "input_audio") and parts(body, "image_url") for body in bodies)
    assert answers(tmp_path / "direct") == answers(tmp_path / "batch")


def test_a_question_on_its_way_is_not_asked_to_learn_about_another_one(tmp_path: Path) -> None:
    samples = posts(tmp_path, 12)

    def asks(*templates: Template) -> list[Start]:
        def start(template: Template, sample: Sample) -> Conversation[None]:
            yield TeacherQuery(template)

        return [partial(start, template) for template in templates]

    with BatchServer(polls=None, logprobs=lambda request: [token(request.sentiment)]) as server:

        def fill(*templates: Template) -> None:
            with Ledger(tmp_path / "ledger.jsonl") as ledger:
                cached = CachedTeacher(remote(server.url), LABELS, ledger, 1)
                Batches(cached, tmp_path, batch(), "test", "evaluate").fill(samples, asks(*templates))

        server.refuse_call = lambda method, path: 403 if path.startswith("/batches/") else None
        with pytest.raises(RunError, match="403"):
            fill("predict")
        server.refuse_call, server.polls = lambda method, path: None, 2
        fill("predict", "classify")
        assert server.paid_twice == 0 and server.requests == 2 and server.batched == 22
    assert len(answers(tmp_path)) == 24


def test_a_server_without_the_api_is_found_before_anything_is_paid_for(tmp_path: Path) -> None:
    with BatchServer(refuse_call=lambda method, path: 404) as server:
        with pytest.raises(RunError, match=r"does not have the batch API \(status 404\)"):
            run(tmp_path, posts(tmp_path, 4), remote(server.url), batch())
        assert not server.requests
        server.refuse_call = lambda method, path: 405 if (method, path) == ("GET", "/batches") else None
        done, _ = run(tmp_path, posts(tmp_path, 4), remote(server.url), batch())
    assert len(done) == 4
