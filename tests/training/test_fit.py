"""Training with Lightning: bitwise equal weights after kills, Trainer arguments, several processes."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.data.corpus import Corpus
from distill.errors import SettingsError
from distill.training.assistant import AssistantModule
from distill.training.datamodule import ReasoningDataModule
from distill.training.fit import fit
from tests.training.training_runs import QUIET, Killed, Runs, is_equal, metrics, state


@pytest.fixture(scope="module")
def runs(model_folder: Path, postcards: Corpus) -> Runs:
    return Runs(model_folder, postcards)


def steps_logged(folder: Path) -> list[int]:
    return [int(row["step"]) for row in metrics(folder) if row["train/loss"]]


def kill_after(at: int) -> Any:
    def kill(step: int) -> None:
        if step == at:
            raise Killed

    return kill


# ---- resuming ----

SCHEDULES = {
    "one validation per epoch": ({}, [3, 7, 12]),
    "validation within epochs": ({"val_check_interval": 2}, [3, 6, 7, 9]),
    "validation between accumulated batches": ({"val_check_interval": 3, "accumulate_grad_batches": 2}, [2, 5]),
    "validations across epochs": ({"val_check_interval": 4, "check_val_every_n_epoch": None}, [5, 9]),
    "validation every other epoch": ({"check_val_every_n_epoch": 2, "max_epochs": 4}, [7, 20]),
    "with a sanity check": ({"num_sanity_val_steps": 2, "val_check_interval": 0.5}, [4]),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_killed_training_ends_with_the_same_weights(runs: Runs, tmp_path: Path, schedule: str) -> None:
    arguments, steps = SCHEDULES[schedule]
    whole = tmp_path / "whole"
    best = runs.run(whole, **arguments).state_dict()
    for step in steps:
        folder = tmp_path / f"killed-{step}"
        with pytest.raises(Killed):
            runs.run(folder, kill=kill_after(step), **arguments)
        resumed = runs.run(folder, **arguments)
        assert is_equal(state(whole), state(folder)), f"killed after step {step}"
        assert all(torch.equal(weights, best[name]) for name, weights in resumed.state_dict().items())
        assert selections(folder)[-1] == selections(whole)[-1]


def selections(folder: Path) -> list[tuple[str, str]]:
    return [(row["step"], row["val/selection"]) for row in metrics(folder) if row["val/selection"]]


def test_a_kill_between_the_last_validation_and_the_end_of_an_epoch(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.run(tmp_path / "whole", val_check_interval=2)

    def killed(self: AssistantModule) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(AssistantModule, "on_train_epoch_end", killed)
        runs.run(tmp_path / "killed", val_check_interval=2)
    assert is_equal(state(tmp_path / "whole"), state_after(runs, tmp_path / "killed", val_check_interval=2))


def test_loaders_with_workers_are_resumable(runs: Runs, tmp_path: Path) -> None:
    arguments = {"val_check_interval": 3, "workers": 2}
    runs.run(tmp_path / "whole", **arguments)
    assert is_equal(state(tmp_path / "whole"), state_after(runs, tmp_path / "plain", val_check_interval=3))
    for step in (7, 10):  # at the end of the first epoch, within the second
        with pytest.raises(Killed):
            runs.run(tmp_path / f"{step}", kill=kill_after(step), **arguments)
        assert is_equal(state(tmp_path / "whole"), state_after(runs, tmp_path / f"{step}", **arguments))


def state_after(runs: Runs, folder: Path, **arguments: Any) -> dict[str, Any]:
    runs.run(folder, **arguments)
    return state(folder)


def test_repeated_sigkill_ends_with_the_same_weights_and_complete_metrics(runs: Runs, tmp_path: Path) -> None:
    """SIGKILL allows no cleanup: no finally, no atexit."""
    runs.run(tmp_path / "whole", val_check_interval=2)
    folder = tmp_path / "killed"

    def killed_at(step: int) -> None:
        runs.run(folder, kill=lambda now: now == step and os.kill(os.getpid(), signal.SIGKILL), val_check_interval=2)

    for step in (1, 5, 9, 11):
        process = multiprocessing.get_context("fork").Process(target=killed_at, args=(step,))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
    runs.run(folder, val_check_interval=2)
    assert is_equal(state(tmp_path / "whole"), state(folder))
    assert selections(folder) == selections(tmp_path / "whole")
    assert steps_logged(folder) == list(range(len(steps_logged(folder)))) == steps_logged(tmp_path / "whole")
    assert not (folder / "metrics.earlier.csv").exists()


def test_a_finished_training_is_not_repeated(runs: Runs, tmp_path: Path) -> None:
    """As after a kill between the last checkpoint and the end of the stage."""
    before = runs.run(tmp_path).state_dict()
    logged = metrics(tmp_path)
    steps: list[int] = []
    after = runs.run(tmp_path, kill=steps.append).state_dict()
    assert steps == [] and metrics(tmp_path) == logged
    assert all(torch.equal(weights, after[name]) for name, weights in before.items())


def test_a_truncated_row_of_the_metrics_does_not_stop_the_next_run(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        runs.run(tmp_path, kill=kill_after(7))
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("0,")
    runs.run(tmp_path)
    assert steps_logged(tmp_path) == list(range(len(steps_logged(tmp_path)))) and len(steps_logged(tmp_path)) > 7


# ---- arguments of the Trainer ----


@pytest.mark.parametrize("arguments", [{"precision": "13"}, {"accelerator": "abacus"}, {"strategy": "none_such"}])
def test_a_value_that_the_trainer_rejects_is_a_one_line_error(
    runs: Runs, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    with pytest.raises(SettingsError, match=r"^trainer: [^\n]+$"):
        runs.run(tmp_path, **arguments)


def test_fast_dev_run_writes_no_checkpoint_and_raises_no_error(runs: Runs, tmp_path: Path) -> None:
    runs.run(tmp_path, fast_dev_run=True)
    assert not (tmp_path / "checkpoints" / "best.ckpt").exists()


# ---- two processes ----

SCRIPT = """
import json, sys
from pathlib import Path
from distill.data.corpus import DataSettings, read_corpus
from distill.training.fit import fit
from distill.training.processes import should_train
from tests.training.training_runs import LABELS, QUIET, Runs
from distill.training.datamodule import ReasoningDataModule

