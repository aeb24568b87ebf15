"""Training that survives: killed anywhere it ends with the very same weights; two processes equal one."""

import csv
import multiprocessing
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.metrics import f1_score

from distill.data.corpus import Corpus
from distill.errors import SettingsError
from distill.models.backbone import LoraSettings, ModelSettings, create
from distill.task.labels import LabelSpace
from distill.training import assistant
from distill.training.assistant import AssistantModule, TrainSettings
from distill.training.datamodule import ReasoningDataModule
from distill.training.fit import AtomicCheckpointIO, check_trainer, fit

LABELS = LabelSpace()
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "max_epochs": 2, "log_every_n_steps": 1}


class Killed(Exception):
    pass


class Runs:
    """Trainings of one tiny LoRA model with dropout: 24 samples in batches of 4, so 6 steps an epoch."""

    def __init__(self, model_folder: Path, corpus: Corpus) -> None:
        self.model_folder = model_folder
        self.corpus = corpus

    def module(self, dropout: float = 0.3, batch_size: int = 4) -> AssistantModule:
        L.seed_everything(0, verbose=False)
        lora = LoraSettings(r=4, dropout=dropout)
        model = ModelSettings(str(self.model_folder), lora=lora, image_size=56, batch_size=16)
        settings = TrainSettings(model, batch_size=batch_size, learning_rate=3e-3, patience=0)
        return AssistantModule(create(model, LABELS, Path("unused")), settings)

    def run(self, folder: Path, *, kill: Any = None, workers: int = 0, **arguments: Any) -> AssistantModule:
        """Train in `folder`; `kill` is called after each step and may end it."""
        module = self.module()
        if kill is not None:
            module.on_train_batch_end = lambda *_: kill(module.trainer.global_step)  # type: ignore[method-assign]
        data = ReasoningDataModule(
            module.backbone, self.corpus.train[:24], self.corpus.validation[:12], module.settings.tasks,
            module.encode, batch_size=4, workers=workers,
        )  # fmt: skip
        fit(module, data, folder, QUIET | arguments)
        return module


@pytest.fixture(scope="module")
def runs(model_folder: Path, postcards: Corpus) -> Runs:
    return Runs(model_folder, postcards)


