"""Training of the student on hard labels and on the assistant's distribution (MulCoT-RD, arXiv 2508.05234)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch

from distill.errors import SettingsError
from distill.models.backbone import Backbone, Features
from distill.settings import Fraction, Natural, Range, Settings
from distill.task.sample import Sample
from distill.training.assistant import AssistantModule, TrainSettings
from distill.training.batches import Batch, encode_tasks
from distill.training.fused_loss import AnswerLoss, answer_loss
from distill.training.losses import Positions, TaskLoss, published_loss
from distill.training.soft_target_cache import CachedTargets
from distill.training.soft_targets import OnlineTargets


@dataclass
class DistillationSettings(Settings):
    """How the student learns from the assistant's distribution."""

    weight: Fraction = 0.3
    """Weight λ of the soft targets in the loss of each task; 0 trains on hard targets only."""
    temperature: Annotated[float, Range(0.01)] = 2.0
    """Temperature T of both distributions; the loss has no T² factor."""
    positions: Positions = "response"
    """Positions of the KL divergence: response (those that predict an answer token) or all (as in the published code:
    one padded sequence per task, and the KL at all of its positions)."""
    soft_targets: Literal["online", "cached"] | None = None
    """online: the assistant runs in every epoch; cached: it runs once before the first epoch, and its soft targets are
    stored on disk; null: cached if there is more than one epoch and the disk has space for twice their size."""
    top_k: Natural = 0
    """What is cached per answer token: k > 0 stores the log-probabilities of the k most likely tokens and the mass of
    all others; 0 stores the assistant's last hidden state in bfloat16, from which the full distribution is computed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions == "all" and (self.soft_targets == "cached" or self.top_k):
            raise SettingsError("student.distillation: positions all requires soft_targets online and top_k 0")
        if self.soft_targets == "online" and self.top_k:
            raise SettingsError("student.distillation: soft_targets online requires top_k 0")

    def use_cache(self, epochs: float, needed: float, cached: float, free: float) -> bool:
        """Whether soft targets are written to disk before the first epoch.

        The setting `soft_targets` decides if it is not null. Otherwise they are cached if there is more than one epoch
        and the disk has space for twice the missing bytes.

        Args:
            epochs: number of epochs; -1 if unlimited.
            needed: bytes of all soft targets.
            cached: bytes that an earlier run has written.
            free: free bytes on the disk.
        """
        if self.soft_targets is not None or self.positions == "all":
            return self.soft_targets == "cached"
        return epochs != 1 and 2 * (needed - cached) <= free


@dataclass
class StudentSettings(TrainSettings):
    """Settings of the student's training."""

    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    """Distillation from the assistant's soft targets."""
    hard_labels_baseline: bool = True
    """Also train the same student on the gold labels only, as a baseline."""


class StudentModule(AssistantModule):
    """Distillation with L_k = (1 - λ) CE_k + λ KL(assistant || student) per task; the CE alone without soft targets."""

    def __init__(
        self, backbone: Backbone, settings: StudentSettings, soft_targets: OnlineTargets | CachedTargets | None = None
    ) -> None:
        super().__init__(backbone, settings)
        self.distillation = settings.distillation
        self.soft_targets = soft_targets

    def on_fit_start(self) -> None:
        if not self._published:
            super().on_fit_start()

    def encode(self, samples: Sequence[Sample]) -> Any:
        if self._published:
            return encode_tasks(samples, self.backbone, self.settings.tasks)  # type: ignore[arg-type]
        stored = {} if self.soft_targets is None else self.soft_targets.read(samples)
        return super().encode(samples)._replace(soft_targets=stored)

    def loss(self, batch: Batch) -> AnswerLoss:
        targets = None if self.soft_targets is None else self.soft_targets(batch)
        options = self.distillation
        head = self.backbone.head if self.soft_targets is None else self.backbone.head[: self.soft_targets.vocabulary]
        hidden = self.hidden_states(batch)
        return answer_loss(
            hidden, head, batch.tokens, batch.loss_weights, targets, options.weight, options.temperature,
            cap=self.backbone.cap,
        )  # fmt: skip

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if not self._published:
            return super().training_step(batch, index)
        total = torch.zeros((), device=self.device)
        samples = max(len(features["input_ids"]) for features in batch.values())
        for task, features in batch.items():
            loss = self.published_loss(features)
            self._check_loss(loss, index)
            self.log(f"train/{task}_loss", loss.hard, batch_size=samples)
            self.log(f"train/{task}_kl", loss.soft, batch_size=samples)
            total = total + self.settings.tasks[task] * loss.total * len(features["input_ids"]) / samples
        self.log("train/loss", total, prog_bar=True, batch_size=samples, sync_dist=True)
        return total

    def published_loss(self, features: Features) -> TaskLoss:
        """Return the loss of one task over B padded sequences, with the KL at all positions (`positions: all`)."""
        inputs = {name: value for name, value in features.items() if name != "labels"}
        logits, targets = self.model(**inputs).logits, None
        if isinstance(self.soft_targets, OnlineTargets):
            targets = self.soft_targets.logits(inputs)
            logits = logits[..., : self.soft_targets.vocabulary]
        options = self.distillation
        return published_loss(logits, features["labels"], targets, options.weight, options.temperature)

    @property
    def _published(self) -> bool:
        return self.distillation.positions == "all"
