"""The student's loss from hidden states: cross-entropy and KL in chunks of positions, never the logits of all at once.

The plain formula (losses.py) holds several [N, V] tensors: 0.6 MB each for every position of Qwen2.5-VL. Here the
logits of a chunk of positions live in two buffers, loss and gradient leave them in the same pass, and backward only
multiplies by what comes in.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

CPU_ELEMENTS, CUDA_ELEMENTS = 2**24, 2**27
"""Elements of one buffer of logits: 64 and 512 MiB in float32."""
CACHED_ELEMENTS = 2**21
"""Elements that a CPU passes over again and again while they are in its cache; most of what memory costs is saved."""


class HiddenTargets(NamedTuple):
    """Soft targets as the assistant's last hidden states [..., D'] and its output head [V', D']."""

    hidden: torch.Tensor
    head: torch.Tensor


class TopKTargets(NamedTuple):
    """Soft targets as the assistant's k likeliest tokens, at the temperature of the loss and never renormalised.

    log_q [..., k] are their log-probabilities among all tokens, ids [..., k] the tokens, distinct in a position, and
    log_rest [...] the log of what all other tokens hold together, -inf where that is nothing.
    """

    log_q: torch.Tensor
    ids: torch.Tensor
    log_rest: torch.Tensor


SoftAnswers = HiddenTargets | TopKTargets


class AnswerLoss(NamedTuple):
    """`total` is what is minimised, a scalar; `hard` (cross-entropy) and `soft` (KL, 0 without targets) are [...]."""

    total: torch.Tensor
    hard: torch.Tensor
    soft: torch.Tensor


def answer_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    tokens: torch.Tensor,
    shares: torch.Tensor,
    soft: SoftAnswers | None = None,
    weight: float = 0.3,
    temperature: float = 2.0,
    chunk: int | None = None,
) -> AnswerLoss:
    """Σ_n share_n ((1 - weight) CE_n + weight KL(softmax(z_a / T) || softmax(z_s / T))_n), without a T² factor.

    With `TopKTargets` the KL is that of the k tokens and, as one event, all others: never more than the full KL.
    Products with a head are taken in that head's precision (or autocast's), all else in float32 at least.

    Args:
        hidden: [..., D], the student's last hidden states where they predict an answer token.
        head: [V, D], the student's output head, without bias; it gets a gradient only where it requires one. Where V
            differs from the assistant's V', both terms are over the ids they share, the first ones. `TopKTargets` do
            not tell V': cut the head yourself.
        tokens: [...], the token that each position predicts.
        shares: [...], what each position weighs in the sum; they need not sum to 1.
        soft: the assistant's distribution; None leaves the cross-entropy alone, with weight 1.
        temperature: T of both distributions; the cross-entropy is at 1.
        chunk: positions whose logits are held at a time; None chooses by V (64 MiB a buffer, 512 on a GPU).

    Raises:
        ValueError: shapes do not fit each other, or the chunk is below 1.
    """
    _check(hidden, head, tokens, shares, soft)
    if chunk is not None and chunk < 1:
        raise ValueError(f"a chunk of {chunk} positions")
    if isinstance(soft, HiddenTargets):
        soft = HiddenTargets(soft.hidden.flatten(0, -2), soft.head)
    elif soft is not None:
        soft = TopKTargets(soft.log_q.flatten(0, -2), soft.ids.flatten(0, -2).long(), soft.log_rest.flatten())
    else:
        weight, temperature = 0.0, 1.0
    total, hard, divergence = _AnswerLoss.apply(
        hidden.flatten(0, -2), head, tokens.flatten(), shares.flatten(), soft, weight, temperature, chunk,
        torch.is_grad_enabled(),
    )  # fmt: skip
    return AnswerLoss(total, hard.view(tokens.shape), divergence.view(tokens.shape))


def _check(
    hidden: torch.Tensor, head: torch.Tensor, tokens: torch.Tensor, shares: torch.Tensor, soft: SoftAnswers | None
) -> None:
    places = tuple(hidden.shape[:-1])
    fits = {
        "head": places != () and head.dim() == 2 and head.shape[1] == hidden.shape[-1],
        "tokens": tokens.shape == places,
        "shares": shares.shape == places,
    }
    if isinstance(soft, HiddenTargets):
        fits["the assistant's hidden states"] = soft.hidden.shape[:-1] == places
        fits["the assistant's head"] = soft.head.dim() == 2 and soft.head.shape[1] == soft.hidden.shape[-1]
    elif soft is not None:
        fits["log-probabilities"] = soft.log_q.shape[:-1] == soft.log_rest.shape == places
        fits["top-k ids"] = soft.ids.shape == soft.log_q.shape and 1 <= soft.ids.shape[-1] <= len(head)
    for name, well in fits.items():
        if not well:
            raise ValueError(f"the shape of {name} does not fit hidden states {tuple(hidden.shape)}")


class _AnswerLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, tokens: torch.Tensor, shares: torch.Tensor,
        soft: SoftAnswers | None, weight: float, temperature: float, chunk: int | None, gradients: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        matrix, soft = _shared(head, soft)
        exact = torch.promote_types(matrix.dtype, torch.float32)
        states, shares = hidden.to(matrix.dtype), shares.to(exact)
        of_hidden, of_head = (gradients and needed for needed in ctx.needs_input_grad[:2])
        learns = of_hidden or of_head
        grad_hidden = hidden.new_empty(hidden.shape, dtype=exact) if of_hidden else None
        grad_head = head.new_zeros(head.shape, dtype=exact) if of_head else None
        hard, divergence = (hidden.new_empty(len(hidden), dtype=exact) for _ in range(2))

        size, block = _sizes(len(hidden), len(matrix), chunk, hidden.is_cuda)
        logits = [hidden.new_empty(size, len(matrix), dtype=exact) for _ in range(1 + isinstance(soft, HiddenTargets))]
        spare = [torch.empty_like(logits[0][:block]) for _ in range(1 + isinstance(soft, TopKTargets))]
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _slices(len(hidden), size):
                z = _add_product(logits[0][: len(states[rows])], states[rows], matrix.T, 0, 1 / temperature)
                targets = _rows(soft, rows)
                if isinstance(soft, HiddenTargets):
                    targets = _add_product(logits[1][: len(z)], soft.hidden[rows], soft.head.T, 0, 1 / temperature)
                for part in _slices(len(z), block):
                    at = slice(rows.start + part.start, rows.start + part.stop)
                    hard[at], divergence[at] = _loss(
                        z[part], _rows(targets, part), tokens[at], spare, weight, temperature, learns
                    )
                slope = z.to(matrix.dtype) if learns else z
                if grad_hidden is not None:
                    _add_product(grad_hidden[rows], slope, matrix, 0)
                if grad_head is not None:
                    weighed = (states[rows] * shares[rows, None]).to(matrix.dtype)
                    _add_product(grad_head[: len(matrix)], slope.T, weighed, 1)
        if grad_hidden is not None:
            grad_hidden *= shares[:, None]
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.dtypes = hidden.dtype, head.dtype
        ctx.mark_non_differentiable(hard, divergence)
        return (shares * torch.lerp(hard, divergence, weight)).sum(), hard, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        found = [
            None if tensor is None else (tensor * grad).to(dtype)
            for tensor, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *found, None, None, None, None, None, None, None


def _loss(
    z: torch.Tensor, targets: torch.Tensor | TopKTargets | None, tokens: torch.Tensor, spare: list[torch.Tensor],
    weight: float, temperature: float, gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Cross-entropy [n] and KL [n] from logits / T [n, V]; z becomes the gradient of the loss by the logits.

    Targets are the assistant's logits / T [n, V], which are spoilt, or its top-k. Softmax at temperature 1 is the T-th
    power of that at T, normalised: the exponentials are taken once.
    """
    of_token = temperature * z.gather(1, tokens[:, None])[:, 0]
    p, slope, divergence = spare[0][: len(z)], None, torch.zeros_like(of_token)
    if targets is None:
        log_sum = _softmax(z, p)
    elif isinstance(targets, TopKTargets):
        slope = spare[1][: len(z)]
        log_sum, divergence = _top_k_divergence(z, targets, p, slope)
    else:
        p, slope = targets, p
        log_sum, divergence = _divergence(z, p, slope)
    peak = p.amax(-1)  # the powers are taken of p / peak, lest they vanish all
    powers = torch.mul(p, 1 / peak[:, None], out=z).pow_(temperature)
    sums = powers.sum(-1)
    hard = temperature * (log_sum + peak.log()) + sums.log() - of_token
    if gradient:
        z.mul_((1 - weight) / sums[:, None])
        z[torch.arange(len(z), device=z.device), tokens] -= 1 - weight
        if slope is not None:
            z.add_(slope, alpha=weight / temperature)
    return hard, divergence


