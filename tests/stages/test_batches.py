"""Batch files in a chain: annotate and evaluate with a service, the list of batches, and what a recipe refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from distill import chain, cli
from distill.errors import RunError, SettingsError
from distill.planning.tables import plan_text
from distill.stages import batches, report
from tests import micro
from tests.models.batch_server import BatchServer
from tests.models.openai_server import COLOURS, ChatRequest, token

STUDENT = micro.LEARNER | {"distillation": {"weight": 0.0}, "trainer": {"max_epochs": 1}, "tasks": {"classify": 1.0}}
CHAIN = {name: micro.RECORDED[name] for name in ("name", "seed", "data", "trainer", "tracking")}
CHAIN |= {"student": STUDENT, "evaluate": {"max_new_tokens": 100}}


def logprobs(request: ChatRequest) -> list[dict[str, Any]]:
    return [token(request.sentiment, **(dict.fromkeys(COLOURS, 0.02) | {request.sentiment: 0.96}))]


def recipe(folder: Path, url: str, **changes: Any) -> Path:
    endpoint = {"base_url": url, "model": "big-vl", "backoff_s": 0.01, "prompt_price": 1.0, "completion_price": 4.0}
    folder.mkdir(exist_ok=True)
    return micro.write(folder, CHAIN | {"annotate": {"endpoint": endpoint}}, **changes)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_annotate_and_evaluate_by_batches_write_what_they_write_by_direct_calls(tmp_path: Path) -> None:
    batch = {"poll_s": 0.01}
    written = []
    with BatchServer(logprobs=logprobs) as server:
        for name, changes in (("direct", {}), ("batch", {"annotate__batch": batch, "evaluate__batch": batch})):
            settings = micro.read(recipe(tmp_path / name, server.url, **changes))
            chain.run(settings)
            folder = settings.folder
            answers = {
                (stage, line["key"]): line["answer"]["text"]
                for stage in ("annotate", "evaluate") for line in lines(folder / stage / "ledger.jsonl")
            }  # fmt: skip
            roles = [row["roles"]["teacher"] for row in lines(folder / "evaluate/predictions.jsonl")]
            metrics = json.loads((folder / "evaluate/metrics.json").read_text())["teacher"]
            written.append((answers, lines(folder / "annotate/rationales.jsonl"), roles, metrics))
            assert chain.run(settings) == []
        asked = server.requests
        summary = json.loads((folder / "annotate/summary.json").read_text())
        assert summary["batch"]["answers"] == summary["paid"]["by_batch"]["answers"] > 30
        assert summary["paid"]["cost"] is None, "the batches have no prices"
        states = {path.parent.parent.parent.name for path in folder.glob("*/batches/round-*/state.json")}
        assert states == {"annotate", "evaluate"}
        # another setting of the stage: nothing is asked, and the batches stay
        changes = {"annotate__batch": batch, "evaluate__batch": batch, "annotate__retries": 1}
        assert "annotate" in chain.run(micro.read(recipe(tmp_path / "batch", server.url, **changes)))
        assert server.requests == asked and (folder / "annotate/batches/round-1/state.json").exists()
        # with or without the section, the stages are up to date
        assert chain.run(micro.read(recipe(tmp_path / "batch", server.url, annotate__retries=1))) == []
    assert written[0] == written[1]


def test_the_list_of_batches_and_their_cancellation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with BatchServer(polls=None) as server:
        path = recipe(tmp_path, server.url, annotate__batch={"poll_s": 0.01})
        assert cli.main(["batches", "--config", str(path)]) == 0
        assert capsys.readouterr().out == f"{tmp_path / 'runs/micro'}: no batch waits for answers\n"
        server.refuse_call = lambda method, route: 403 if method == "GET" and server.batches else None
        with pytest.raises(RunError, match="403"):
            chain.run(micro.read(path), until="annotate")
        server.refuse_call = lambda method, route: None
        assert cli.main(["batches", "--config", str(path)]) == 0
        assert re.fullmatch(
            r"annotate round-1 file 0001, \d+ requests: batch batch_0 is in_progress, 0 of \d+ finished\n",
            capsys.readouterr().out,
        )
        assert cli.main(["batches", "--config", str(path), "--cancel"]) == 0
        assert "batch batch_0 is cancelling" in capsys.readouterr().out
        without = micro.read(recipe(tmp_path, server.url))
        chain.run(without, until="annotate")
        assert server.batches["batch_0"]["status"] == "cancelled" and server.paid_twice == 0 and server.requests > 10
        assert cli.main(["batches", "--config", str(path)]) == 0
        assert "no batch waits" in capsys.readouterr().out
    summary = json.loads((without.folder / "annotate/summary.json").read_text())
    assert summary["batch"]["without_answer"]["batch_expired"] > 10


def test_files_end_the_command_with_the_way_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, "http://127.0.0.1:9/v1", annotate__batch={"submit": "files"})
    assert cli.main(["annotate", "--config", str(path)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    folder = tmp_path / "runs/micro/annotate/batches/round-1"
    assert error == (
        f"distill: annotate: 27 requests in 1 files of {folder} wait for answers; run for each: vllm run-batch -i "
        f"{folder}/requests-0001.jsonl -o {folder}/results-0001.jsonl --model big-vl; then the same command again, "
        "which reads the results"
    )
    assert cli.main(["batches", "--config", str(path)]) == 0
    assert capsys.readouterr().out == (
        f"annotate round-1 file 0001, 27 requests: waits for {folder}/results-0001.jsonl\n"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotate": {"recorded": True, "batch": {}}}, "annotate.batch needs annotate.endpoint: only an endpoint is"),
        ({"annotate": {"recorded": True}, "evaluate__batch": {}}, "evaluate.batch needs annotate.endpoint, and"),
        (
            {"annotate": {"recorded": True}, "teacher": micro.LEARNER, "calibrate": {"batch": {}}},
            "calibrate.batch needs an endpoint of annotate or cascade.teacher",
        ),
        ({"evaluate": {"teacher": False, "batch": {}}}, "evaluate.batch needs annotate.endpoint, and"),
        ({"annotate__batch": {"submit": "fax"}}, "annotate.batch"),
        ({"annotate__batch": {"max_mb": 0}}, "annotate.batch.max_mb is 0"),
        ({"annotate__batch": {"rounds": 0}}, "annotate.batch.rounds is 0"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        micro.read(recipe(tmp_path, "http://127.0.0.1:9/v1", **changes))


def test_the_list_of_batches_needs_an_endpoint(tmp_path: Path) -> None:
    settings = micro.read(recipe(tmp_path, "http://127.0.0.1:9/v1", annotate={"recorded": True}))
    with pytest.raises(SettingsError, match=r"batches needs an endpoint of annotate or cascade\.teacher"):
        list(batches.listing(settings))


@pytest.mark.parametrize("prices", [{"prompt_price": 0.5, "completion_price": 2.0}, {}])
def test_the_plan_has_both_prices(prices: dict[str, float], tmp_path: Path) -> None:
    text = plan_text(micro.read(recipe(tmp_path, "http://127.0.0.1:9/v1", annotate__batch=prices)))
    (begin,) = (n for n, line in enumerate(text.splitlines()) if line.startswith("teacher requests  "))
    header, annotate, *others, total = [re.split(r" {2,}", line) for line in text.splitlines()[begin : begin + 5]]
    assert header[-2:] == ["cost", "cost with batches"] and annotate[:2] == ["annotate", "rationales"]
    assert [row[0] for row in others] == ["evaluate", "evaluate"] and all(row[-1] == row[-2] for row in others)
    if not prices:
        assert annotate[-1] == total[-1] == "–"
        return
    direct, batched = ([float(part) for part in cell.split(" to ")] for cell in annotate[-2:])
    assert batched == pytest.approx([value / 2 for value in direct], abs=0.01)
    assert float(total[-1].split(" to ")[1]) < float(total[-2].split(" to ")[1])


def test_the_plan_without_batches_has_one_price(tmp_path: Path) -> None:
    assert "cost with batches" not in plan_text(micro.read(recipe(tmp_path, "http://127.0.0.1:9/v1")))


def test_a_cascade_and_its_report_know_no_seconds_of_answers_from_batches(tmp_path: Path) -> None:
    with BatchServer(logprobs=logprobs) as server:
        batch = {"poll_s": 0.01}
        calibrate = {"budget": 0.5, "min_label_mass": 0.0, "batch": batch}
        cascade = {"calibrate": calibrate, "cascade": {"resamples": 20}}
        settings = micro.read(recipe(tmp_path, server.url, evaluate__batch=batch, **cascade))
        chain.run(settings)
        report.run(settings)
        state = json.loads((settings.folder / "calibrate/batches/round-1/state.json").read_text())
        assert state["closed"] and state["files"][0]["answers"] == 8 and server.paid_twice == 0
    stages = json.loads((settings.folder / "cascade/metrics.json").read_text())
    assert stages["stages"]["teacher_first"]["asked"] and stages["stages"]["teacher_first"]["cost"]["seconds"] is None
    assert stages["cost_ratio"]["seconds"] is None and stages["cost_ratio"]["currency"] is not None
    curve = (settings.folder / "cascade/deferral_curve.csv").read_text().splitlines()
    assert curve[0].endswith("seconds,currency") and curve[1].split(",")[-2] == ""
    assert (settings.folder / "report.html").exists()
