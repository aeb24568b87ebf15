"""Multitask fine-tuning of one model on reasoning and classification (MulCoT-RD, arXiv 2508.05234)."""

import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import lightning as L
import torch
from sklearn.metrics import f1_score

from distill.errors import NonFiniteError, RunError, SettingsError, first_line
from distill.models.backbone import Backbone, Features, ModelSettings
from distill.models.memory import is_out_of_memory, return_freed
from distill.models.scoring import score_labels
from distill.settings import Count, InnerFraction, Natural, NonNegative, Positive, Range, Settings
from distill.task.sample import Sample
from distill.training import training_state
from distill.training.batches import (
    NOT_PACKED,
    Batch,
    LabelTargets,
    PackingError,
    check_compatibility,
    encode,
    row_lengths,
)
from distill.training.datamodule import restart_epoch
from distill.training.fused_loss import AnswerLoss, answer_loss
from distill.training.schedules import DECAYING, Schedule, learning_rate
from distill.training.sharding import drop_unused_gradients, shard, unused, whole
from distill.training.throughput import Throughput

log = logging.getLogger(__name__)

_RETURN_MEMORY_S = 30.0
"""Seconds between two returns of freed memory, which takes some tenths of a second."""


@dataclass
class TrainSettings(Settings):
    """Settings of one training."""

    model: ModelSettings = field(default_factory=ModelSettings)
    """The model to train."""
    tasks: dict[str, float] = field(default_factory=lambda: {"reason": 1.0, "classify": 1.0})
    """Tasks and their loss weights: reason, classify; for a teacher also predict, explain and review."""
    labelled_posts: bool = False
    """Also train on the labelled posts without a rationale, those that augment drops among them: with the tasks that
    need none, such as classify."""
    batch_size: Count = 2
    """Samples per step and process."""
    packing: bool = True
    """true: all tasks of a sample share one sequence, in which the images and the common prompt prefix occur once;
    false: one sequence per task, required for flash_attention_2. A model that cannot keep the tasks apart gets one
    sequence per answer in either case."""
    learning_rate: Positive = 3e-4
    """Peak learning rate of AdamW."""
    weight_decay: NonNegative = 0.01
    """Weight decay of AdamW."""
    warmup_steps: Natural = 0
    """Steps of linear warm-up of the learning rate from zero."""
    schedule: Schedule = "plateau"
    """The learning rate after the warm-up: plateau (reduced when validation stops improving), constant, or linear or
    cosine, which fall to `min_learning_rate` at the last step."""
    patience: Natural = 2
    """Validations without improvement before the learning rate is reduced (plateau)."""
    factor: InnerFraction = 0.5
    """Factor by which the learning rate is reduced (plateau)."""
    min_learning_rate: NonNegative = 1e-6
    """Lower bound of the learning rate."""
    early_stopping: Natural = 0
    """Validations without improvement before the training ends; 0: it trains to the end."""
    max_length: Natural = 0
    """Posts whose training sequence has more tokens, those of its images included, are left out; 0: no limit."""
    tie_break: Literal["macro_f1", "weighted_f1"] = "macro_f1"
    """Which validation F1 decides between epochs of equal accuracy. Ignored with task.scale."""
    workers: Annotated[int, Range(0, 1024)] = 0
    """DataLoader worker processes."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Arguments of lightning.Trainer for this stage; they override those of the recipe's `trainer`."""


