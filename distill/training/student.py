"""The student: multitask training on hard labels and on the assistant's distribution (MulCoT-RD, arXiv 2508.05234)."""

from dataclasses import dataclass, field

from distill.models.backbone import Backbone, Features
from distill.training.assistant import AssistantModule, TrainSettings, without_prompt
from distill.training.losses import Positions, TaskLoss, task_loss
from distill.training.soft_targets import SoftTargets


@dataclass
class DistillationSettings:
    """What the student takes from the assistant's distribution."""

    weight: float = 0.3
    """Share of the soft targets in each task's loss, λ; 0 trains on hard targets alone."""
    temperature: float = 2.0
    """Temperature T of both distributions; no T² factor."""
    positions: Positions = "response"
    """Where the KL is taken: response (positions that predict an answer token) or all (as the published code does)."""


@dataclass
class StudentSettings(TrainSettings):
    """How the student is trained."""

    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    """How the assistant's soft targets enter the loss."""
    hard_labels_baseline: bool = True
    """Also train the same student on the gold labels alone, for comparison."""


class StudentModule(AssistantModule):
    """L_k = (1 - λ) CE_k + λ KL(assistant || student) for each task; without soft targets, the cross-entropy alone."""

    def __init__(self, backbone: Backbone, settings: StudentSettings, soft_targets: SoftTargets | None = None) -> None:
        super().__init__(backbone, settings)
        self.distillation = settings.distillation
        self.soft_targets = soft_targets

    def task_loss(self, features: Features) -> TaskLoss:
        if "targets" in features:  # soft already: no assistant's distribution beside them, as recipe.check makes sure
            return super().task_loss(features)
        inputs, labels = without_prompt(features)
        options = self.distillation
        if options.positions == "all":
            labels = features["labels"]
        kept = labels.shape[1]
        logits = self.model(**inputs, logits_to_keep=kept).logits
        if self.soft_targets is None:
            return task_loss(logits, labels, positions=options.positions)
        targets = self.soft_targets(inputs, kept)
        logits = logits[..., : self.soft_targets.vocabulary]
        return task_loss(logits, labels, targets, options.weight, options.temperature, options.positions)
