"""Trainings in two gloo processes: posts with and without images, another number of processes, SIGTERM, a NaN."""

import logging
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from distill.data.corpus import Corpus
from distill.models.backbone import ModelSettings, create
from distill.training.assistant import AssistantModule, TrainSettings
from distill.training.datamodule import ReasoningDataModule
from distill.training.fit import fit
from distill.training.processes import last_message
from tests.forks import Script
from tests.training.training_runs import LABELS, QUIET, metrics, state

SCRIPT = """
import os, sys, time
from pathlib import Path
import torch
from distill.data.corpus import DataSettings, read_corpus
from distill.training.assistant import AssistantModule
from tests.training.test_processes import LABELS, train

def main():
    model, root, folder, what = sys.argv[1:]
    step, rank = AssistantModule.training_step, int(os.environ.get("LOCAL_RANK", "0"))

    def training_step(self, batch, index):
        if self.trainer.global_step == 4 and what == "killed":
            os._exit(9)
        if self.trainer.global_step == 1 and what == "hangs":
            Path(folder, f"pid{rank}").write_text(str(os.getpid()))
            while rank:  # the other process waits for this one in a collective operation
                time.sleep(1)
        if self.trainer.global_step == 1 and what == "nan" and rank:
            batch = batch._replace(loss_weights=batch.loss_weights * torch.nan)
        return step(self, batch, index)

    AssistantModule.training_step = training_step
    data = DataSettings(root=root, validation=["validation.jsonl"])
    train(model, read_corpus(data, LABELS), Path(folder), devices=2, strategy="ddp")
    print("finished")

if __name__ == "__main__":
    main()
"""


def train(model_folder: str, corpus: Corpus, folder: Path, **arguments: Any) -> AssistantModule:
    """Train all weights on posts of which every other one has no image; validate twice per epoch."""
    L.seed_everything(0, verbose=False)
    settings = TrainSettings(ModelSettings(model_folder, image_size=56, batch_size=16), batch_size=1)
    module = AssistantModule(create(settings.model, LABELS, Path("unused")), settings)
    rows = [replace(row, images=()) if n % 2 else row for n, row in enumerate(corpus.train[:12])]
    data = ReasoningDataModule(
        module.backbone, rows, corpus.validation[:4], settings.tasks, module.encode, batch_size=1
    )
    fit(module, data, folder, QUIET | {"max_epochs": 2, "val_check_interval": 3} | arguments)
    return module


def start(what: str, model_folder: Path, corpus: Corpus, folder: Path) -> Script:
    script = folder / "train.py"
    script.write_text(SCRIPT)
    env = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return Script(script, str(model_folder), str(corpus.root), str(folder), what, env=os.environ | env)


def ids_of(folder: Path, names: list[str]) -> list[int]:
    """The process ids in the files, as soon as all exist."""
    begin = time.monotonic()
    while not all((folder / name).exists() and (folder / name).read_text() for name in names):
        assert time.monotonic() - begin < 200
        time.sleep(0.2)
    return [int((folder / name).read_text()) for name in names]


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_posts_with_and_without_images_train_in_two_processes(
    model_folder: Path, postcards: Corpus, tmp_path: Path
) -> None:
    process = start("runs", model_folder, postcards, tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert out.count("finished") == 1
    assert state(tmp_path)["global_step"] == 12


@pytest.mark.slow
def test_a_training_killed_in_two_processes_is_resumed_in_one(
    model_folder: Path, postcards: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = start("killed", model_folder, postcards, tmp_path)
    process.communicate(timeout=300)
    assert process.returncode != 0
    assert state(tmp_path)["global_step"] == 3 and state(tmp_path)["processes"] == 2
    seen: list[str] = []
    encode = AssistantModule.encode

    def encoded(self: AssistantModule, samples: Any) -> Any:
        seen.extend(sample.id for sample in samples)
        return encode(self, samples)

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(AssistantModule, "encode", encoded)
        train(str(model_folder), postcards, tmp_path)
    said = "the training ran on 2 device(s) and goes on with 1: epoch 0 begins anew"
    assert said in caplog.text
    assert state(tmp_path)["global_step"] == 3 + 2 * 12
    assert state(tmp_path)["epoch"] == 1 and len(set(seen[:12])) == 12 == len(set(seen[12:24])), "two whole epochs"
    assert [row["step"] for row in metrics(tmp_path) if row["val/selection"]]


@pytest.mark.slow
def test_sigterm_ends_processes_that_wait_for_each_other(model_folder: Path, postcards: Corpus, tmp_path: Path) -> None:
    process = start("hangs", model_folder, postcards, tmp_path)
    pids = ids_of(tmp_path, ["pid0", "pid1"])
    time.sleep(2)  # the first process reaches the collective operation
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode != 0
    deadline = time.monotonic() + 5
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(is_running, pids))


@pytest.mark.slow
def test_a_killed_main_process_takes_its_workers_along(model_folder: Path, postcards: Corpus, tmp_path: Path) -> None:
    process = start("hangs", model_folder, postcards, tmp_path)
    pids = ids_of(tmp_path, ["pid0", "pid1"])
    process.kill()
    process.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(is_running, pids))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_ends_both_with_its_posts(
    model_folder: Path, postcards: Corpus, tmp_path: Path
) -> None:
    process = start("nan", model_folder, postcards, tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1 and "finished" not in out
    assert "NonFiniteError: step 1: the loss is not finite (NaN or infinite); posts " in err, err[-3000:]
    assert len(err.rpartition("; posts ")[2].partition(";")[0].split(", ")) == 2, "one post of each process"


def test_the_message_of_an_exception_in_another_process_is_the_end_of_its_traceback() -> None:
    def traceback(message: str) -> Exception:
        return Exception(f"\n\n-- Process 1 terminated with the following error:\nTraceback (most recent call last):\n"
                         f'  File "a.py", line 3, in step\n    raise error: here\n{message}\n')  # fmt: skip

    assert last_message(traceback("ValueError: `val_check_interval` (2) is\n more than 1.")) == (
        "ValueError: `val_check_interval` (2) is\n more than 1."
    )
    assert last_message(traceback("distill.errors.NonFiniteError: step 1: the loss is")).startswith(
        "distill.errors.Non"
    )
    assert last_message(traceback("KeyError: 'seven'")) == "KeyError: 'seven'"
    assert last_message(traceback("AssertionError")) == "AssertionError"
