"""The losses of MulCoT-RD (arXiv 2508.05234) and of labels on a scale, as pure functions over tensors."""

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


def task_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    soft_targets: torch.Tensor | None = None,
    weight: float = 0.3,
    temperature: float = 2.0,
    positions: Positions = "response",
) -> TaskLoss:
    """L_k = (1 - weight) CE_k + weight KL(softmax(z_a / T) || softmax(z_s / T)), without a T² factor.

    Args:
        logits: [B, T, V] of the student. They may be the last positions of a longer sequence, as `labels` must be then.
        labels: [B, T] token ids of the answers, IGNORE elsewhere; position t + 1 is predicted at t.
        soft_targets: [B, T, V] logits of the assistant; None leaves the cross-entropy alone.
        positions: *response* takes both terms at the positions that predict an answer token, averaged over a sample
            and then over samples, so that accumulated gradients equal those of the large batch. *all* reproduces the
            published code: cross-entropy averaged over the answer tokens of the batch, KL over every position,
            padding and prompt included, on unshifted logits.

    Raises:
        ValueError: the vocabularies differ (cut both to the ids they share first).
    """
    if soft_targets is not None and soft_targets.shape != logits.shape:
        raise ValueError(f"soft targets {tuple(soft_targets.shape)} do not fit logits {tuple(logits.shape)}")
    answer = labels[:, 1:] != IGNORE
    token_logits = _exact(logits[:, :-1][answer])
    share = _shares(answer, positions, token_logits.dtype)
    hard = (F.cross_entropy(token_logits, labels[:, 1:][answer], reduction="none") * share).sum()
    if soft_targets is None:
        return TaskLoss(hard, hard, torch.zeros_like(hard))
    if positions == "all":
        soft = kl_divergence(_exact(logits.flatten(0, 1)), _exact(soft_targets.flatten(0, 1)), temperature).mean()
    else:
        soft = (kl_divergence(token_logits, _exact(soft_targets[:, :-1][answer]), temperature) * share).sum()
    return TaskLoss((1 - weight) * hard + weight * soft, hard, soft)


def label_loss(log_probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy against targets over whole labels (U-ACS, arXiv 2509.04459): the mean over B of -Σ_k q_k log P_k.

    Args:
        log_probabilities: [B, K], log P of each label and its end token. They need not sum to 1: what other answers
            hold is lost by all labels alike.
        targets: [B, K], rows sum to 1.

    Raises:
        ValueError: the shapes differ.
    """
    if log_probabilities.shape != targets.shape:
        raise ValueError(f"targets {tuple(targets.shape)} do not fit labels {tuple(log_probabilities.shape)}")
    log_probabilities = _exact(log_probabilities)
    return -(targets.to(log_probabilities) * log_probabilities).sum(-1).mean()


def kl_divergence(logits: torch.Tensor, target_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(softmax(target / T) || softmax(logits / T)) of N positions, [N, V] and [N, V] to [N], in nats."""
    log_p = torch.log_softmax(logits / temperature, -1)
    log_q = torch.log_softmax(target_logits / temperature, -1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def _exact(logits: torch.Tensor) -> torch.Tensor:
    """Logits in float32 at least: half precision is too coarse for sums over a vocabulary."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _shares(answer: torch.Tensor, positions: Positions, dtype: torch.dtype) -> torch.Tensor:
    """What each answer token of a [B, T] mask weighs in the mean; [N], sums to 1 where every sample has an answer."""
    lengths = answer.sum(1).to(dtype)
    if positions == "all":
        return (1 / lengths.sum().clamp(min=1)).expand(int(answer.sum()))
    return (1 / (lengths.clamp(min=1) * len(answer)))[:, None].expand_as(answer)[answer]
