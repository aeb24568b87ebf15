"""Training of the student on hard labels and on the distributions of larger models (MulCoT-RD, arXiv 2508.05234)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch

from distill.errors import SettingsError
from distill.models.backbone import Backbone, Features
from distill.models.scoring import label_scores
from distill.settings import Fraction, InnerFraction, Natural, NonNegative, Range, Settings
from distill.task.sample import Sample
from distill.training.assistant import AssistantModule, TrainSettings
from distill.training.batches import Batch, LabelTargets, encode_tasks
from distill.training.divergences import Divergence, DivergenceName
from distill.training.fused_loss import AnswerLoss, answer_loss
from distill.training.losses import Positions, TaskLoss, label_divergence, published_loss
from distill.training.sharding import unused
from distill.training.soft_target_cache import CachedTargets
from distill.training.soft_targets import OnlineTargets


@dataclass
class DistillationSettings(Settings):
    """How the student learns from the token distributions of the assistant, and from label distributions."""

    weight: Fraction = 0.3
    """Weight λ of the soft targets in the loss of each task; 0 trains on hard targets only."""
    temperature: Annotated[float, Range(0.01)] = 2.0
    """Temperature T of both distributions; the loss has no T² factor."""
    positions: Positions = "response"
    """Positions of the KL divergence: response (those that predict an answer token) or all (as in the published code:
    one padded sequence per task, and the KL at all of its positions)."""
    soft_targets: Literal["online", "cached"] | None = None
    """online: the assistant runs in every epoch; cached: it runs once before the first epoch, and its soft targets are
    stored on disk; null: cached if there is more than one epoch and the disk has space for twice their size, online
    with `data.drop_modality`."""
    top_k: Natural = 0
    """What is cached per answer token: k > 0 stores the log-probabilities of the k most likely tokens and the mass of
    all others; 0 stores the assistant's last hidden state in bfloat16, from which the full distribution is computed."""
    divergence: DivergenceName = "forward_kl"
    """Divergence of the student p from the soft targets q: forward_kl, KL(q || p); reverse_kl, KL(p || q); jsd, the
    generalized Jensen-Shannon divergence with `beta`; skew_kl and skew_reverse_kl, with the share `skew` of the first
    distribution mixed into the second; tv, the total variation."""
    beta: InnerFraction = 0.5
    """Weight β of the soft targets in jsd; near 0 it is β times forward_kl, near 1 it is 1 - β times reverse_kl."""
    skew: InnerFraction = 0.1
    """Share α of skew_kl and skew_reverse_kl."""
    label_weight: NonNegative = 0.0
    """Weight of the divergence from the label distribution of `label_teacher`, which is added to the loss. It needs no
    common tokenizer, and the unlabelled posts take part; 0: none."""
    label_teacher: Literal["assistant", "teacher"] = "assistant"
    """Whose label distribution is learned: that of the assistant, or of the teacher that is trained or annotates, which
    may be a server that returns log-probabilities."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions == "all" and (self.label_weight or self.divergence != "forward_kl"):
            raise SettingsError("positions all requires label_weight 0 and divergence forward_kl")
        if self.positions == "all" and (self.soft_targets == "cached" or self.top_k):
            raise SettingsError("positions all requires soft_targets online and top_k 0")
        if self.soft_targets == "online" and self.top_k:
            raise SettingsError("soft_targets online requires top_k 0")

    @property
    def chosen_divergence(self) -> Divergence:
        """The divergence with its parameters."""
        return Divergence(self.divergence, self.beta, self.skew)

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


def check_label_teacher(options: DistillationSettings, assistant: TrainSettings | None, teacher: Any) -> None:
    """Check that the recipe has the model whose label distribution the student learns.

    Args:
        teacher: the settings of the teacher that is trained or annotates; None without one.

    Raises:
        SettingsError: it has not, or that model does not train the *classify* task.
    """
    if not options.label_weight:
        return
    role = options.label_teacher
    model, needs = {
        "assistant": (assistant, "an assistant section"),
        "teacher": (teacher, "a teacher section, or an annotate section with a teacher"),
    }[role]
    if model is None:
        raise SettingsError(f"student.distillation.label_teacher: {role} needs {needs}; or set label_weight to 0")
    if isinstance(model, TrainSettings) and "classify" not in model.tasks:
        raise SettingsError(f"{role}.tasks needs classify, because the student learns its label distribution")


@dataclass
class StudentSettings(TrainSettings):
    """Settings of the student's training."""

    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    """Distillation from soft targets."""
    hard_labels_baseline: bool = True
    """Also train the same student on the gold labels only, as a baseline."""