def main():
    model, root, out, strategies = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4:]
    data = DataSettings(root=root, validation=["validation.jsonl"])
    runs = Runs(Path(model), read_corpus(data, LABELS))
    for number, strategy in enumerate(strategies):
        folder = out / f"{number}-{strategy}"
        if not should_train(folder):
            continue
        module = runs.module(dropout=0.0, batch_size=2)
        rows = ReasoningDataModule(
            module.backbone, runs.corpus.train[:24], runs.corpus.validation[:11], module.settings.tasks, module.encode,
            batch_size=2,
        )
        fit(module, rows, folder, QUIET | {"devices": 2, "strategy": strategy})
        module.backbone.save(folder / "adapter")
    print("the end")

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_two_processes_equal_one_process_with_twice_the_batch_size(runs: Runs, tmp_path: Path) -> None:
    """Three trainings in sequence, as in a chain; an odd number of validation samples; one process saves each model."""
    strategies = ["ddp", "ddp_spawn", "ddp"]
    module = runs.module(dropout=0.0, batch_size=4)
    start = {name: weights.detach().clone() for name, weights in module.named_parameters() if weights.requires_grad}
    data = ReasoningDataModule(
        module.backbone, runs.corpus.train[:24], runs.corpus.validation[:11], module.settings.tasks, module.encode,
        batch_size=4,
    )  # fmt: skip
    fit(module, data, tmp_path / "one", QUIET)
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(runs.model_folder), str(runs.corpus.root), str(tmp_path), *strategies],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("the end") == 1
    expected = state(tmp_path / "one")["state_dict"]
    update = flat({name: weights - start[name] for name, weights in expected.items()})
    for number, strategy in enumerate(strategies):
        folder = tmp_path / f"{number}-{strategy}"
        found = state(folder)["state_dict"]
        difference = flat({name: found[name] - weights for name, weights in expected.items()})
        assert float(difference.norm() / update.norm()) < 1e-2  # AdamW amplifies rounding errors of gradients near zero
        for one, two in zip(metrics(tmp_path / "one"), metrics(folder), strict=True):
            values, expected_values = (
                {name: float(value) for name, value in row.items() if value and name != "train/tokens_per_second"}
                for row in (one, two)
            )
            assert values == pytest.approx(expected_values, abs=1e-3)
        assert load_file(folder / "adapter" / "adapter_model.safetensors")


def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for value in weights.values()])


@pytest.mark.parametrize("limits", [("max_epochs", 2, 4), ("max_steps", 9, 16)], ids=lambda value: value[0])
def test_a_longer_training_goes_on_from_the_last_checkpoint(
    limits: tuple[str, int, int], runs: Runs, tmp_path: Path
) -> None:
    name, first, longer = limits
    unlimited = {"max_epochs": -1} if name == "max_steps" else {}
    steps: list[int] = []
    runs.run(tmp_path / "one", **unlimited | {name: first})
    runs.run(tmp_path / "one", kill=steps.append, **unlimited | {name: longer})
    runs.run(tmp_path / "two", **unlimited | {name: longer})
    begin = first if name == "max_steps" else 6 * first
    end = longer if name == "max_steps" else 6 * longer
    assert steps == list(range(begin + 1, end + 1))
    if name == "max_epochs":
        assert is_equal(state(tmp_path / "one"), state(tmp_path / "two"))
    assert state(tmp_path / "one")["global_step"] == state(tmp_path / "two")["global_step"] == end


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_truncated_checkpoint_is_one_sentence(name: str, runs: Runs, tmp_path: Path) -> None:
    runs.run(tmp_path)
    path = tmp_path / "checkpoints" / f"{name}.ckpt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.raises(
        SettingsError, match=rf"{name}\.ckpt is damaged \(\w+\); delete its folder and run: distill run"
    ):
        runs.run(tmp_path)
