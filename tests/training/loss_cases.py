"""Random cases for the tests of the fused loss, and the plain formula with all logits at once."""

import math
from typing import Any

import torch
import torch.nn.functional as F

from distill.models.backbone import capped
from distill.training.divergences import Divergence
from distill.training.fused_loss import AnswerLoss, HiddenTargets, TopKTargets, answer_loss

N, D, E, V = 13, 5, 4, 29


class Case:
    """Random hidden states and heads of student and assistant, whose logits differ by a few nats."""

    def __init__(self, seed: int = 0, vocabulary: int = V, assistant_vocabulary: int = V, positions: int = N) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.hidden, self.head = self.normal(positions, D), self.normal(vocabulary, D)
        self.targets = HiddenTargets(self.normal(positions, E), self.normal(assistant_vocabulary, E))
        self.tokens = torch.randint(0, min(vocabulary, assistant_vocabulary), (positions,), generator=self.generator)
        self.loss_weights = torch.rand(positions, generator=self.generator, dtype=torch.float64)

    def normal(self, *shape: int) -> torch.Tensor:
        return 1.5 * torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def require_grad(self) -> "Case":
        self.hidden.requires_grad_()
        self.head.requires_grad_()
        return self

    def loss(self, soft: HiddenTargets | TopKTargets | None = None, **options: Any) -> AnswerLoss:
        return answer_loss(self.hidden, self.head, self.tokens, self.loss_weights, soft, **options)

    def gradients(self, total: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(total, (self.hidden, self.head))


def reference_loss(
    case: Case, soft: HiddenTargets | None, weight: float = 0.3, t: float = 2.0, cap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return total, cross-entropy and KL from all logits at once, with torch's own losses and autograd."""
    shared = min(len(case.head), len(soft.head)) if soft else len(case.head)
    logits = capped(case.hidden @ case.head.T, cap)[:, :shared]
    hard = F.cross_entropy(logits, case.tokens, reduction="none")
    if soft is None:
        return (case.loss_weights * hard).sum(), hard, torch.zeros_like(hard)
    log_q = F.log_softmax(capped(soft.hidden @ soft.head.T, soft.cap)[:, :shared] / t, -1)
    divergence = F.kl_div(F.log_softmax(logits / t, -1), log_q, reduction="none", log_target=True).sum(-1)
    return (case.loss_weights * ((1 - weight) * hard + weight * divergence)).sum(), hard, divergence


def top_k_of(logits: torch.Tensor, k: int, t: float = 2.0) -> TopKTargets:
    """Return the k most likely tokens of logits [N, V] and the log of the mass of all others."""
    log_p = F.log_softmax(logits / t, -1)
    top = log_p.topk(k, -1)
    return TopKTargets(top.values, top.indices, log_p.scatter(-1, top.indices, -math.inf).logsumexp(-1))


def assert_all_close(
    found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], tolerance: float = 1e-12
) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=0)


def student_logits(case: Case) -> torch.Tensor:
    return (case.hidden @ case.head.T).detach()


def plain_divergence(divergence: Divergence, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Return the textbook formula [n] on log-probabilities [n, K] of student p and assistant q."""

    def kl(one: torch.Tensor, log_one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (one * (log_one - other.log())).sum(-1)

    p, q, alpha, beta = log_p.exp(), log_q.exp(), divergence.skew, divergence.beta
    match divergence.name:
        case "forward_kl":
            return kl(q, log_q, p)
        case "reverse_kl":
            return kl(p, log_p, q)
        case "jsd":
            m = beta * q + (1 - beta) * p
            return beta * kl(q, log_q, m) + (1 - beta) * kl(p, log_p, m)
        case "skew_kl":
            return kl(q, log_q, alpha * q + (1 - alpha) * p)
        case "skew_reverse_kl":
            return kl(p, log_p, (1 - alpha) * q + alpha * p)
        case _:
            return (p - q).abs().sum(-1) / 2