class AssistantModule(L.LightningModule):
    """Multitask fine-tuning: L = Σ_k w_k L_k over the tasks, with the loss on answer and end tokens only.

    The best epoch is the one with the highest validation accuracy, ties broken by the F1 of `tie_break`; for labels on
    a scale, the one with the lowest mean absolute error. A loss, gradient or probability that is not finite ends the
    training with NonFiniteError, in all processes at once.
    """

    soft_targets: Any = None
    uses_all_weights = False
    """Whether each step of each process uses all weights, those of the towers too: all posts have images."""

    def __init__(self, backbone: Backbone, settings: TrainSettings) -> None:
        super().__init__()
        self.backbone = backbone
        self.model = backbone.model
        self.settings = settings
        self.strict_loading = False  # checkpoints contain the trainable weights only
        self._validated: list[tuple[torch.Tensor, ...]] = []
        self._resume_state: dict[str, Any] | None = None
        self._maybe_unused: list[str] = []  # trained weights that a step may not use
        self.label_targets: LabelTargets = {}
        self.current_ids: Sequence[str] = ()  # posts of the current step, for messages
        self._accumulated: list[int] = []  # batches since the last optimizer step
        self._throughput = Throughput()
        self._next_return = 0.0

    def encode(self, samples: Sequence[Sample]) -> Any:
        """Return the batch of B samples that `training_step` expects."""
        return encode(samples, self.backbone, self.settings.tasks, self.settings.packing, self.label_targets)  # type: ignore[arg-type]

    def configure_model(self) -> None:
        if self.device_mesh is not None:  # the strategy is fsdp2
            mesh = self.device_mesh["data_parallel"]
            self._maybe_unused = shard(self, mesh, self.model, all_used=self.uses_all_weights)

    def on_fit_start(self) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        tasks: Any = list(self.settings.tasks)
        labels = bool(self.label_targets)
        try:
            check_compatibility(self.backbone, data.train, tasks, self.settings.packing, label_targets=labels)
        except PackingError:
            self.backbone.packs = False
            check_compatibility(self.backbone, data.train, tasks, False, label_targets=labels)
        except (IndexError, RuntimeError, ValueError) as error:
            if isinstance(error, SettingsError | RunError) or is_out_of_memory(error):
                raise
            raise SettingsError(
                f"model.path: the model does not take what its tokenizer and its processor make of a post: "
                f"{first_line(error)}"
            ) from error
        if self.settings.packing and not self.backbone.packs and self.trainer.is_global_zero:
            log.warning(NOT_PACKED, self.backbone.family.name)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.current_ids = batch.ids if isinstance(batch, Batch) else ()

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        loss = self.loss(batch)
        self._check_loss(loss, index)
        weights = batch.loss_weights
        weighted = torch.stack([weights * loss.hard, weights * loss.soft, weights])
        sums = weighted.new_zeros(3, len(self.settings.tasks)).index_add(1, batch.tasks, weighted)
        if self._trainer is not None and self._trainer.world_size > 1:  # some processes may lack a task in this step
            sums = torch.as_tensor(self.all_gather(sums)).sum(0)
        for task, (hard, soft, weight) in zip(self.settings.tasks, sums.T, strict=True):
            if weight > 0:
                self.log(f"train/{task}_loss", hard / weight, batch_size=len(batch.sizes))
                if self.soft_targets is not None:
                    self.log(f"train/{task}_kl", soft / weight, batch_size=len(batch.sizes))
        self.log("train/loss", loss.total, prog_bar=True, batch_size=len(batch.sizes), sync_dist=True)
        return loss.total + unused(self, self._maybe_unused)

    def loss(self, batch: Batch) -> AnswerLoss:
        """Return the cross-entropy at the positions that predict an answer token."""
        return answer_loss(
            self.hidden_states(batch), self.backbone.head, batch.tokens, batch.loss_weights, cap=self.backbone.cap,
            positions=batch.positions,
        )  # fmt: skip

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """Return the last hidden states [N, D] at the positions that predict an answer token."""
        return self.backbone.hidden_states(batch.inputs).flatten(0, 1)[batch.positions]

    def _check_loss(self, loss: Any, index: int) -> None:
        """Raise NonFiniteError if the loss of a batch is not finite; `loss` has the fields of AnswerLoss."""
        self._accumulated.append(index)
        soft = bool(loss.hard.isfinite().all() and not loss.soft.isfinite().all())
        what = "the loss on the assistant's soft targets is" if soft else "the loss is"
        self._require_finite(what, loss.total.detach(), [index])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        batches, self._accumulated = self._accumulated, []
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.get_scale() > 1:  # the scaler skips such a step and reduces its scale
            return
        drop_unused_gradients(self, self._maybe_unused)
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"])
        if gradients := [w.grad for w in self.parameters() if w.grad is not None]:  # DeepSpeed keeps its own
            norm = whole(torch.nn.utils.get_total_norm(gradients))
            self._require_finite("the gradient is", norm, batches)
            self.log("train/gradient_norm", norm)

    def on_train_epoch_start(self) -> None:
        self._throughput.start()

    def on_validation_end(self) -> None:
        self._throughput.start()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.device.type == "cpu" and time.monotonic() >= self._next_return:
            return_freed()
            self._next_return = time.monotonic() + _RETURN_MEMORY_S
        self._throughput.add(int(row_lengths(batch).sum()))
        interval = getattr(self.trainer, "log_every_n_steps", 0)
        if interval and (batch_idx + 1) % interval == 0 and (speed := self._throughput.take()) is not None:
            self.log("train/tokens_per_second", speed, sync_dist=True, reduce_fx="sum")

    def _require_finite(
        self, what: str, values: torch.Tensor, batches: Sequence[int], *, training: bool = True
    ) -> None:
        """Raise NonFiniteError in all processes if a value is not finite in one of them.

        Args:
            batches: indices of the batches of this process that the values come from.
        """
        trainer = self._trainer
        distributed = trainer is not None and trainer.world_size > 1
        finite = values.isfinite().all()
        if distributed:
            finite = torch.as_tensor(self.all_gather(finite.int())).min()
        if finite:
            return
        posts: list[str] = []
        if trainer is not None and trainer.datamodule is not None:  # type: ignore[attr-defined]
            posts = trainer.datamodule.batch_ids(batches, training)  # type: ignore[attr-defined]
        if distributed and torch.distributed.is_initialized():
            parts: list[Any] = [None] * trainer.world_size  # type: ignore[union-attr]
            torch.distributed.all_gather_object(parts, posts)
            posts = [post for part in parts for post in part]
        step = f"step {trainer.global_step}: " if trainer is not None else ""
        raise NonFiniteError(
            step + what, posts, "lower the learning rate, or set trainer.precision to bf16-mixed or 32-true"
        )

    def validation_step(self, batch: tuple[Features, torch.Tensor, torch.Tensor, Sequence[str]], index: int) -> None:
        features, gold, values, self.current_ids = batch
        probabilities, mass = score_labels(self.backbone, features)
        self._require_finite("the label probabilities in validation are", probabilities, [index], training=False)
        errors = (self._expected_values(probabilities) - values).abs()
        of_gold = probabilities.gather(1, gold.clamp(min=0)[:, None])[:, 0] * mass
        losses = -of_gold.clamp(min=torch.finfo(of_gold.dtype).tiny).log()
        self._validated.append((probabilities.argmax(-1), gold, errors, losses))

    def on_validation_epoch_end(self) -> None:
        parts = [torch.cat(part) for part in zip(*self._validated, strict=True)]
        self._validated.clear()
        predicted, gold, errors, losses = (torch.as_tensor(self.all_gather(part)).flatten().cpu() for part in parts)
        valid = gold >= 0  # -1 marks the padding samples that even out the processes
        accuracy = float((predicted == gold)[valid].float().mean())
        f1 = {
            f"val/{name}": float(f1_score(gold[valid], predicted[valid], average=name[:-3], zero_division=0))
            for name in dict.fromkeys(("macro_f1", self.settings.tie_break))
        }
        # F1 contributes less than half a sample of accuracy, so it only breaks ties
        tie_break = f1[f"val/{self.settings.tie_break}"]
        monitored, selection = accuracy, accuracy + tie_break / (2 * int(valid.sum()))
        # the cross-entropy of the gold label after the forced prefix
        metrics = {"val/accuracy": accuracy, **f1, "val/loss": float(losses[valid].mean())}
        if self.backbone.labels.scale is not None:
            metrics["val/mae"] = float(errors[valid].mean())
            monitored = selection = -metrics["val/mae"]
        self.log_dict(metrics | {"val/selection": selection}, prog_bar=True, sync_dist=True)
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) and not self.trainer.sanity_checking:
            scheduler.step(monitored)

    def _expected_values(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Return the expected values [B] on the label scale from probabilities [B, K]; NaN without a scale."""
        scale = self.backbone.labels.scale
        if scale is None:
            return probabilities.new_full(probabilities.shape[:1], torch.nan)
        return (probabilities * torch.as_tensor(scale.centres).to(probabilities)).sum(-1)

    def configure_optimizers(self) -> Any:
        settings = self.settings
        weights = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        if settings.schedule != "plateau":
            return optimizer
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, "max", settings.factor, settings.patience, threshold=0.0, min_lr=settings.min_learning_rate
        )  # threshold 0: a relative threshold has the wrong sign when the monitored value, -MAE, is negative
        # `on_validation_epoch_end` steps the scheduler: Lightning would step it after the checkpoint is written, and a
        # resumed run would miss that step
        config = {"scheduler": scheduler, "monitor": "val/selection", "frequency": sys.maxsize}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        settings, decays = self.settings, self.settings.schedule in DECAYING
        rate = learning_rate(
            settings.schedule,
            self.trainer.global_step,
            self.trainer.estimated_stepping_batches if decays else 0,
            peak=settings.learning_rate,
            warmup=settings.warmup_steps,
            floor=settings.min_learning_rate,
        )
        if rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, weights in self.named_parameters() if weights.requires_grad}
        checkpoint["state_dict"] = {name: w for name, w in checkpoint["state_dict"].items() if name in trained}
        checkpoint["gradients"] = training_state.gradients(self, accumulated=bool(self._accumulated))
        checkpoint["generators"] = training_state.generators(self)
        checkpoint["processes"] = self.trainer.world_size

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._resume_state = {name: checkpoint[name] for name in ("gradients", "generators")}
        processes, earlier = self.trainer.world_size, checkpoint.get("processes", self.trainer.world_size)
        if processes != earlier:  # the places in the epoch and the accumulated gradients are those of other batches
            begun = restart_epoch(checkpoint["loops"]["fit_loop"])
            self._resume_state["gradients"] = {}
            if self.trainer.is_global_zero:
                epoch = checkpoint["epoch"]
                goes_on = f"epoch {epoch} begins anew" if begun else f"epoch {epoch} was complete and is kept"
                log.warning("the training ran on %d device(s) and goes on with %d: %s", earlier, processes, goes_on)

    def on_train_start(self) -> None:
        if self._resume_state is None:
            return
        training_state.restore_gradients(self, self._resume_state["gradients"])
        # here because the sanity check has used the generators before
        training_state.restore_generators(self, self._resume_state["generators"])
        self._resume_state = None
