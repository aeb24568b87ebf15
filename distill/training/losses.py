"""The divergence of label distributions, and the loss of the published MulCoT-RD code (arXiv 2508.05234).

The published loss is over whole padded sequences and used only with `positions: all`; the default is `answer_loss` in
fused_loss.py.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from distill.models.backbone import IGNORE
from distill.training.divergences import Divergence

Positions = Literal["response", "all"]


class TaskLoss(NamedTuple):
    """Scalar losses of one task.

    Attributes:
        total: loss to minimize.
        hard: cross-entropy.
        soft: KL divergence; 0 without soft targets.
    """

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
    """Compute L_k = (1 - weight) CE_k + weight KL(softmax(z_a / T) || softmax(z_s / T)), without a T² factor.

    The cross-entropy is averaged over the answer tokens of the batch. The KL is averaged over all positions, including
    prompt and padding, on unshifted logits.

    Args:
        logits: [B, T, V], student logits.
        labels: [B, T], token ids of the answers, IGNORE elsewhere; position t + 1 is predicted at t.
        soft_targets: [B, T, V], assistant logits; None returns the cross-entropy alone.
        weight: weight of the KL divergence, λ.
        temperature: T of both distributions in the KL.

    Raises:
        ValueError: the shapes differ; cut both vocabularies to the shared ids first.
    """
    if soft_targets is not None and soft_targets.shape != logits.shape:
        raise ValueError(f"soft targets {tuple(soft_targets.shape)} do not match logits {tuple(logits.shape)}")
    answer = labels[:, 1:] != IGNORE
    hard = F.cross_entropy(_upcast(logits[:, :-1][answer]), labels[:, 1:][answer], reduction="sum")
    hard = hard / answer.sum().clamp(min=1)
    if soft_targets is None:
        return TaskLoss(hard, hard, torch.zeros_like(hard))
    soft = kl_divergence(_upcast(logits.flatten(0, 1)), _upcast(soft_targets.flatten(0, 1)), temperature).mean()
    return TaskLoss((1 - weight) * hard + weight * soft, hard, soft)


def label_divergence(
    scores: torch.Tensor, log_q: torch.Tensor, temperature: float, divergence: Divergence
) -> torch.Tensor:
    """Compute D(q^(1/T), softmax(scores / T)) [M], both normalized over the K labels; differentiable w.r.t. the scores.

    Args:
        scores: [M, K], log-probabilities of the labels to the student, up to a constant of each row.
        log_q: [M, K], log-probabilities of the labels to the teacher; -inf is a probability of zero.
    """
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (scores, log_q))
    return divergence.of_events(log_p, log_q)[0]


def kl_divergence(logits: torch.Tensor, target_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Compute KL(softmax(target / T) || softmax(logits / T)) [N] in nats, from logits [N, V] and [N, V]."""
    log_p = torch.log_softmax(logits / temperature, -1)
    log_q = torch.log_softmax(target_logits / temperature, -1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def _upcast(logits: torch.Tensor) -> torch.Tensor:
    """Cast logits to at least float32: half precision is too coarse for sums over a vocabulary."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
