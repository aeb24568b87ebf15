"""The student's loss from hidden states: cross-entropy and divergence, computed for a chunk of positions at a time.

The plain formula (losses.py) holds several [N, V] tensors, 0.6 MB per position and tensor for Qwen2.5-VL. Here the
logits of one chunk use two preallocated buffers; loss and gradient are computed in the same pass, and the backward pass
only multiplies by the incoming gradient.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from distill.training.divergences import FORWARD_KL, Divergence, Softmaxes, of_logits, softmax

CPU_ELEMENTS, CUDA_ELEMENTS = 2**26, 2**27
"""Elements of one logits buffer: 256 and 512 MiB in float32. Each chunk reads the whole head, so few are faster."""
CACHED_ELEMENTS = 2**21
"""Elements of a block that a CPU processes while they are in its cache, to save memory traffic."""


class HiddenTargets(NamedTuple):
    """Soft targets as the assistant's last hidden states [..., D'], its output head [V', D'], and its logits' cap."""

    hidden: torch.Tensor
    head: torch.Tensor
    cap: float | None = None


class TopKTargets(NamedTuple):
    """Soft targets as the assistant's k most likely tokens, at the temperature of the loss and not renormalized.

    Attributes:
        log_q: [..., k], log-probabilities of the tokens, normalized over the vocabulary.
        ids: [..., k], ids of the tokens, distinct within a position.
        log_rest: [...], log of the total probability of all other tokens; -inf if it is zero.
    """

    log_q: torch.Tensor
    ids: torch.Tensor
    log_rest: torch.Tensor


SoftTargets = HiddenTargets | TopKTargets


class AnswerLoss(NamedTuple):
    """Loss of the answer tokens.

    Attributes:
        total: scalar to minimize.
        hard: [...], cross-entropy of each position, without gradient.
        soft: [...], divergence of each position, without gradient; 0 without soft targets.
    """

    total: torch.Tensor
    hard: torch.Tensor
    soft: torch.Tensor


def answer_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    tokens: torch.Tensor,
    loss_weights: torch.Tensor,
    soft_targets: SoftTargets | None = None,
    weight: float = 0.3,
    temperature: float = 2.0,
    divergence: Divergence = FORWARD_KL,
    chunk: int | None = None,
    cap: float | None = None,
    positions: torch.Tensor | None = None,
) -> AnswerLoss:
    """Compute Σ_n w_n ((1 - weight) CE_n + weight D(softmax(z_a / T), softmax(z_s / T))_n), without a T² factor.

    With `TopKTargets`, the divergence D is taken over k + 1 events: the k tokens, and all other tokens together. It is
    a lower bound of the full one. Matrix products with a head use the dtype of that head (or of autocast); everything
    else is computed in float32 or higher.

    Args:
        hidden: [..., D], last hidden states of the student at the positions that predict an answer token.
        head: [V, D], output head of the student, without bias; receives a gradient only if it requires one. If V
            differs from the assistant's V', both terms use the first min(V, V') ids. `TopKTargets` do not contain V':
            slice the head before the call.
        tokens: [...], id of the token that each position predicts.
        loss_weights: [...], weight w_n of each position; they need not sum to 1.
        soft_targets: distribution of the assistant; None computes the cross-entropy alone, with weight 1.
        weight: weight of the divergence, λ.
        temperature: T of both distributions in the divergence; the cross-entropy is at temperature 1.
        divergence: D; by default KL(assistant || student).
        chunk: number of positions whose logits are held at a time; None chooses it from V (256 MiB per buffer, 512 MiB
            on a GPU).
        positions: [...], tokens with the same number have the same hidden state and soft targets, as in a token tree;
            their logits are computed once. None: all are different.
        cap: c of a student whose logits are c · tanh(z / c) (Gemma 2, arXiv 2408.00118); None: they are not capped.

    Raises:
        ValueError: shapes do not match, or the chunk is below 1.
    """
    _check_shapes(hidden, head, tokens, loss_weights, soft_targets)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1 position")
    if isinstance(soft_targets, HiddenTargets):
        soft_targets = soft_targets._replace(hidden=soft_targets.hidden.flatten(0, -2))
    elif soft_targets is not None:
        log_q, ids, log_rest = soft_targets
        soft_targets = TopKTargets(log_q.flatten(0, -2), ids.flatten(0, -2).long(), log_rest.flatten())
    else:
        weight, temperature = 0.0, 1.0
    order, first, rows, ends = _distinct(
        torch.arange(tokens.numel(), device=tokens.device) if positions is None else positions.flatten()
    )
    if isinstance(soft_targets, HiddenTargets):
        soft_targets = soft_targets._replace(hidden=soft_targets.hidden[first])
    elif soft_targets is not None:
        soft_targets = _select(soft_targets, first)
    total, *losses = _AnswerLoss.apply(
        hidden.flatten(0, -2)[first], head, tokens.flatten()[order], loss_weights.flatten()[order], rows, ends,
        soft_targets, weight, temperature, divergence, chunk, torch.is_grad_enabled(), cap,
    )  # fmt: skip
    hard, soft = (torch.empty_like(loss).index_copy(0, order, loss).view(tokens.shape) for loss in losses)
    return AnswerLoss(total, hard, soft)


