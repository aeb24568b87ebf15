"""Divergences between the assistant's distribution q and the student's p: values, and gradients w.r.t. the logits of p.

All but the total variation are c_q KL(q || m) + c_p KL(p || m) with the mixture m = w q + (1 - w) p:

| name | c_q | c_p | w | source |
| --- | --- | --- | --- | --- |
| forward_kl | 1 | 0 | 0 | MulCoT-RD (arXiv 2508.05234) |
| reverse_kl | 0 | 1 | 1 | MiniLLM (arXiv 2306.08543) |
| jsd | β | 1 - β | β | generalized Jensen-Shannon divergence of GKD (arXiv 2306.13649) |
| skew_kl | 1 | 0 | α | DistiLLM (arXiv 2402.03898) |
| skew_reverse_kl | 0 | 1 | 1 - α | DistiLLM |

The total variation `tv` is Σ |q - p| / 2. The gradient w.r.t. logit j is p_j (g_j - Σ_i p_i g_i), g = ∂D / ∂p.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

DivergenceName = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tv"]

LOWEST = -100.0
"""reverse_kl takes a smaller log-probability of an event for this one, so that it stays finite where q is zero."""


@dataclass(frozen=True)
class Divergence:
    """A divergence with its parameters: β of jsd and α (`skew`) of skew_kl and skew_reverse_kl, both in (0, 1)."""

    name: DivergenceName = "forward_kl"
    beta: float = 0.5
    skew: float = 0.1

    @property
    def mixture(self) -> tuple[float, float, float]:
        """c_q, c_p and w of the table above; not for tv."""
        return {
            "forward_kl": (1.0, 0.0, 0.0),
            "reverse_kl": (0.0, 1.0, 1.0),
            "jsd": (self.beta, 1 - self.beta, self.beta),
            "skew_kl": (1.0, 0.0, self.skew),
            "skew_reverse_kl": (0.0, 1.0, 1 - self.skew),
        }[self.name]

    def of_events(self, log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the divergence [n] over K events and its gradient [n, K] w.r.t. the logits of p.

        Args:
            log_p: [n, K], log-probabilities of the student.
            log_q: [n, K], log-probabilities of the assistant; -inf is a probability of zero.
        """
        p, q = log_p.exp(), log_q.exp()
        if self.name == "tv":
            vector = p * (p - q).sign() / 2
            return (p - q).abs().sum(-1) / 2, vector - p * vector.sum(-1, keepdim=True)
        c_q, c_p, w = self.mixture
        if 0 < w < 1:
            log_m = torch.logaddexp(log_q + math.log(w), log_p + math.log(1 - w))
        else:
            log_m = log_q.clamp(min=LOWEST) if w else log_p
        from_q, from_p = (q * (log_q - log_m)).masked_fill(q == 0, 0), (p * (log_p - log_m)).masked_fill(p == 0, 0)
        value = c_q * from_q.sum(-1) + c_p * from_p.sum(-1)
        vector = c_p * from_p - (1 - w) * (log_p - log_m).exp() * (c_q * q + c_p * p) if w < 1 else from_p
        return value, vector - p * vector.sum(-1, keepdim=True)


FORWARD_KL = Divergence()


class Softmaxes(NamedTuple):
    """The result of `of_logits`.

    Attributes:
        log_sum: [n], log Σ exp z.
        value: [n], the divergence.
        p: [n, V], softmax(z).
        gradient: [n, V], of the divergence w.r.t. z.
    """

    log_sum: torch.Tensor
    value: torch.Tensor
    p: torch.Tensor
    gradient: torch.Tensor


def of_logits(divergence: Divergence, z: torch.Tensor, a: torch.Tensor, buffer: torch.Tensor) -> Softmaxes:
    """Compute D(softmax(a), softmax(z)) from logits [n, V], without further tensors of this size.

    All three [n, V] are overwritten; `p` and `gradient` are `a` and `buffer` in either order.
    """
    if divergence.name == "forward_kl":
        q = buffer
        log_sum_a = softmax(a, q)
        ratio = torch.mul(a.sub_(z), q, out=a).sum(-1)
        log_sum = softmax(z, a)
        return Softmaxes(log_sum, ratio - log_sum_a + log_sum, a, torch.sub(a, q, out=q))
    if divergence.name == "reverse_kl":
        log_sum_a = softmax(a, buffer)
        torch.sub(z, a, out=a)
        log_sum = softmax(z, buffer)
        vector = a.mul_(buffer)
        mean = vector.sum(-1)
        vector.addcmul_(buffer, mean[:, None], value=-1)
        return Softmaxes(log_sum, mean - log_sum + log_sum_a, buffer, vector)
    q, p, name = buffer, a, divergence.name
    log_sum_a = softmax(a, q)
    mean_log_q = a.mul_(q).sum(-1) - log_sum_a if name == "jsd" else torch.zeros_like(log_sum_a)
    log_sum = softmax(z, p)
    if name == "tv":
        difference = torch.sub(p, q, out=q)
        value = torch.linalg.vector_norm(difference, 1, -1) / 2
        vector = difference.sign_().mul_(p).mul_(0.5)
    else:
        value, vector = _from_mixture(divergence, z, p, q, mean_log_q, log_sum)
    return Softmaxes(log_sum, value, p, vector.addcmul_(p, vector.sum(-1, keepdim=True), value=-1))


def _from_mixture(
    divergence: Divergence, z: torch.Tensor, p: torch.Tensor, q: torch.Tensor, mean_log_q: torch.Tensor,
    log_sum: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return a divergence with 0 < w < 1 [n] and p · g [n, V] up to a multiple of p, in q; overwrites z.

    Args:
        mean_log_q: [n], Σ q log q, for jsd.
        log_sum: [n], log Σ exp z.
    """
    c_q, c_p, w = divergence.mixture
    tiny = torch.finfo(p.dtype).tiny  # for 0 / m and 0 log 0, where p and q underflow
    if c_p == 0:
        m = torch.lerp(p, q, w, out=z).add_(tiny)
        log_ratio = torch.div(q, m, out=m).clamp_(min=tiny).log_()
        value = torch.mul(q, log_ratio, out=q).sum(-1)
        return value, torch.mul(log_ratio.exp_(), p, out=q).mul_(w - 1)
    if c_q == 0:
        m = torch.lerp(p, q, w, out=q).add_(tiny)
        ratio = torch.div(p, m, out=z).clamp_(min=tiny)
        vector = torch.log(ratio, out=m).mul_(p)
        value = vector.sum(-1)
        return value, vector.addcmul_(p, ratio, value=w - 1)
    mean_log_p = z.mul_(p).sum(-1) - log_sum
    m = torch.lerp(p, q, w, out=q).add_(tiny)
    log_m = torch.log(m, out=z)
    value = c_q * mean_log_q + c_p * mean_log_p - m.mul_(log_m).sum(-1)
    return value, torch.clamp(p, min=tiny, out=m).log_().sub_(log_m).mul_(p).mul_(c_p)


def softmax(z: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write softmax(z) [n, V] to `out` and return log Σ exp z [n].

    The log-sum is derived from the largest logit and the largest probability, without computing exponentials again.
    """
    torch.softmax(z, -1, out=out)
    return z.amax(-1) - out.amax(-1).log()
