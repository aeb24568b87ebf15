"""Schedules, early stopping, clipping, callbacks and loggers of a training, also after a kill."""

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from distill.data.corpus import Corpus
from distill.models.backbone import LoraSettings, ModelSettings, create
from distill.training import assistant
from distill.training.assistant import AssistantModule, TrainSettings
from distill.training.datamodule import ReasoningDataModule
from distill.training.fit import fit
from tests.training.training_runs import LABELS, QUIET, Killed, is_equal, metrics, state


class Recorder(L.Callback):
    """A user's callback: appends the rate of each step to a file."""

    def __init__(self, path: str, factor: float = 1.0) -> None:
        self.path, self.factor = Path(path), factor

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"] * self.factor
        with self.path.open("a") as file:
            file.write(f"{rate}\n")


def train(
    model_folder: Path, corpus: Corpus, folder: Path, settings: dict[str, Any], kill: int = 0, **arguments: Any
) -> AssistantModule:
    """Train a tiny LoRA model: 24 samples in batches of 4, so 6 steps per epoch; `kill` raises after that step."""
    L.seed_everything(0, verbose=False)
    model = ModelSettings(str(model_folder), lora=LoraSettings(r=4, dropout=0.3), image_size=56, batch_size=16)
    module = AssistantModule(
        create(model, LABELS, Path("unused")),
        TrainSettings(model, batch_size=4, **{"learning_rate": 3e-3, "patience": 0} | settings),
    )
    ended = module.on_train_batch_end

    def on_train_batch_end(*args: Any) -> None:
        ended(*args)
        if kill and module.trainer.global_step == kill:
            raise Killed

    module.on_train_batch_end = on_train_batch_end  # type: ignore[method-assign]
    data = ReasoningDataModule(
        module.backbone, corpus.train[:24], corpus.validation[:12], module.settings.tasks, module.encode, batch_size=4
    )
    fit(module, data, folder, QUIET | arguments)
    return module


def column(folder: Path, name: str) -> list[float]:
    return [float(row[name]) for row in metrics(folder) if row.get(name)]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_killed_training_goes_on_at_its_place_in_the_schedule(
    model_folder: Path, postcards: Corpus, tmp_path: Path, schedule: str
) -> None:
    settings = {"schedule": schedule, "warmup_steps": 2, "min_learning_rate": 1e-4}
    train(model_folder, postcards, tmp_path / "whole", settings, val_check_interval=2)
    with pytest.raises(Killed):
        train(model_folder, postcards, tmp_path / "killed", settings, kill=9, val_check_interval=2)
    train(model_folder, postcards, tmp_path / "killed", settings, val_check_interval=2)
    assert is_equal(state(tmp_path / "whole"), state(tmp_path / "killed"))
    rates = column(tmp_path / "whole", "train/learning_rate")
    assert len(rates) == 12 and rates[:3] == pytest.approx([1.5e-3, 3e-3, 3e-3])
    last = {"linear": 1e-4 + 2.9e-3 / 10, "cosine": 1e-4 + 2.9e-3 * 0.0244717, "constant": 3e-3}[schedule]
    assert rates[-1] == pytest.approx(last, rel=1e-4), "one step before the end of the schedule"
    assert column(tmp_path / "killed", "train/learning_rate") == rates


def test_training_stops_after_validations_without_improvement_and_once(
    model_folder: Path, postcards: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of six validations is the best; with a patience of two the fourth ends the training."""
    gold = torch.tensor([LABELS.index(post.label) for post in postcards.validation[:12]])

    def scores(correct: int) -> tuple[torch.Tensor, torch.Tensor]:
        predicted = torch.where(torch.arange(12) < correct, gold, (gold + 1) % 3)
        return torch.nn.functional.one_hot(predicted, 3).float(), torch.ones(12)

    script = iter([3, 6, 6, 5, 9, 9])
    monkeypatch.setattr(assistant, "score_labels", lambda *_: scores(next(script)))
    settings = {"early_stopping": 2}
    train(model_folder, postcards, tmp_path, settings, max_epochs=6)
    assert column(tmp_path, "val/accuracy") == pytest.approx([0.25, 0.5, 0.5, 5 / 12])
    assert state(tmp_path)["global_step"] == 24
    train(model_folder, postcards, tmp_path, settings, max_epochs=6)  # killed before it was finished: no more steps
    assert state(tmp_path)["global_step"] == 24


def test_the_loss_of_the_gold_labels_and_the_gradient_norm_are_logged(
    model_folder: Path, postcards: Corpus, tmp_path: Path
) -> None:
    module = train(model_folder, postcards, tmp_path, {}, max_epochs=1, gradient_clip_val=1e-3, log_every_n_steps=2)
    posts = postcards.validation[:12]
    backbone = module.backbone
    features = backbone.encode(posts, "classify")
    last = features["attention_mask"].sum(1) - 1
    with torch.no_grad():
        logits = backbone.model.eval()(**features).logits[torch.arange(12), last]
    gold = torch.stack([backbone.label_ids[LABELS.index(post.label)] for post in posts])
    expected = torch.nn.functional.cross_entropy(logits, gold)
    assert column(tmp_path, "val/loss") == pytest.approx([float(expected)], rel=1e-4)
    norms = column(tmp_path, "train/gradient_norm")
    assert len(norms) == 3 and min(norms) > 1e-3, "before clipping"
    assert len(column(tmp_path, "train/tokens_per_second")) == 3
    assert min(column(tmp_path, "train/tokens_per_second")) > 0
    moments = state(tmp_path)["optimizer_states"][0]["state"].values()
    assert sum(float(m["exp_avg"].norm() ** 2) for m in moments) ** 0.5 < 1e-3, "after clipping"


def test_callbacks_and_loggers_by_class_path(model_folder: Path, postcards: Corpus, tmp_path: Path) -> None:
    callbacks = [
        {"class_path": f"{__name__}.Recorder", "init_args": {"path": str(tmp_path / "rates"), "factor": 2.0}},
        {
            "class_path": "lightning.pytorch.callbacks.EarlyStopping",
            "init_args": {"monitor": "val/loss", "patience": 5},
        },
    ]
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "own")}}
    folder = tmp_path / "training"
    train(model_folder, postcards, folder, {}, max_epochs=1, callbacks=callbacks, loggers=[logger])
    rates = [float(line) for line in (tmp_path / "rates").read_text().splitlines()]
    assert rates == pytest.approx([6e-3] * 6)
    with next((tmp_path / "own").rglob("metrics.csv")).open(newline="") as file:
        own = [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]
    assert own == [row["train/loss"] for row in metrics(folder) if row["train/loss"]] and len(own) == 6
    assert any("EarlyStopping" in key for key in state(folder)["callbacks"])
