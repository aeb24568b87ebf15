"""The assistant: one model fine-tuned on reasoning and classification at once (MulCoT-RD, arXiv 2508.05234)."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from sklearn.metrics import f1_score

from distill.models.backbone import Backbone, Features, ModelSettings
from distill.models.scoring import score_labels
from distill.task.sample import Sample
from distill.training.batches import Batch, check_exact, encode
from distill.training.fused_loss import AnswerLoss, answer_loss


@dataclass
class TrainSettings:
    """How one model is trained."""

    model: ModelSettings = field(default_factory=ModelSettings)
    """The model to train."""
    tasks: dict[str, float] = field(default_factory=lambda: {"reason": 1.0, "classify": 1.0})
    """Tasks and their weights in the loss: reason, classify, and for a teacher predict, explain and review."""
    batch_size: int = 2
    """Samples in a step and process."""
    packing: bool = True
    """All tasks of a sample in one sequence, in which its picture and what its prompts share stand once; false: a
    sequence for each task, as flash_attention_2 needs it."""
    learning_rate: float = 3e-4
    """Peak rate of AdamW."""
    weight_decay: float = 0.01
    """Decoupled weight decay of AdamW."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly from zero."""
    patience: int = 2
    """Validations without progress after which the rate falls."""
    factor: float = 0.5
    """What the rate is multiplied by then."""
    min_learning_rate: float = 1e-6
    """The rate never falls below."""
    workers: int = 0
    """Processes that prepare batches."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Arguments of lightning.Trainer for this stage, over those of the recipe's `trainer`."""


class AssistantModule(L.LightningModule):
    """Multitask fine-tuning: L = Σ w_k · L_k over the tasks, loss on the answers and their end tokens only.

    Best is the epoch of highest accuracy, ties by macro F1; on a scale, that of lowest mean absolute error.
    """

    def __init__(self, backbone: Backbone, settings: TrainSettings) -> None:
        super().__init__()
        self.backbone = backbone
        self.model = backbone.model
        self.settings = settings
        self.strict_loading = False  # checkpoints hold the trainable weights alone
        self._judged: list[tuple[torch.Tensor, ...]] = []
        self._resumed: dict[str, Any] | None = None

    def encode(self, samples: Sequence[Sample]) -> Any:
        """The batch of B samples that `training_step` takes."""
        return encode(samples, self.backbone, self.settings.tasks, self.settings.packing)  # type: ignore[arg-type]

    def on_fit_start(self) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        check_exact(self.backbone, data.train, list(self.settings.tasks), self.settings.packing)  # type: ignore[arg-type]

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        loss = self.loss(batch)
        parts = torch.stack([batch.shares * loss.hard, batch.shares * loss.soft, batch.shares])
        sums = parts.new_zeros(3, len(self.settings.tasks)).index_add(1, batch.tasks, parts)
        if self._trainer is not None and self._trainer.world_size > 1:  # a task may be absent in one process alone
            sums = torch.as_tensor(self.all_gather(sums)).sum(0)
        for task, (hard, soft, share) in zip(self.settings.tasks, sums.T, strict=True):
            if share > 0:
                self.log(f"train/{task}_loss", hard / share, batch_size=len(batch.sizes))
                self.log(f"train/{task}_kl", soft / share, batch_size=len(batch.sizes))
        self.log("train/loss", loss.total, prog_bar=True, batch_size=len(batch.sizes), sync_dist=True)
        return loss.total

    def loss(self, batch: Batch) -> AnswerLoss:
        """The loss of a batch: cross-entropy at the positions that predict an answer token, and nowhere else."""
        return answer_loss(self.hidden_states(batch), self.backbone.head, batch.tokens, batch.shares)

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """Last hidden states [N, D] at the positions that predict an answer token."""
        return self.backbone.hidden_states(batch.inputs).flatten(0, 1)[batch.columns]

    def validation_step(self, batch: tuple[Features, torch.Tensor, torch.Tensor], _: int) -> None:
        features, gold, values = batch
        probabilities = score_labels(self.backbone, features)[0]
        errors = (self._values(probabilities) - values).abs()
        self._judged.append((probabilities.argmax(-1), gold, errors))

    def on_validation_epoch_end(self) -> None:
        columns = [torch.cat(column) for column in zip(*self._judged, strict=True)]
        self._judged.clear()
        predicted, gold, errors = (torch.as_tensor(self.all_gather(column)).flatten().cpu() for column in columns)
        seen = gold >= 0  # fillers that give every process equally many
        accuracy = float((predicted == gold)[seen].float().mean())
        macro_f1 = float(f1_score(gold[seen], predicted[seen], average="macro", zero_division=0))
        # the best epoch is the one of highest accuracy; macro F1 breaks ties, as it counts less than half a sample
        progress, selection = accuracy, accuracy + macro_f1 / (2 * int(seen.sum()))
        metrics = {"val/accuracy": accuracy, "val/macro_f1": macro_f1}
        if self.backbone.labels.scale is not None:
            metrics["val/mae"] = float(errors[seen].mean())
            progress = selection = -metrics["val/mae"]
        self.log_dict(metrics | {"val/selection": selection}, prog_bar=True, sync_dist=True)
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) and not self.trainer.sanity_checking:
            scheduler.step(progress)

    def _values(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Values [B] on the labels' scale, from probabilities [B, K]; NaN where there is none."""
        scale = self.backbone.labels.scale
        if scale is None:
            return probabilities.new_full(probabilities.shape[:1], torch.nan)
        return (probabilities * torch.as_tensor(scale.centres).to(probabilities)).sum(-1)

    def configure_optimizers(self) -> Any:
        settings = self.settings
        weights = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, "max", settings.factor, settings.patience, threshold=0.0, min_lr=settings.min_learning_rate
        )  # any progress counts: a relative threshold asks for less than none where -MAE is maximised
        # stepped after each validation: Lightning does it after the checkpoint is written, and a resumed run misses it
        plan = {"scheduler": scheduler, "monitor": "val/selection", "frequency": sys.maxsize}
        return {"optimizer": optimizer, "lr_scheduler": plan}

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        if self.trainer.global_step < self.settings.warmup_steps:
            share = (self.trainer.global_step + 1) / self.settings.warmup_steps
            for group in optimizer.param_groups:
                group["lr"] = share * self.settings.learning_rate
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, weights in self.named_parameters() if weights.requires_grad}
        checkpoint["state_dict"] = {name: w for name, w in checkpoint["state_dict"].items() if name in trained}
        # what Lightning does not keep: gradients accumulated so far, and what dropout draws from
        checkpoint["gradients"] = {name: w.grad for name, w in self.named_parameters() if w.grad is not None}
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        checkpoint["generators"] = {"torch": torch.get_rng_state(), "cuda": cuda}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._resumed = {name: checkpoint[name] for name in ("gradients", "generators")}

    def on_train_start(self) -> None:
        if self._resumed is None:
            return
        weights = dict(self.named_parameters())
        for name, gradient in self._resumed["gradients"].items():
            weights[name].grad = gradient.to(weights[name].device)
        # set here, after the sanity check has drawn
        torch.set_rng_state(self._resumed["generators"]["torch"].cpu())
        for state in self._resumed["generators"]["cuda"][: self.device.type == "cuda"]:
            torch.cuda.set_rng_state(state.cpu(), self.device)
        self._resumed = None
