"""Checkpoints of a training: their content, the best epoch, and atomic writing."""

import multiprocessing
import os
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score

from distill.data.corpus import Corpus
from distill.training import assistant
from distill.training.fit import AtomicCheckpointIO
from tests.training.training_runs import LABELS, Runs, state


@pytest.fixture(scope="module")
def runs(model_folder: Path, postcards: Corpus) -> Runs:
    return Runs(model_folder, postcards)


def test_a_checkpoint_contains_the_trained_weights_and_the_training_state(runs: Runs, tmp_path: Path) -> None:
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


def test_the_best_epoch_has_the_highest_accuracy_then_macro_f1(
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

    # two single mistakes whose macro F1 differ slightly; the difference must survive single precision
    single = sorted([(at, shift) for at in range(12) for shift in (1, 2)], key=macro_f1)
    pairs = [(one, two) for one, two in pairwise(single) if macro_f1(two) - macro_f1(one) > 1e-6]
    worse, better = min(pairs, key=lambda pair: macro_f1(pair[1]) - macro_f1(pair[0]))
    assert macro_f1(better) - macro_f1(worse) < 0.02
    epochs = [[worse, better], [worse], [better], [better], [worse], [(0, 1), (5, 1)]]
    script = iter(epochs)
    monkeypatch.setattr(assistant, "score_labels", lambda *_: (scores(*next(script)), torch.ones(12)))
    module = runs.run(tmp_path, max_epochs=6, limit_train_batches=1)
    assert state(tmp_path, "best")["epoch"] == 2  # the first of the two best epochs
    assert state(tmp_path)["epoch"] == 5
    final = {name: weights for name, weights in module.state_dict().items() if "lora_" in name}
    assert all(torch.equal(weights, final[name]) for name, weights in state(tmp_path, "best")["state_dict"].items())


def test_a_run_that_never_improves_is_still_saved(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assistant, "score_labels", lambda *_: (torch.ones(12, 3), torch.ones(12)))
    runs.run(tmp_path, max_epochs=3, limit_train_batches=1)
    assert (state(tmp_path, "best")["epoch"], state(tmp_path)["epoch"]) == (0, 2)


def test_a_kill_while_a_checkpoint_is_written_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"step": 1}, path)

    def truncated_save(checkpoint: Any, file: Any) -> None:
        file.write(b"half of a check")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("distill.training.fit.torch.save", truncated_save)
    process = multiprocessing.get_context("fork").Process(target=writer.save_checkpoint, args=({"step": 2}, path))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert torch.load(path, weights_only=True) == {"step": 1}
    monkeypatch.undo()
    writer.save_checkpoint({"step": 3}, path)
    assert torch.load(path, weights_only=True) == {"step": 3}
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
