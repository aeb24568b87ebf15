"""The loss of MulCoT-RD (arXiv 2508.05234) as its code has it, over whole padded sequences: a pure function.

What is minimised unless a recipe asks for this one (`positions: all`) is `answer_loss` in fused.py.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from distill.models.backbone import IGNORE

Positions = Literal["response", "all"]


class TaskLoss(NamedTuple):
    """Scalars: `total` is what is minimised, `hard` the cross-entropy, `soft` the KL divergence (0 without targets)."""

    total: torch.Tensor
    hard: torch.Tensor
    soft: torch.Tensor


def published_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    soft_targets: torch.Tensor | None = None,
    weight: float = 0.3,
    temperature: float = 2.0,
) -> TaskLoss:
    """L_k = (1 - weight) CE_k + weight KL(softmax(z_a / T) || softmax(z_s / T)), without a T² factor.

    Cross-entropy is averaged over the answer tokens of the batch; KL over every position, padding and prompt included,
    on unshifted logits.

    Args:
        logits: [B, T, V] of the student.
        labels: [B, T] token ids of the answers, IGNORE elsewhere; position t + 1 is predicted at t.
        soft_targets: [B, T, V] logits of the assistant; None leaves the cross-entropy alone.

    Raises:
        ValueError: the vocabularies differ (cut both to the ids they share first).
    """
    if soft_targets is not None and soft_targets.shape != logits.shape:
        raise ValueError(f"soft targets {tuple(soft_targets.shape)} do not fit logits {tuple(logits.shape)}")
    answer = labels[:, 1:] != IGNORE
    hard = F.cross_entropy(_exact(logits[:, :-1][answer]), labels[:, 1:][answer], reduction="sum")
    hard = hard / answer.sum().clamp(min=1)
    if soft_targets is None:
        return TaskLoss(hard, hard, torch.zeros_like(hard))
    soft = kl_divergence(_exact(logits.flatten(0, 1)), _exact(soft_targets.flatten(0, 1)), temperature).mean()
    return TaskLoss((1 - weight) * hard + weight * soft, hard, soft)


def kl_divergence(logits: torch.Tensor, target_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(softmax(target / T) || softmax(logits / T)) of N positions, [N, V] and [N, V] to [N], in nats."""
    log_p = torch.log_softmax(logits / temperature, -1)
    log_q = torch.log_softmax(target_logits / temperature, -1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def _exact(logits: torch.Tensor) -> torch.Tensor:
    """Logits in float32 at least: half precision is too coarse for sums over a vocabulary."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
