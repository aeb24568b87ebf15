"""Short trainings of a tiny model, and readers of their checkpoints and metrics."""

import csv
from pathlib import Path
from typing import Any

import lightning as L
import torch

from distill.data.corpus import Corpus
from distill.models.backbone import LoraSettings, ModelSettings, create
from distill.task.labels import LabelSpace
from distill.training.assistant import AssistantModule, TrainSettings
from distill.training.datamodule import ReasoningDataModule
from distill.training.fit import fit

LABELS = LabelSpace()
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "max_epochs": 2, "log_every_n_steps": 1}


class Killed(Exception):
    pass


class Runs:
    """Trainings of one tiny LoRA model with dropout: 24 samples in batches of 4, so 6 steps per epoch."""

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
        """Train in `folder`; `kill` is called with the step after each step and may raise."""
        module = self.module()
        if kill is not None:
            module.on_train_batch_end = lambda *_: kill(module.trainer.global_step)  # type: ignore[method-assign]
        data = ReasoningDataModule(
            module.backbone, self.corpus.train[:24], self.corpus.validation[:12], module.settings.tasks,
            module.encode, batch_size=4, workers=workers,
        )  # fmt: skip
        fit(module, data, folder, QUIET | arguments)
        return module


def state(folder: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def is_equal(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Whether weights, optimizer moments and schedule are bitwise equal."""
    weights, others = one["state_dict"], two["state_dict"]
    moments, other_moments = (item["optimizer_states"][0]["state"] for item in (one, two))
    return (
        weights.keys() == others.keys()
        and all(torch.equal(weights[name], others[name]) for name in weights)
        and all(torch.equal(moments[k][part], other_moments[k][part]) for k in moments for part in moments[k])
        and one["lr_schedulers"] == two["lr_schedulers"]
        and one["global_step"] == two["global_step"]
    )


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))
