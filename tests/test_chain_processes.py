"""`distill run` on two devices of one machine: every second post has no picture; all weights are trained."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from distill.data.corpus import read_corpus
from distill.recipe import Recipe
from tests import micro
from tests.forks import Script
from tests.hanging import STACKS, communicate, once_more
from tests.models.openai_server import Server
from tests.training.test_processes import is_running
from tests.training.training_runs import state

pytestmark = pytest.mark.slow

ROWS = 12
"""Training posts, with a rationale each."""

TWO = ("--trainer.devices", "2", "--trainer.strategy")

DRIVER = (
    STACKS
    + """
import json, os, signal, sys, time
from pathlib import Path
import torch
from distill.cli import main
from distill.data.images import ImageError
from distill.training.assistant import AssistantModule

what, folder = os.environ["WHAT"], Path(os.environ["FOLDER"])
step, start = AssistantModule.training_step, AssistantModule.on_train_batch_start

def training_step(self, batch, index):
    rank, number = self.trainer.global_rank, self.trainer.global_step
    with (folder / f"trained-{rank}.jsonl").open("a") as file:
        file.write(json.dumps([self.trainer.current_epoch, number, batch.ids]) + "\\n")
    if what == f"hangs {number}":
        (folder / f"pid{rank}").write_text(str(os.getpid()))
        time.sleep(600)
    if number == 1 and rank == 1:
        if what == "nan":
            batch = batch._replace(loss_weights=batch.loss_weights * torch.nan)
        if what == "image":
            raise ImageError("image 7.png is missing")
        if what == "bug":
            raise KeyError("seven")
        if what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, index)

AssistantModule.training_step = training_step
if __name__ == "__main__":
    sys.exit(main())
"""
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Postcards as jsonl files; every second post has no picture."""
    folder = tmp_path_factory.mktemp("posts")
    postcards = of(micro.write(folder, micro.RECORDED))
    corpus = read_corpus(postcards.data, postcards.labels)
    for split in ("train", "validation", "test"):
        posts = [post for post in getattr(corpus, split) if post.label][:ROWS]
        rows: list[dict[str, Any]] = [
            {"id": post.id, "text": post.text, "label": post.label, "rationale": post.rationale}
            | ({"images": [os.path.relpath(image, folder / "data") for image in post.images]} if n % 2 else {})
            for n, post in enumerate(posts)
        ]
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "data"


def recipe(folder: Path, data: Path, **changes: Any) -> Path:
    """A recipe of a chain until the student: two rows per step and process, a validation after each epoch."""
    shutil.copytree(data, folder / "data")
    learner = micro.LEARNER | {"batch_size": 2, "trainer": {"max_epochs": 2, "val_check_interval": 2}}
    content = micro.RECORDED | {
        "data": {"validation": ["validation.jsonl"]},
        "assistant": learner,
        "student": learner | {"hard_labels_baseline": False},
        "augment": None,
        "evaluate": None,
        "export": None,
    }
    return micro.write(folder, content, **changes)


def start(path: Path, *flags: str, what: str = "runs") -> Script:
    driver = path.with_name("driver.py")
    driver.write_text(DRIVER)
    env = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "WHAT": what}
    return Script(driver, "run", "--config", str(path), *flags, env=os.environ | env | {"FOLDER": str(path.parent)})


def run(path: Path, *flags: str, what: str = "runs") -> tuple[int, str, str]:
    """Exit status, output and messages of a command that must end within four minutes."""
    process = start(path, *flags, what=what)
    out, err = communicate(process, 240)
    return process.returncode, out, err


def trained(path: Path) -> dict[int, list[str]]:
    """Ids that all processes have trained since the last call, by epoch and in order of the steps."""
    batches = []
    for file in sorted(path.parent.glob("trained-*.jsonl")):
        batches += [json.loads(line) for line in file.read_text().splitlines()]
        file.unlink()
    found: dict[int, list[str]] = {}
    for epoch, _, ids in sorted(batches, key=lambda batch: batch[:2]):
        found.setdefault(epoch, []).extend(ids)
    return found


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def pids(path: Path, count: int = 2) -> list[int]:
    """The process ids of all processes, as soon as they hang."""
    files, begin = [path.with_name(f"pid{rank}") for rank in range(count)], time.monotonic()
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() - begin < 240
        time.sleep(0.1)
    return [int(file.read_text()) for file in files]


def assert_ended(processes: list[int]) -> None:
    begin = time.monotonic()
    while any(map(is_running, processes)):
        assert time.monotonic() - begin < 10
        time.sleep(0.1)


