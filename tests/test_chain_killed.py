"""The chain in a process of its own, killed and interrupted: it goes on, and pays for nothing twice."""

import csv
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import cli
from distill.chain import STAGES, run, stages_of
from distill.recipe import Recipe
from tests import micro


def command(path: Path) -> None:
    """The whole command, as the target of a process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
    sys.exit(cli.main(["run", "--config", str(path)]))


def started(path: Path) -> Any:
    """The command in a process of its own, which need not load the libraries first."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["distill.cli", "distill.chain"])
    process = processes.Process(target=command, args=(path,))
    process.start()
    return process


def wait_until_under_way(process: Any, name: str, recipe: Recipe) -> None:
    deadline = time.monotonic() + 120
    while not under_way(name, recipe):
        assert process.is_alive() and time.monotonic() < deadline, f"{name} did not get under way"
        time.sleep(0.002)


def killed_in_every_stage(path: Path, recipe: Recipe) -> Iterator[str]:
    """Run the command in a process and kill it, once in each stage; yields each stage that was killed."""
    chances = random.Random(4)
    for name in stages_of(recipe):
        process = started(path)
        wait_until_under_way(process, name, recipe)
        time.sleep(chances.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        yield name


def under_way(name: str, recipe: Recipe) -> bool:
    """Whether a stage runs, and has something that a kill could cost: a checkpoint, or answers that were paid for."""
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
    """Write a loss into the first step's row that no training gives; returns how many steps the curve holds."""
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
def test_killed_once_in_every_stage_the_chain_completes_and_pays_for_nothing_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = micro.write(tmp_path, micro.TAUGHT)
    recipe = micro.read(path)
    trainings, killed_in = {}, []
    for name in killed_in_every_stage(path, recipe):
        assert micro.manifest(recipe)[name]["status"] == "running"
        killed_in.append(name)
        if name in ("teacher", "assistant"):
            trainings[name] = mark_first_step(recipe.folder / name)
    assert killed_in == list(STAGES)
    with caplog.at_level(logging.ERROR):
        assert run(recipe) == ["export"]  # what was killed before went on when the next one was to be killed

    for name, trained in trainings.items():
        with (recipe.folder / name / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        losses = [row for row in rows if row["train/loss"]]
        assert [int(row["step"]) for row in losses] == list(range(len(losses))), "each step stands in the curve once"
        assert int(losses[-1]["epoch"]) == 24 and 1 <= trained < len(losses)
        assert losses[0]["train/loss"] == "12345.0", f"{name} began anew instead of going on from its last checkpoint"
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
def test_a_training_that_its_user_interrupts_ends_with_130_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    path = micro.write(tmp_path, micro.RECORDED, assistant__trainer={"max_epochs": 200})
    recipe = micro.read(path)
    process = started(path)
    wait_until_under_way(process, "assistant", recipe)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    assert micro.manifest(recipe)["assistant"]["status"] == "failed"
    last = torch.load(recipe.folder / "assistant" / "checkpoints" / "last.ckpt", weights_only=True)
    assert 0 < last["global_step"] < 200 * 4
