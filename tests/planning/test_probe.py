"""`distill plan --probe`: one question to each endpoint, which the run does not ask again."""

import re
from pathlib import Path
from typing import Any

from tests import micro
from tests.commands import Command
from tests.models.openai_server import ChatRequest, Server, token

CARDS = {"labelled": 9, "unlabelled": 0, "validation": 9, "test": 9, "image_size": 28}
EVALUATED = {name: section for name, section in micro.RECORDED.items() if name not in ("augment", "export")}


def write(folder: Path, url: str, **changes: Any) -> Path:
    endpoint = {"base_url": url, "model": "big-vl", "concurrency": 2, "backoff_s": 0.01}
    content = EVALUATED | {"annotate": {"endpoint": endpoint}, "calibrate": {}, "cascade": {}}
    return micro.write(folder, content, data__postcards=CARDS, **changes)


def labelled(request: ChatRequest) -> list[dict[str, Any]]:
    other = "neutral" if request.sentiment != "neutral" else "positive"
    return [token('"Prediction": '), token(request.sentiment, **{request.sentiment: 0.9, other: 0.1})]


def found(output: str) -> list[str]:
    """The indented lines of the only probe."""
    lines = output.splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith("probe of "))
    return [line.strip() for line in lines[begin + 1 :] if line.startswith("  ")][: lines[begin:].index("") - 1]


def test_a_plan_alone_asks_nothing(distill: Command, tmp_path: Path) -> None:
    with Server() as server:
        plan = distill("plan", "--config", write(tmp_path, server.url))
    assert plan.status == 0 and server.requests == 0 and "probe" not in plan.stdout


def test_the_question_is_one_of_the_run_and_not_paid_again(distill: Command, tmp_path: Path) -> None:
    with Server(logprobs=labelled) as server:
        path = write(tmp_path, server.url)
        plan = distill("plan", "--config", path, "--probe")
        assert (plan.status, server.requests) == (0, 1), plan.stderr
        assert f"probe of annotate.endpoint (big-vl at {server.url}):" in plan.stdout
        lines = found(plan.stdout)
        assert lines[0].startswith("one question, predict, about post ")
        assert re.fullmatch(r"answered in \d+\.\d s with 100 prompt and 10 answer tokens", lines[1])
        assert lines[2:4] == ["the answer is a valid rationale", "log-probabilities are returned"]
        assert lines[4].startswith("at this speed, 2 at a time, all requests take ")
        ledger = tmp_path / "runs/micro/annotate/ledger.jsonl"
        assert lines[5] == f"the answer is in {ledger} and is not paid again"
        assert distill("annotate", "--config", path).status == 0
    first, *others = [(request.text, request.images[0].tobytes()) for request in server.received]
    assert len(others) >= 8 and first not in others


def test_a_server_without_log_probabilities_or_a_rationale(distill: Command, tmp_path: Path) -> None:
    with Server(answer=lambda request: "It is fine.") as server:
        lines = found(distill("plan", "--config", write(tmp_path, server.url), "--probe").stdout)
        assert server.requests == 1
        assert lines[2].startswith("the answer is not a valid rationale: ")
        assert lines[3] == "no log-probabilities: each label takes 5 requests, and their agreement is its confidence"
        alone = write(tmp_path, server.url, annotate__endpoint__agreement_samples=1)
        lines = found(distill("plan", "--config", alone, "--probe").stdout)
        assert server.requests == 2
    assert any(line.startswith("no log-probabilities, and agreement_samples is 1: ") for line in lines)


def test_a_teacher_of_label_distributions(distill: Command, tmp_path: Path) -> None:
    """Its labels are a question of the run, and the plan says if it cannot teach them."""
    options = {"label_weight": 1.0, "label_teacher": "teacher"}
    said = "student.distillation.label_teacher must be assistant: there is no label distribution to learn"
    with Server() as server:
        assert said in found(
            distill("plan", "--config", write(tmp_path, server.url, student__distillation=options), "--probe").stdout
        )
    with Server(logprobs=labelled) as server:
        path = write(tmp_path, server.url, student__distillation=options)
        assert distill("annotate", "--config", path).status == 0
        lines = found(distill("plan", "--config", path, "--probe").stdout)
        assert lines[0].startswith("one question, classify, about post train-") and said not in lines
        assert f"the answer is in {tmp_path / 'runs/micro/annotate/ledger.jsonl'} and is not paid again" in lines


def test_fields_that_the_server_does_not_take(distill: Command, tmp_path: Path) -> None:
    def refuse(body: dict[str, Any]) -> tuple[int, str] | None:
        return (400, "seed is not supported") if "seed" in body else None

    with Server(refuse=refuse, logprobs=labelled) as server:
        lines = found(distill("plan", "--config", write(tmp_path, server.url), "--probe").stdout)
    assert "server: seed is not taken and left out" in lines


def test_a_server_that_is_not_there(distill: Command, tmp_path: Path) -> None:
    plan = distill("plan", "--config", write(tmp_path, "http://127.0.0.1:9/v1"), "--probe")
    assert plan.status == 0
    assert found(plan.stdout)[1].startswith("no server answers at base_url http://127.0.0.1:9/v1: ")


def test_a_model_that_the_server_does_not_have(distill: Command, tmp_path: Path) -> None:
    words = "The model big-vl does not exist"
    with Server(refuse=lambda body: (404, words)) as server:
        plan = distill("plan", "--config", write(tmp_path, server.url), "--probe")
    line = f"the endpoint at base_url {server.url} does not serve big-vl (status 404): {words}"
    assert plan.status == 0 and found(plan.stdout)[1] == line


def test_the_teacher_of_the_cascade_is_asked_for_a_label(distill: Command, tmp_path: Path) -> None:
    with Server(logprobs=labelled) as server:
        other = {"endpoint": {"base_url": server.url, "model": "judge"}}
        content = EVALUATED | {"calibrate": {}, "cascade": {"teacher": other}}
        path = micro.write(tmp_path, content, data__postcards=CARDS)
        plan = distill("plan", "--config", path, "--probe")
        assert (plan.status, server.requests) == (0, 1)
        assert "probe of cascade.teacher.endpoint (judge at " in plan.stdout
        assert found(plan.stdout)[0].startswith("one question, classify, about post ")
        assert "log-probabilities are returned" in found(plan.stdout)
        distill("plan", "--config", path, "--probe")
        assert server.requests == 2, "another post, because the first answer is in the ledger"


def test_a_recording_has_no_endpoint_to_ask(distill: Command, tmp_path: Path) -> None:
    path = micro.write(tmp_path, micro.RECORDED, data__postcards=CARDS)
    assert "probe: no stage that would run asks an endpoint." in distill("plan", "--config", path, "--probe").stdout
