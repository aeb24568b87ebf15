"""A chain in a separate process that is killed or interrupted: it resumes, and no request is paid for twice."""

import csv
import faulthandler
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import cli
from distill.chain import run, stages_of
from distill.recipe import Recipe
from tests import micro
from tests.forks import processes
from tests.hanging import once_more
from tests.models.openai_server import Server


def command(path: Path) -> None:
    """`distill run`, as the target of a process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run in the background of a shell
    # Lightning resets the handlers of signals, so the stacks of a process that hangs are printed after a time
    faulthandler.dump_traceback_later(60, file=path.with_name("stacks.txt").open("w"))
    sys.exit(cli.main(["run", "--config", str(path)]))


def start(path: Path) -> Any:
    """Start the command in a process that has the libraries preloaded."""
    process = processes.Process(target=command, args=(path,))
    process.start()
    return process


def wait_until_in_progress(process: Any, name: str, recipe: Recipe) -> None:
    deadline = time.monotonic() + 120
    while not in_progress(name, recipe):
        assert process.is_alive() and time.monotonic() < deadline, f"{name} did not start"
        time.sleep(0.002)


def kill_in_every_stage(path: Path, recipe: Recipe) -> Iterator[str]:
    """Run the command and kill it once in each stage; yields the name of each killed stage."""
    rng = random.Random(4)
    for name in stages_of(recipe):
        process = start(path)
        wait_until_in_progress(process, name, recipe)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        yield name


def in_progress(name: str, recipe: Recipe) -> bool:
    """Whether a stage is running and has written something that a kill could lose: a checkpoint, or paid answers."""
    if manifest_or_none(recipe).get(name, {}).get("status") != "running":
        return False
    folder = recipe.folder / name
    ledger = folder / "ledger.jsonl"
    if name in ("teacher", "assistant", "student"):
        return (folder / "checkpoints" / "last.ckpt").exists()
    return name in ("calibrate", "cascade", "export") or (ledger.exists() and ledger.stat().st_size > 0)


def manifest_or_none(recipe: Recipe) -> dict[str, Any]:
    try:
        return micro.manifest(recipe)
    except FileNotFoundError:
        return {}


def mark_first_step(folder: Path) -> int:
    """Replace the loss of the first step with a marker value; returns the number of logged steps."""
    path = folder / "metrics.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows[0]["train/loss"] = "12345.0"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return len(rows)


@pytest.mark.slow
def test_a_chain_killed_in_every_stage_completes_without_paying_for_a_request_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = micro.write(tmp_path, micro.WITH_TEACHER)
    recipe = micro.read(path)
    trainings, killed_in = {}, []
    for name in kill_in_every_stage(path, recipe):
        assert micro.manifest(recipe)[name]["status"] == "running"
        killed_in.append(name)
        if name in ("teacher", "assistant"):
            trainings[name] = mark_first_step(recipe.folder / name)
    assert killed_in == stages_of(recipe)
    with caplog.at_level(logging.ERROR):
        assert run(recipe) == ["export"]  # each run resumed the stage that was killed before

    for name, trained in trainings.items():
        with (recipe.folder / name / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        losses = [row for row in rows if row["train/loss"]]
        assert [int(row["step"]) for row in losses] == list(range(len(losses))), "each step is logged once"
        assert int(losses[-1]["epoch"]) == 24 and 1 <= trained < len(losses)
        assert losses[0]["train/loss"] == "12345.0", f"{name} restarted instead of resuming from its last checkpoint"
    for name in ("annotate", "augment", "evaluate"):
        lines = (recipe.folder / name / "ledger.jsonl").read_text().splitlines()
        keys = [json.loads(line)["key"] for line in lines]
        assert len(keys) == len(set(keys)) > 0
    assert json.loads((recipe.folder / "annotate/summary.json").read_text())["paid"]["answers"] == len(
        (recipe.folder / "annotate/ledger.jsonl").read_text().splitlines()
    )
    leftovers = [path.name for path in recipe.folder.rglob("*") if path.name.endswith((".tmp", ".part", ".new"))]
    assert leftovers == []
    assert run(recipe) == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@once_more
def test_an_interrupted_training_ends_and_keeps_its_checkpoint(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    path = micro.write(tmp_path, micro.RECORDED, assistant__trainer={"max_epochs": 200})
    recipe = micro.read(path)
    process = start(path)
    wait_until_in_progress(process, "assistant", recipe)
    os.kill(process.pid, number)
    process.join(70)
    if process.exitcode is None:
        process.kill()
        error = subprocess.TimeoutExpired("distill run", 70)
        error.add_note(path.with_name("stacks.txt").read_text())
        raise error
    assert process.exitcode == status
    assert micro.manifest(recipe)["assistant"]["status"] == "failed"
    last = torch.load(recipe.folder / "assistant" / "checkpoints" / "last.ckpt", weights_only=True)
    assert 0 < last["global_step"] < 200 * 4


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_annotation_keeps_the_answers_on_their_way(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    with Server(delay_s=0.5) as server:
        endpoint = {"base_url": server.url, "model": "m", "concurrency": 3}
        path = micro.write(tmp_path, micro.RECORDED, annotate={"endpoint": endpoint})
        process = start(path)
        wait_until_in_progress(process, "annotate", micro.read(path))
        os.kill(process.pid, number)
        process.join(30)
        assert process.exitcode == status
        asked = server.requests
        ledger = micro.read(path).folder / "annotate" / "ledger.jsonl"
        assert len(ledger.read_text().splitlines()) == asked < 27
        server.delay_s = 0.0
        run(micro.read(path), until="annotate")
    questions = [json.dumps(request.body["messages"]) for request in server.received]
    assert len(questions) == len(set(questions)) > asked
