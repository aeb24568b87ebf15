"""The student: multitask training on hard labels and on the assistant's distribution (MulCoT-RD, arXiv 2508.05234)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from distill.errors import SettingsError
from distill.models.backbone import Backbone, Features
from distill.task.sample import Sample
from distill.training.assistant import AssistantModule, TrainSettings
from distill.training.batches import Batch, encode_tasks
from distill.training.fused_loss import AnswerLoss, answer_loss
from distill.training.losses import Positions, TaskLoss, published_loss
from distill.training.soft_target_cache import CachedTargets
from distill.training.soft_targets import SoftTargets


@dataclass
class DistillationSettings:
    """What the student takes from the assistant's distribution."""

    weight: float = 0.3
    """Share of the soft targets in each task's loss, λ; 0 trains on hard targets alone."""
    temperature: float = 2.0
    """Temperature T of both distributions; no T² factor."""
    positions: Positions = "response"
    """Where the KL is taken: response (positions that predict an answer token) or all (as the published code does: a
    padded sequence for each task, and the KL at every position of it)."""
    soft_targets: Literal["online", "cached"] | None = None
    """online: the assistant is asked in every epoch; cached: once before the first; null: cached where there is more
    than one epoch and the disk has room for twice what it takes."""
    top_k: int = 0
    """What is cached of each answer token: the log-probabilities of so many likeliest tokens and the mass of all
    others; 0: the assistant's last hidden state in bfloat16, from which its whole distribution is computed."""

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise SettingsError(f"student.distillation.top_k is {self.top_k}; it takes 0 or more")
        if self.positions == "all" and (self.soft_targets == "cached" or self.top_k):
            raise SettingsError("student.distillation.soft_targets takes online, and top_k 0, where positions is all")
        if self.soft_targets == "online" and self.top_k:
            raise SettingsError("student.distillation.top_k takes 0 where soft_targets is online")

    def use_cache(self, epochs: float, needed: float, there: float, free: float) -> bool:
        """Whether soft targets are written to disk before the first epoch.

        The setting `soft_targets` decides where it is set. Otherwise they are cached if there is more than one epoch
        and the disk has room for twice the missing bytes.

        Args:
            needed: bytes of all soft targets.
            there: bytes that an earlier run already wrote.
            free: free bytes on the disk.
        """
        if self.soft_targets is not None or self.positions == "all":
            return self.soft_targets == "cached"
        return epochs != 1 and 2 * (needed - there) <= free


@dataclass
class StudentSettings(TrainSettings):
    """How the student is trained."""

    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    """How the assistant's soft targets enter the loss."""
    hard_labels_baseline: bool = True
    """Also train the same student on the gold labels alone, for comparison."""


class StudentModule(AssistantModule):
    """L_k = (1 - λ) CE_k + λ KL(assistant || student) for each task; without soft targets, the cross-entropy alone."""

    def __init__(
        self, backbone: Backbone, settings: StudentSettings, soft_targets: SoftTargets | CachedTargets | None = None
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
        soft = {} if self.soft_targets is None else self.soft_targets.read(samples)
        return super().encode(samples)._replace(soft=soft)

    def loss(self, batch: Batch) -> AnswerLoss:
        targets = None if self.soft_targets is None else self.soft_targets(batch)
        options = self.distillation
        head = self.backbone.head if self.soft_targets is None else self.backbone.head[: self.soft_targets.vocabulary]
        parts = (self.hidden_states(batch), head, batch.tokens, batch.shares)
        return answer_loss(*parts, targets, options.weight, options.temperature)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if not self._published:
            return super().training_step(batch, index)
        total = torch.zeros((), device=self.device)
        samples = max(len(features["input_ids"]) for features in batch.values())
        for task, features in batch.items():
            loss = self.published_loss(features)
            self.log(f"train/{task}_loss", loss.hard, batch_size=samples)
            self.log(f"train/{task}_kl", loss.soft, batch_size=samples)
            total = total + self.settings.tasks[task] * loss.total * len(features["input_ids"]) / samples
        self.log("train/loss", total, prog_bar=True, batch_size=samples, sync_dist=True)
        return total

    def published_loss(self, features: Features) -> TaskLoss:
        """The loss of one task over B padded sequences, the KL taken at every position (`positions: all`)."""
        inputs = {name: value for name, value in features.items() if name != "labels"}
        logits, targets = self.model(**inputs).logits, None
        if isinstance(self.soft_targets, SoftTargets):
            targets = self.soft_targets.logits(inputs)
            logits = logits[..., : self.soft_targets.vocabulary]
        options = self.distillation
        return published_loss(logits, features["labels"], targets, options.weight, options.temperature)

    @property
    def _published(self) -> bool:
        return self.distillation.positions == "all"