def state(folder: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Bit for bit the same weights, moments and schedule."""
    weights, others = one["state_dict"], two["state_dict"]
    moments, other_moments = (item["optimizer_states"][0]["state"] for item in (one, two))
    return (
        weights.keys() == others.keys()
        and all(torch.equal(weights[name], others[name]) for name in weights)
        and all(torch.equal(moments[k][part], other_moments[k][part]) for k in moments for part in moments[k])
        and one["lr_schedulers"] == two["lr_schedulers"]
        and one["global_step"] == two["global_step"]
    )


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def steps_logged(folder: Path) -> list[int]:
    return [int(row["step"]) for row in rows(folder) if row["train/loss"]]


def raising(at: int) -> Any:
    def kill(step: int) -> None:
        if step == at:
            raise Killed

    return kill


# ---- resuming ----

PLANS = {
    "a validation an epoch": ({}, [3, 7, 12]),
    "in the middle of epochs": ({"val_check_interval": 2}, [3, 6, 7, 9]),
    "between accumulated batches": ({"val_check_interval": 3, "accumulate_grad_batches": 2}, [2, 5]),
    "validations across epochs": ({"val_check_interval": 4, "check_val_every_n_epoch": None}, [5, 9]),
    "a validation every other epoch": ({"check_val_every_n_epoch": 2, "max_epochs": 4}, [7, 20]),
    "with a sanity check": ({"num_sanity_val_steps": 2, "val_check_interval": 0.5}, [4]),
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_killed_training_ends_with_the_very_same_weights(runs: Runs, tmp_path: Path, plan: str) -> None:
    arguments, steps = PLANS[plan]
    whole = tmp_path / "whole"
    best = runs.run(whole, **arguments).state_dict()
    for step in steps:
        folder = tmp_path / f"killed-{step}"
        with pytest.raises(Killed):
            runs.run(folder, kill=raising(step), **arguments)
        resumed = runs.run(folder, **arguments)
        assert same(state(whole), state(folder)), f"killed after step {step}"
        assert all(torch.equal(weights, best[name]) for name, weights in resumed.state_dict().items())
        assert judged(folder)[-1] == judged(whole)[-1]


def judged(folder: Path) -> list[tuple[str, str]]:
    return [(row["step"], row["val/selection"]) for row in rows(folder) if row["val/selection"]]


def test_a_kill_between_the_last_validation_and_the_end_of_an_epoch(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.run(tmp_path / "whole", val_check_interval=2)

    def killed(self: AssistantModule) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(AssistantModule, "on_train_epoch_end", killed)
        runs.run(tmp_path / "killed", val_check_interval=2)
    assert same(state(tmp_path / "whole"), state_after(runs, tmp_path / "killed", val_check_interval=2))


def test_loaders_with_workers_resume_as_well(runs: Runs, tmp_path: Path) -> None:
    arguments = {"val_check_interval": 3, "workers": 2}
    runs.run(tmp_path / "whole", **arguments)
    assert same(state(tmp_path / "whole"), state_after(runs, tmp_path / "plain", val_check_interval=3))
    for step in (7, 10):  # at the end of the first epoch, within the second
        with pytest.raises(Killed):
            runs.run(tmp_path / f"{step}", kill=raising(step), **arguments)
        assert same(state(tmp_path / "whole"), state_after(runs, tmp_path / f"{step}", **arguments))


def state_after(runs: Runs, folder: Path, **arguments: Any) -> dict[str, Any]:
    runs.run(folder, **arguments)
    return state(folder)


def test_sigkill_again_and_again_ends_with_the_same_weights_and_the_whole_curve(runs: Runs, tmp_path: Path) -> None:
    """Nothing is cleaned up after SIGKILL: no finally, no atexit, files as they were."""
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
    assert same(state(tmp_path / "whole"), state(folder))
    assert judged(folder) == judged(tmp_path / "whole")
    assert steps_logged(folder) == list(range(len(steps_logged(folder)))) == steps_logged(tmp_path / "whole")
    assert not (folder / "metrics.earlier.csv").exists()


def test_a_finished_training_is_not_trained_again(runs: Runs, tmp_path: Path) -> None:
    """As after a kill between the last checkpoint and what the stage does with the model."""
    before = runs.run(tmp_path).state_dict()
    curve = rows(tmp_path)
    steps: list[int] = []
    after = runs.run(tmp_path, kill=steps.append).state_dict()
    assert steps == [] and rows(tmp_path) == curve
    assert all(torch.equal(weights, after[name]) for name, weights in before.items())


def test_a_torn_row_of_the_curve_does_not_stop_the_next_run(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        runs.run(tmp_path, kill=raising(7))
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("0,")
    runs.run(tmp_path)
    assert steps_logged(tmp_path) == list(range(len(steps_logged(tmp_path)))) and len(steps_logged(tmp_path)) > 7


# ---- checkpoints ----


def test_a_checkpoint_holds_what_was_trained_and_all_that_goes_on(runs: Runs, tmp_path: Path) -> None:
    module = runs.run(tmp_path)
    for name in ("best", "last"):
        saved = state(tmp_path, name)
        assert len(saved["state_dict"]) == 28 and all("lora_" in key for key in saved["state_dict"])
        assert len(saved["optimizer_states"][0]["state"]) == 28
        assert saved["lr_schedulers"][0]["mode"] == "max"
        assert "fit_loop" in saved["loops"] and saved["loops"]["fit_loop"]["state_dict"]["combined_loader"]
        assert set(saved["generators"]) == {"torch", "cuda"}
    size = (tmp_path / "checkpoints" / "last.ckpt").stat().st_size
    assert size < 3 * sum(4 * weights.numel() for weights in module.parameters())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_the_best_is_the_most_accurate_and_of_those_the_best_by_macro_f1(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gold = torch.tensor([LABELS.index(sample.label) for sample in runs.corpus.validation[:12]])

    def scores(*mistakes: tuple[int, int]) -> torch.Tensor:
        predicted = gold.clone()
        for at, shift in mistakes:
            predicted[at] = (gold[at] + shift) % 3
        return F.one_hot(predicted, 3).float()

    def macro_f1(mistake: tuple[int, int]) -> float:
        return float(f1_score(gold, scores(mistake).argmax(1), average="macro"))

    # two ways to make one mistake whose macro F1 differs by a hair, which single precision must not swallow
    single = sorted([(at, shift) for at in range(12) for shift in (1, 2)], key=macro_f1)
    pairs = [(one, two) for one, two in pairwise(single) if macro_f1(two) - macro_f1(one) > 1e-6]
    worse, better = min(pairs, key=lambda pair: macro_f1(pair[1]) - macro_f1(pair[0]))
    assert macro_f1(better) - macro_f1(worse) < 0.02
    epochs = [[worse, better], [worse], [better], [better], [worse], [(0, 1), (5, 1)]]
    script = iter(epochs)
    monkeypatch.setattr(assistant, "score_labels", lambda *_: (scores(*next(script)), None))
    module = runs.run(tmp_path, max_epochs=6, limit_train_batches=1)
    assert state(tmp_path, "best")["epoch"] == 2  # the first of the two best
    assert state(tmp_path)["epoch"] == 5
    left = {name: weights for name, weights in module.state_dict().items() if "lora_" in name}
    assert all(torch.equal(weights, left[name]) for name, weights in state(tmp_path, "best")["state_dict"].items())


def test_a_run_that_never_improves_is_still_saved(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assistant, "score_labels", lambda *_: (torch.ones(12, 3), None))
    runs.run(tmp_path, max_epochs=3, limit_train_batches=1)
    assert (state(tmp_path, "best")["epoch"], state(tmp_path)["epoch"]) == (0, 2)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"step": 1}, path)

    def torn(checkpoint: Any, file: Any) -> None:
        file.write(b"half of a check")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("distill.training.fit.torch.save", torn)
    process = multiprocessing.get_context("fork").Process(target=writer.save_checkpoint, args=({"step": 2}, path))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert torch.load(path, weights_only=True) == {"step": 1}
    monkeypatch.undo()
    writer.save_checkpoint({"step": 3}, path)
    assert torch.load(path, weights_only=True) == {"step": 3}
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


# ---- the Trainer's arguments ----


def test_the_trainers_arguments_are_known_by_name() -> None:
    check_trainer({"max_epochs": 3, "precision": "bf16-mixed", "strategy": "ddp", "val_check_interval": 0.1}, "trainer")
    with pytest.raises(SettingsError, match=r"student\.trainer\.epochs is not a setting of lightning\.Trainer"):
        check_trainer({"epochs": 3}, "student.trainer")
    for ours in ("logger", "callbacks", "plugins", "enable_checkpointing", "self"):
        with pytest.raises(SettingsError, match=rf"trainer\.{ours} "):
            check_trainer({ours: True}, "trainer")


@pytest.mark.parametrize("arguments", [{"precision": "13"}, {"accelerator": "abacus"}, {"strategy": "none_such"}])
def test_a_value_that_the_trainer_refuses_is_one_sentence(
    runs: Runs, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    with pytest.raises(SettingsError, match=r"^trainer: [^\n]+$"):
        runs.run(tmp_path, **arguments)


def test_a_dry_run_leaves_no_checkpoint_and_no_error(runs: Runs, tmp_path: Path) -> None:
    runs.run(tmp_path, fast_dev_run=True)
    assert not (tmp_path / "checkpoints" / "best.ckpt").exists()


# ---- two processes ----

SCRIPT = """
import json, sys
from pathlib import Path
from distill.data.corpus import DataSettings, read_corpus
from distill.training.fit import fit, fits_here
from tests.training.test_fit import LABELS, QUIET, Runs
from distill.training.datamodule import ReasoningDataModule

def main():
    model, root, out, strategies = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4:]
    data = DataSettings(root=root, validation=["validation.jsonl"])
    runs = Runs(Path(model), read_corpus(data, LABELS))
    for number, strategy in enumerate(strategies):
        folder = out / f"{number}-{strategy}"
        if not fits_here(folder):
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
def test_two_processes_equal_one_with_the_doubled_batch(runs: Runs, tmp_path: Path) -> None:
    """Three in a row, as a chain trains; an odd number of validation samples; each model saved by one process."""
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
    moved = flat({name: weights - start[name] for name, weights in expected.items()})
    for number, strategy in enumerate(strategies):
        folder = tmp_path / f"{number}-{strategy}"
        found = state(folder)["state_dict"]
        apart = flat({name: found[name] - weights for name, weights in expected.items()})
        assert float(apart.norm() / moved.norm()) < 1e-2  # AdamW magnifies rounding where gradients are all but zero
        for one, two in zip(rows(tmp_path / "one"), rows(folder), strict=True):
            assert {name: float(value) for name, value in one.items() if value} == pytest.approx(
                {name: float(value) for name, value in two.items() if value}, abs=1e-3
            )
        assert load_file(folder / "adapter" / "adapter_model.safetensors")


def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for value in weights.values()])
