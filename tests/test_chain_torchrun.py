"""`distill run` by torchrun in two processes, sharded with FSDP2; every second post has no picture."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hanging import communicate, once_more
from tests.models.openai_server import Server
from tests.test_chain_processes import DRIVER, ROWS, TWO, assert_ended, data, of, pids, recipe, rows_of, run, trained
from tests.training.training_runs import state

__all__ = ["data"]
pytestmark = pytest.mark.slow


def start(path: Path, *flags: str, what: str = "runs") -> "subprocess.Popen[str]":
    driver = path.with_name("driver.py")
    driver.write_text(DRIVER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(driver)]
    env = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "WHAT": what}
    return subprocess.Popen(
        [*launcher, "run", "--config", str(path), *TWO, "fsdp2", *flags],
        env=os.environ | env | {"FOLDER": str(path.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@once_more
def test_a_chain_trains_every_model_and_only_the_main_process_asks_and_writes(tmp_path: Path, data: Path) -> None:
    with Server() as server:
        annotate = {"endpoint": {"base_url": server.url, "model": "m"}}
        path = recipe(tmp_path, data, annotate=annotate, export={"check_samples": 4})
        process = start(path)
        out, err = communicate(process, 240)
        assert process.returncode == 0, err
        questions = [json.dumps(request.body["messages"]) for request in server.received]
        assert len(questions) == len(set(questions)) == server.requests
        again = run(path)
    assert out.splitlines()[0] == "ran annotate, assistant, student, export" and out.count("ran ") == 1
    begun = [line.split(",")[0].split(": ")[1] for line in err.splitlines() if line.startswith("stage ")]
    assert begun == [text for name in ("annotate", "assistant", "student", "export") for text in (name, f"{name} done")]
    assert [state(of(path).folder / stage)["processes"] for stage in ("assistant", "student")] == [2, 2]
    ids = {row["id"] for row in rows_of(data / "train.jsonl")}
    assert {epoch: (len(found), set(found) == ids) for epoch, found in trained(path).items()} == dict.fromkeys(
        (0, 1), (2 * ROWS, True)
    )
    assert again[0] == 0 and "nothing to do" in again[1], "one process without a shard continues the run"


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("nan", "distill: assistant: step 1: the loss is not finite (NaN or infinite); posts "),
        ("image", "distill: image 7.png is missing"),
    ],
)
@once_more
def test_a_failure_in_one_process_ends_all_with_one_sentence(
    tmp_path: Path, data: Path, what: str, sentence: str
) -> None:
    process = start(recipe(tmp_path, data, student=None), what=what)
    _, err = communicate(process, 240)
    assert process.returncode == 1, err
    assert err.count("distill: ") == 1 and sentence in err, err


@once_more
def test_sigterm_to_torchrun_ends_all_processes_and_one_goes_on(tmp_path: Path, data: Path) -> None:
    """An epoch has 3 steps; the checkpoint is that of the first."""
    path = recipe(tmp_path, data, student=None)
    process = start(path, what="hangs 4")
    running = pids(path)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert_ended(running)
    trained(path)
    status, out, err = run(path)
    assert status == 0 and out.strip() == "ran assistant", err
    assert "the training ran on 2 device(s) and goes on with 1: epoch 0 was complete and is kept" in err
    assert sorted(trained(path)[1]) == sorted(row["id"] for row in rows_of(data / "train.jsonl"))