class StudentModule(AssistantModule):
    """Distillation with L = Σ_k w_k ((1 - λ) CE_k + λ D_k) + μ D_labels, summed over the tasks k.

    D_k is the divergence of the token distributions from the assistant's; without soft targets, λ is 0. D_labels is
    the divergence of the label distributions, a sum over the samples with a label target divided by the batch size, as
    samples without an answer to a task add nothing to the task's loss.

    Raises:
        SettingsError: a label target has another number of labels than the student.
    """

    def __init__(
        self,
        backbone: Backbone,
        settings: StudentSettings,
        soft_targets: OnlineTargets | CachedTargets | None = None,
        label_targets: LabelTargets | None = None,
    ) -> None:
        super().__init__(backbone, settings)
        self.distillation = settings.distillation
        self.divergence = settings.distillation.chosen_divergence
        self.soft_targets = soft_targets
        self.label_targets = label_targets or {}
        for post, row in self.label_targets.items():
            if len(row) != len(backbone.labels):
                raise SettingsError(
                    f"student.distillation: the label distribution of post {post} has {len(row)} labels; "
                    f"the student has {len(backbone.labels)}"
                )

    def on_fit_start(self) -> None:
        if not self._published:
            super().on_fit_start()

    def encode(self, samples: Sequence[Sample]) -> Any:
        if self._published:
            return encode_tasks(samples, self.backbone, self.settings.tasks)  # type: ignore[arg-type]
        batch = super().encode(samples)
        if self.soft_targets is None:
            return batch
        answered = [sample for sample, size in zip(samples, batch.sizes.tolist(), strict=True) if size]
        return batch._replace(soft_targets=self.soft_targets.read(answered))

    def loss(self, batch: Batch) -> AnswerLoss:
        targets, head, options = None, self.backbone.head, self.distillation
        if self.soft_targets is not None and len(batch.tokens):
            targets, head = self.soft_targets(batch), head[: self.soft_targets.vocabulary]
        states = self.backbone.hidden_states(batch.inputs).flatten(0, 1)
        loss = answer_loss(
            states[batch.positions], head, batch.tokens, batch.loss_weights, targets, options.weight,
            options.temperature, self.divergence, cap=self.backbone.cap, positions=batch.positions,
        )  # fmt: skip
        if batch.labels is None:
            return loss
        scores = label_scores(self.backbone, states[batch.labels.positions])
        values = label_divergence(scores, batch.labels.log_q, options.temperature, self.divergence)
        if self._trainer is not None:
            self.log("train/label_divergence", values.detach().mean(), batch_size=len(values))
        return loss._replace(total=loss.total + options.label_weight * values.sum() / len(batch.sizes))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if not self._published:
            return super().training_step(batch, index)
        total = torch.zeros((), device=self.device)
        samples = max(len(features["input_ids"]) for features in batch.values())
        for task, features in batch.items():
            loss = self.published_loss(features)
            self._check_loss(loss, index)
            self.log(f"train/{task}_loss", loss.hard, batch_size=samples)
            if self.soft_targets is not None:
                self.log(f"train/{task}_kl", loss.soft, batch_size=samples)
            total = total + self.settings.tasks[task] * loss.total * len(features["input_ids"]) / samples
        self.log("train/loss", total, prog_bar=True, batch_size=samples, sync_dist=True)
        return total + unused(self, self._maybe_unused)

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