def _check_shapes(
    hidden: torch.Tensor,
    head: torch.Tensor,
    tokens: torch.Tensor,
    loss_weights: torch.Tensor,
    soft_targets: SoftTargets | None,
) -> None:
    positions = tuple(hidden.shape[:-1])
    matches = {
        "head": positions != () and head.dim() == 2 and head.shape[1] == hidden.shape[-1],
        "tokens": tokens.shape == positions,
        "loss_weights": loss_weights.shape == positions,
    }
    if isinstance(soft_targets, HiddenTargets):
        other, other_head, _ = soft_targets
        matches["soft_targets.hidden"] = other.shape[:-1] == positions
        matches["soft_targets.head"] = other_head.dim() == 2 and other_head.shape[1] == other.shape[-1]
    elif soft_targets is not None:
        log_q, ids, log_rest = soft_targets
        matches["soft_targets.log_q or log_rest"] = log_q.shape[:-1] == log_rest.shape == positions
        matches["soft_targets.ids"] = ids.shape == log_q.shape and 1 <= ids.shape[-1] <= len(head)
    for name, match in matches.items():
        if not match:
            raise ValueError(f"the shape of {name} does not match hidden states of shape {tuple(hidden.shape)}")


def _distinct(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """Group N tokens by their positions, of which U are distinct.

    Returns:
        The order [N] that sorts the tokens by position; the first token [U] of each position; the index [N] below U of
        each sorted token's position; and the end of each position's tokens in this order.
    """
    _, rows, counts = positions.unique(return_inverse=True, return_counts=True)
    order = rows.argsort(stable=True)
    ends = counts.cumsum(0)
    return order, order[ends - counts], rows[order], ends.tolist()


class _AnswerLoss(torch.autograd.Function):
    """The loss of N tokens from U hidden states; `rows` [N] is sorted, and `ends` has the end of each row's tokens."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, tokens: torch.Tensor, loss_weights: torch.Tensor,
        rows: torch.Tensor, ends: list[int], soft_targets: SoftTargets | None, weight: float, temperature: float,
        divergence: Divergence, chunk: int | None, grad_enabled: bool, cap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        matrix, soft_targets = _align_heads(head, soft_targets)
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        states, loss_weights = hidden.to(matrix.dtype), loss_weights.to(dtype)
        begins = [0, *ends]
        row_weights = torch.segment_reduce(loss_weights, "sum", offsets=rows.new_tensor(begins))
        shares = torch.where(loss_weights == 0, 0, loss_weights / row_weights[rows])
        hidden_grad, head_grad = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        any_grad = hidden_grad or head_grad
        grad_hidden = hidden.new_empty(hidden.shape, dtype=dtype) if hidden_grad else None
        grad_head = head.new_zeros(head.shape, dtype=dtype) if head_grad else None
        hard, soft = (hidden.new_empty(len(tokens), dtype=dtype) for _ in range(2))

        size, block = _chunk_sizes(len(hidden), len(matrix), chunk, hidden.is_cuda)
        hidden_targets, top_k_targets = (isinstance(soft_targets, kind) for kind in (HiddenTargets, TopKTargets))
        logits = [hidden.new_empty(size, len(matrix), dtype=dtype) for _ in range(1 + hidden_targets)]
        buffers = [torch.empty_like(logits[0][:block]) for _ in range(1 + top_k_targets)]
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _slices(len(hidden), size):
                z = _add_product(logits[0][: len(states[part])], states[part], matrix.T, 0, 1 / temperature)
                targets = _select(soft_targets, part)
                if isinstance(soft_targets, HiddenTargets):
                    targets = _add_product(
                        logits[1][: len(z)], soft_targets.hidden[part], soft_targets.head.T, 0, 1 / temperature
                    )
                    _cap(targets, soft_targets.cap, temperature)
                for piece in _slices(len(z), block):
                    first, last = part.start + piece.start, part.start + piece.stop
                    at = slice(begins[first], begins[last])
                    slope = _cap(z[piece], cap, temperature)
                    hard[at], soft[at] = _block_loss(
                        z[piece], _select(targets, piece), (rows[at] - first, tokens[at]), shares[at], buffers, weight,
                        temperature, divergence, any_grad,
                    )  # fmt: skip
                    if slope is not None:
                        z[piece] *= slope
                grad_logits = z.to(matrix.dtype) if any_grad else z
                if grad_hidden is not None:
                    _add_product(grad_hidden[part], grad_logits, matrix, 0)
                if grad_head is not None:
                    weighted = (states[part] * row_weights[part, None]).to(matrix.dtype)
                    _add_product(grad_head[: len(matrix)], grad_logits.T, weighted, 1)
        if grad_hidden is not None:
            grad_hidden *= row_weights[:, None]
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.dtypes = hidden.dtype, head.dtype
        ctx.mark_non_differentiable(hard, soft)
        return (loss_weights * torch.lerp(hard, soft, weight)).sum(), hard, soft

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = [
            None if tensor is None else (tensor * grad).to(dtype)
            for tensor, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *grads, *[None] * 11


def _cap(z: torch.Tensor, cap: float | None, temperature: float) -> torch.Tensor | None:
    """Replace logits / T [n, V] by capped ones, and return the derivative of the cap [n, V]; None without a cap."""
    if cap is None:
        return None
    limit = cap / temperature
    tanh = z.div_(limit).tanh_()
    slope = 1 - tanh.square()
    z.mul_(limit)
    return slope


def _block_loss(
    z: torch.Tensor, targets: torch.Tensor | TopKTargets | None, tokens: tuple[torch.Tensor, torch.Tensor],
    shares: torch.Tensor, buffers: list[torch.Tensor], weight: float, temperature: float, divergence: Divergence,
    needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Compute cross-entropy [m] and divergence [m] of m tokens from logits / T [n, V]; overwrites z with its gradient.

    The gradient is that of the mean over the tokens of a row, weighted by their shares [m], which sum to 1. `tokens`
    are their rows [m] and ids [m]. Targets are the assistant's logits / T [n, V], which are overwritten, or its top-k
    tokens. Softmax at temperature 1 is the normalized T-th power of softmax at T, so that the exponentials are computed
    only once.
    """
    rows, _ = tokens
    token_logits = temperature * z[tokens]
    first, *others = (buffer[: len(z)] for buffer in buffers)
    gradient, value = None, z.new_zeros(len(z))
    if targets is None:
        log_sum, p = softmax(z, first), first
    elif isinstance(targets, TopKTargets):
        log_sum, value, p, gradient = _top_k_divergence(divergence, z, targets, first, *others)
    else:
        log_sum, value, p, gradient = of_logits(divergence, z, targets, first)
    peak = p.amax(-1)  # powers of p / peak, because powers of a nearly uniform p would underflow
    powers = torch.mul(p, 1 / peak[:, None], out=z).pow_(temperature)
    sums = powers.sum(-1)
    hard = (temperature * (log_sum + peak.log()) + sums.log())[rows] - token_logits
    if needs_grad:
        z.mul_((1 - weight) / sums[:, None])
        z.index_put_(tokens, (weight - 1) * shares, accumulate=True)
        if gradient is not None:
            z.add_(gradient, alpha=weight / temperature)
    return hard, value[rows]


def _top_k_divergence(
    divergence: Divergence, z: torch.Tensor, targets: TopKTargets, p: torch.Tensor, gradient: torch.Tensor
) -> Softmaxes:
    """Compute the divergence over the k tokens and the rest as one event; overwrites z.

    The gradient of the rest is divided among its tokens as their probability. A softmax over them alone gives their
    mass without the cancellation in 1 - Σ p_k, and the shares without a division.
    """
    top_logits = z.gather(1, targets.ids)
    log_sum_rest = softmax(z.scatter_(1, targets.ids, torch.finfo(z.dtype).min), p)
    log_sum = torch.logaddexp(log_sum_rest, top_logits.logsumexp(-1))
    log_p = torch.cat([top_logits, log_sum_rest[:, None]], 1) - log_sum[:, None]
    log_q = torch.cat([targets.log_q, targets.log_rest[:, None]], 1).to(z.dtype)
    value, event_gradients = divergence.of_events(log_p, log_q)
    events = log_p.exp()
    torch.mul(p, event_gradients[:, -1:], out=gradient).scatter_(1, targets.ids, event_gradients[:, :-1])
    p.mul_(events[:, -1:]).scatter_(1, targets.ids, events[:, :-1])
    return Softmaxes(log_sum, value, p, gradient)


def _add_product(
    out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, beta: float, alpha: float = 1.0
) -> torch.Tensor:
    """out = beta · out + alpha · left @ right; half precision accumulates in float32 if the device supports it."""
    if left.dtype == out.dtype:
        return out.addmm_(left, right, beta=beta, alpha=alpha)
    if not (left.is_cuda and left.dtype.itemsize == 2 and out.dtype == torch.float32):
        product = torch.mm(left, right)
    elif beta:
        product = torch.mm(left, right, out_dtype=out.dtype)
    else:
        product = torch.mm(left, right, out_dtype=out.dtype, out=out)
    return out.add_(product, alpha=alpha) if beta else torch.mul(product, alpha, out=out)


def _align_heads(head: torch.Tensor, soft_targets: SoftTargets | None) -> tuple[torch.Tensor, SoftTargets | None]:
    """Cast both heads for their matrix products, cut them to the shared ids, and cast the assistant's states."""
    head = _autocast_head(head)
    if isinstance(soft_targets, HiddenTargets):
        other = _autocast_head(soft_targets.head)[: len(head)]
        return head[: len(other)], soft_targets._replace(hidden=soft_targets.hidden.to(other.dtype), head=other)
    return head, soft_targets


def _autocast_head(head: torch.Tensor) -> torch.Tensor:
    device = head.device.type
    if torch.is_autocast_enabled(device) and head.dtype != torch.float64:
        return head.to(torch.get_autocast_dtype(device))
    return head


def _chunk_sizes(positions: int, vocabulary: int, chunk: int | None, cuda: bool) -> tuple[int, int]:
    """Return the positions of a chunk, and those of a block within it that fits into a CPU's cache."""
    size = min(chunk or max((CUDA_ELEMENTS if cuda else CPU_ELEMENTS) // vocabulary, 1), max(positions, 1))
    return size, size if cuda else min(size, max(CACHED_ELEMENTS // vocabulary, torch.get_num_threads()))


def _select(targets: Any, rows: slice | torch.Tensor) -> Any:
    """Return the given positions of logits or top-k targets; None for other targets."""
    if isinstance(targets, TopKTargets):
        return TopKTargets(*(tensor[rows] for tensor in targets))
    return targets[rows] if isinstance(targets, torch.Tensor) else None


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
