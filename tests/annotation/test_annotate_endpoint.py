"""The annotation protocol against a fake server with failures: resuming, the ledger, and costs."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.errors import RunError
from distill.models.endpoint import Endpoint, EndpointSettings
from distill.task.sample import Sample
from tests.annotation.test_annotate import LABELS, ROOT, run
from tests.models.bad_server import THOUGHT
from tests.models.openai_server import COLOURS, ChatRequest, Server, token, write_image

FAILURES = {"429": 0.10, "500": 0.05, "truncated": 0.05, "malformed": 0.03, "broken": 0.02}


def remote(url: str, **settings: Any) -> Endpoint:
    fast = {"backoff_s": 0.002, "max_attempts": 30, "concurrency": 16, "prompt_price": 1.0, "completion_price": 10.0}
    return Endpoint(EndpointSettings(url, "big-vl", **(fast | settings)), LABELS)


def posts(folder: Path, count: int) -> list[Sample]:
    """Posts with a small image each; every fifth image has the colour of another label."""
    names = list(COLOURS)
    images = [write_image(folder / f"{i}.png", names[(i + (i % 5 == 0)) % 3], 4 + i % 9) for i in range(count)]
    return [Sample(f"s{i}", f"post {i}", (images[i],), label=names[i % 3]) for i in range(count)]


def ledger_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def test_500_rows_from_a_server_with_failures(tmp_path: Path) -> None:
    samples = posts(tmp_path, 500)
    with Server(rates=FAILURES) as server:
        done, summary = run(tmp_path, samples, remote(server.url))
        assert all(server.sent[kind] > 0 for kind in FAILURES)
        requests = server.requests
        again, _ = run(tmp_path, samples, remote(server.url))
        assert server.requests == requests
    assert again == done
    finished = {item.sample.id for item in done.kept} | {item.id for item in done.quarantined}
    assert finished == {sample.id for sample in samples} and len(done.kept) + len(done.quarantined) == 500
    assert all(item.reason and item.detail for item in done.quarantined)
    assert all(item.rationale.prediction == item.sample.label for item in done.kept)
    assert len(done.kept) > 490 and summary["retried"] > 20
    assert 95 <= summary["explained"] <= 100  # every fifth image misleads
    # 0.83 of the requests are answered, 0.75 with a valid answer.
    assert summary["teacher_accuracy"] == pytest.approx(0.8 * 0.75 / 0.83, abs=0.1)
    written = ledger_lines(tmp_path)
    assert len(written) == len({line["key"] for line in written}) == server.paid == summary["paid"]["answers"]
    assert summary["paid"]["cost"] == pytest.approx(server.paid * (100 * 1.0 + 10 * 10.0) / 1e6)


def test_a_crash_loses_only_what_was_in_flight(tmp_path: Path) -> None:
    samples = posts(tmp_path, 150)
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tests.annotation.test_annotate_endpoint import remote, run, Sample, LABELS
samples = [Sample(f"s{{i}}", f"post {{i}}", (Path({str(tmp_path)!r}, f"{{i}}.png"),), label=LABELS.names[i % 3])
           for i in range(150)]
run(Path({str(tmp_path)!r}), samples, remote(sys.argv[1], concurrency=8))
"""
    with Server(rates=FAILURES, delay_s=0.01) as server:
        for enough in (30, 90):
            child = subprocess.Popen([sys.executable, "-c", program, server.url], cwd=ROOT)
            while server.paid < enough and child.poll() is None:
                time.sleep(0.002)
            child.kill()
            assert child.wait() == -signal.SIGKILL
        time.sleep(0.1)
        lost = server.paid - (tmp_path / "ledger.jsonl").read_bytes().count(b"\n")
        assert 0 <= lost <= 2 * 8
        before, kept = server.paid, server.paid - lost
        done, summary = run(tmp_path, samples, remote(server.url))
        assert server.paid - before == len(ledger_lines(tmp_path)) - kept
    assert len(done.kept) + len(done.quarantined) == 150
    assert len({line["key"] for line in ledger_lines(tmp_path)}) == len(ledger_lines(tmp_path)) == server.paid - lost
    assert summary["paid"]["answers"] == len(ledger_lines(tmp_path))


@pytest.mark.parametrize("supports", ["log-probabilities", "text only"])
def test_remote_probabilities_are_paid_once(tmp_path: Path, supports: str) -> None:
    samples = [replace(sample, label=None) for sample in posts(tmp_path, 12)]

    def logprobs(request: ChatRequest) -> list[dict[str, Any]]:
        return [token(request.sentiment, **(dict.fromkeys(COLOURS, 0.02) | {request.sentiment: 0.96}))]

    settings = {"unlabelled": "keep_confident", "confidence": 0.85}
    with Server(logprobs=logprobs if supports == "log-probabilities" else lambda request: None) as server:
        done, summary = run(tmp_path, samples, remote(server.url), **settings)
        requests = server.requests
        assert run(tmp_path, samples, remote(server.url), **settings)[0] == done
        assert server.requests == requests
    assert summary["unlabelled"] == {"seen": 12, "kept": 12, "quarantined": 0, "below_threshold": 0}
    assert [item.label for item in done.kept] == [list(COLOURS)[(i + (i % 5 == 0)) % 3] for i in range(12)]
    assert summary["paid"]["prompt_tokens"] == 100 * server.paid
    assert Counter(line["template"] for line in ledger_lines(tmp_path)) == {"classify": 12, "predict": 12}


def test_after_the_endpoint_fails_paid_answers_are_kept(tmp_path: Path) -> None:
    samples = posts(tmp_path, 60)
    with Server() as server:
        server.refuse = lambda body: (503, "gone") if server.paid > 20 else None
        with pytest.raises(RunError, match="in a row"):
            run(tmp_path, samples, remote(server.url, max_attempts=2))
        time.sleep(0.1)
        assert len(ledger_lines(tmp_path)) == server.paid > 20
        server.refuse = lambda body: None
        done, _ = run(tmp_path, samples, remote(server.url))
        assert len(done.kept) == 60
        assert len(ledger_lines(tmp_path)) == server.paid


def test_a_refused_classification_is_quarantined_and_not_paid(tmp_path: Path) -> None:
    samples = [replace(sample, label=None) for sample in posts(tmp_path, 2)]
    with Server(refuse=lambda body: (400, "policy") if "post 1" in str(body) else None) as server:
        done, summary = run(tmp_path, samples, remote(server.url), unlabelled="keep_confident", confidence=0.8)
    assert [(item.id, item.reason) for item in done.quarantined] == [("s1", "unanswered")]
    assert summary["unlabelled"] == {"seen": 2, "kept": 1, "quarantined": 1, "below_threshold": 0}
    assert [line["id"] for line in ledger_lines(tmp_path)] == ["s0", "s0"]


def test_a_post_that_is_thought_about_without_end_is_asked_again_and_quarantined(tmp_path: Path) -> None:
    samples = posts(tmp_path, 4)
    with Server(script=lambda request: THOUGHT if "post 2" in request.text else None) as server:
        done, _ = run(tmp_path, samples, remote(server.url, concurrency=1))
        tried = [request.body for request in server.received if "post 2" in request.text]
    assert [(item.id, item.reason) for item in done.quarantined] == [("s2", "unanswered")]
    assert "thought and no answer" in done.quarantined[0].detail
    assert "chat_template_kwargs" in tried[1] and max(body["max_tokens"] for body in tried) > tried[0]["max_tokens"]
    assert {line["id"] for line in ledger_lines(tmp_path)} == {"s0", "s1", "s3"}