def _divergence(z: torch.Tensor, a: torch.Tensor, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log Σ exp z and KL(softmax(a) || softmax(z)), [n] each; a becomes p = softmax(z), and slope p - q."""
    q = slope
    log_sum_a = _softmax(a, q)
    ratio = torch.mul(a.sub_(z), q, out=a).sum(-1)
    log_sum = _softmax(z, a)
    torch.sub(a, q, out=slope)
    return log_sum, ratio - log_sum_a + log_sum


def _top_k_divergence(
    z: torch.Tensor, targets: TopKTargets, p: torch.Tensor, slope: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for the k tokens and the rest as one event; p and slope are filled, z is spoilt.

    Softmax over the others alone gives their mass without 1 - Σ p_k, and p_j (1 - q_rest / p_rest) without a quotient.
    """
    of_ids = z.gather(1, targets.ids)
    log_sum_rest = _softmax(z.scatter_(1, targets.ids, torch.finfo(z.dtype).min), p)
    log_sum = torch.logaddexp(log_sum_rest, of_ids.logsumexp(-1))
    log_p = torch.cat([of_ids, log_sum_rest[:, None]], 1) - log_sum[:, None]
    log_q = torch.cat([targets.log_q, targets.log_rest[:, None]], 1).to(z.dtype)
    events, q = log_p.exp(), log_q.exp()
    divergence = (q * (log_q - log_p).masked_fill(q == 0, 0)).sum(-1)
    slopes = events * q.sum(-1, keepdim=True) - q
    torch.mul(p, slopes[:, -1:], out=slope).scatter_(1, targets.ids, slopes[:, :-1])
    p.mul_(events[:, -1:]).scatter_(1, targets.ids, events[:, :-1])
    return log_sum, divergence


def _softmax(z: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """softmax(z) [n, V] into `out`; log Σ exp z [n], from the largest entry of both and without another exponential."""
    torch.softmax(z, -1, out=out)
    return z.amax(-1) - out.amax(-1).log()


def _add_product(
    out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, keep: float, factor: float = 1.0
) -> torch.Tensor:
    """out = keep · out + factor · left @ right; half precision is summed in float32 where the device can."""
    if left.dtype == out.dtype:
        return out.addmm_(left, right, beta=keep, alpha=factor)
    if not (left.is_cuda and left.dtype.itemsize == 2 and out.dtype == torch.float32):
        product = torch.mm(left, right)
    elif keep:
        product = torch.mm(left, right, out_dtype=out.dtype)
    else:
        product = torch.mm(left, right, out_dtype=out.dtype, out=out)
    return out.add_(product, alpha=factor) if keep else torch.mul(product, factor, out=out)


def _shared(head: torch.Tensor, soft: SoftAnswers | None) -> tuple[torch.Tensor, SoftAnswers | None]:
    """Both heads as they are multiplied with, cut to the ids they share; the assistant's states in its head's type."""
    head = _as_multiplied(head)
    if isinstance(soft, HiddenTargets):
        other = _as_multiplied(soft.head)[: len(head)]
        return head[: len(other)], HiddenTargets(soft.hidden.to(other.dtype), other)
    return head, soft


def _as_multiplied(head: torch.Tensor) -> torch.Tensor:
    kind = head.device.type
    if torch.is_autocast_enabled(kind) and head.dtype != torch.float64:
        return head.to(torch.get_autocast_dtype(kind))
    return head


def _sizes(positions: int, vocabulary: int, chunk: int | None, cuda: bool) -> tuple[int, int]:
    """Positions of a chunk, and of a block, over which the CPU's cache goes."""
    size = min(chunk or max((CUDA_ELEMENTS if cuda else CPU_ELEMENTS) // vocabulary, 1), max(positions, 1))
    return size, size if cuda else min(size, max(CACHED_ELEMENTS // vocabulary, torch.get_num_threads()))


def _rows(targets: Any, rows: slice) -> Any:
    """Some positions of logits or of top-k targets."""
    if isinstance(targets, TopKTargets):
        return TopKTargets(*(tensor[rows] for tensor in targets))
    return targets[rows] if isinstance(targets, torch.Tensor) else None


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