def of(path: Path) -> Recipe:
    return micro.read(path)


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
@once_more
def test_a_chain_finishes_on_two_devices_and_asks_each_question_once(tmp_path: Path, data: Path, strategy: str) -> None:
    with Server() as server:
        endpoint = {"base_url": server.url, "model": "m"}
        annotate, one = {"endpoint": endpoint}, {"student": None} if strategy == "ddp_spawn" else {}
        path = recipe(tmp_path, data, annotate=annotate, assistant__workers=1, **one)
        status, out, err = run(path, *TWO, strategy)
        assert status == 0, err
        asked = server.requests
        again = run(path)
    stages = ["annotate", "assistant"] + ["student"] * (not one)
    assert out.strip() == f"ran {', '.join(stages)}"
    begun = [line.split(",")[0].split(": ")[1] for line in err.splitlines() if line.startswith("stage ")]
    assert begun == [text for name in stages for text in (name, f"{name} done")]
    questions = [json.dumps(request.body["messages"]) for request in server.received]
    assert len(questions) == len(set(questions)) == asked, "nothing is asked twice, by no process"
    ledger = (of(path).folder / "annotate" / "ledger.jsonl").read_text().splitlines()
    assert len(ledger) == asked and len({json.loads(line)["key"] for line in ledger}) == asked
    assert "Initializing distributed" not in err
    count = ROWS * (len(stages) - 1)
    assert {epoch: len(ids) for epoch, ids in trained(path).items()} == {0: count, 1: count}
    assert again[0] == 0 and "nothing to do" in again[1], "other devices make no finished stage stale"


@pytest.mark.parametrize(
    ("before", "after", "step", "said"),
    [
        (2, 1, 2, "the training ran on 2 device(s) and goes on with 1: epoch 0 begins anew"),
        (1, 2, 7, "the training ran on 1 device(s) and goes on with 2: epoch 0 was complete and is kept"),
        (2, 2, 2, None),
    ],
)
@once_more
def test_a_killed_chain_goes_on_with_another_number_of_devices(
    tmp_path: Path, data: Path, before: int, after: int, step: int, said: str | None
) -> None:
    """Checkpoints are written after each epoch and every two batches; an epoch has 3 batches, or 6 on one device."""
    path = recipe(tmp_path, data, student=None)
    flags = {1: (), 2: (*TWO, "ddp")}
    process = start(path, *flags[before], what=f"hangs {step}")
    running = pids(path, before)
    process.kill()
    process.communicate(timeout=30)
    assert_ended(running)
    earlier = trained(path)
    status, out, err = run(path, *flags[after])
    assert status == 0 and out.strip() == "ran assistant", err
    assert [line for line in err.splitlines() if "device(s)" in line] == ([said] if said else [])
    later = trained(path)
    everything = sorted(row["id"] for row in rows_of(data / "train.jsonl"))
    assert sorted(later[1]) == everything
    if before == after:  # the rest of the epoch; the step that hung is trained again
        assert sorted(earlier[0][: step * 2 * before] + later[0]) == everything
    else:
        assert sorted(later.get(0, [])) == (everything if "anew" in str(said) else [])


@pytest.mark.parametrize(("rows", "steps"), [(5, 2), (1, 1)])
@once_more
def test_posts_that_cannot_be_divided_equally_are_trained_on_two_devices(
    tmp_path: Path, data: Path, rows: int, steps: int
) -> None:
    path = recipe(tmp_path, data, student=None)
    train = path.parent / "data" / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows_of(train)[:rows]))
    status, _, err = run(path, *TWO, "ddp", "--assistant.workers", "1", "--assistant.trainer.val_check_interval", "1.0")
    assert status == 0, err
    assert f"1 of {rows} posts are trained twice in each epoch, so that all 2 devices have as many" in err
    assert {epoch: (len(ids), len(set(ids))) for epoch, ids in trained(path).items()} == {
        0: (rows + 1, rows), 1: (rows + 1, rows)
    }  # fmt: skip
    assert state(of(path).folder / "assistant")["global_step"] == 2 * steps


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("nan", "distill: assistant: step 1: the loss is not finite (NaN or infinite); posts "),
        ("image", "distill: image 7.png is missing"),
        ("bug", "distill: unexpected KeyError: 'seven'"),
        ("killed", "distill: process 1 of the training was killed by signal 9; run the same command again to continue"),
    ],
)
@once_more
def test_a_failure_in_one_process_ends_all_with_one_sentence(
    tmp_path: Path, data: Path, what: str, sentence: str
) -> None:
    path = recipe(tmp_path, data, student=None)
    status, _, err = run(path, *TWO, "ddp", what=what)
    assert status == 1, err
    assert err.count("distill: ") == 1 and sentence in err, err


@once_more
def test_sigterm_ends_all_processes_with_status_143_and_the_run_goes_on(tmp_path: Path, data: Path) -> None:
    path = recipe(tmp_path, data, student=None)
    process = start(path, *TWO, "ddp", what="hangs 4")
    running = pids(path)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143, err
    assert err.count("distill: interrupted; run the same command again to continue") == 1, err
    assert_ended(running)
    assert run(path, *TWO, "ddp")[0] == 0


def test_a_student_learns_label_distributions_on_two_devices(tmp_path: Path, data: Path) -> None:
    """Half of the posts have no label, so that a process may have a batch without an answer."""
    distillation = {"weight": 0.0, "label_weight": 1.0}
    path = recipe(tmp_path, data, student__distillation=distillation)
    rows = rows_of(tmp_path / "data" / "train.jsonl")
    for row in rows[::2]:
        del row["label"], row["rationale"]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, err = run(path, *TWO, "ddp")
    assert status == 0 and out.strip() == "ran annotate, assistant, student", err
    student = of(path).folder / "student"
    scored = rows_of(student / "soft_targets" / "labels.jsonl")
    assert len(scored) == ROWS and all(row["probabilities"] for row in scored)
    assert len(rows_of(student / "ledger.jsonl")) == ROWS, "the worker process scores nothing"
    assert "train/label_divergence" in (student / "metrics.csv").read_text().splitlines()[0]
