"""The loss from hidden states against plain formulas with whole logits: values, gradients, memory, and hard cases."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from distill.models.backbone import IGNORE
from distill.training.fused_loss import AnswerLoss, HiddenTargets, TopKTargets, answer_loss

N, D, E, V = 13, 5, 4, 29
QWEN = 151_936


class Case:
    """Random states and heads of student and assistant, whose logits are a few nats apart."""

    def __init__(self, seed: int = 0, vocabulary: int = V, others: int = V, positions: int = N) -> None:
        self.g = torch.Generator().manual_seed(seed)
        self.hidden, self.head = self.normal(positions, D), self.normal(vocabulary, D)
        self.targets = HiddenTargets(self.normal(positions, E), self.normal(others, E))
        self.tokens = torch.randint(0, min(vocabulary, others), (positions,), generator=self.g)
        self.shares = torch.rand(positions, generator=self.g, dtype=torch.float64)

    def normal(self, *shape: int) -> torch.Tensor:
        return 1.5 * torch.randn(*shape, generator=self.g, dtype=torch.float64)

    def trained(self) -> "Case":
        self.hidden.requires_grad_()
        self.head.requires_grad_()
        return self

    def loss(self, soft: HiddenTargets | TopKTargets | None = None, **options: Any) -> AnswerLoss:
        return answer_loss(self.hidden, self.head, self.tokens, self.shares, soft, **options)

    def gradients(self, total: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(total, (self.hidden, self.head))


def plain(
    case: Case, soft: HiddenTargets | None, weight: float = 0.3, t: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Total, cross-entropy and KL with all logits at once, through torch's own losses and autograd."""
    shared = min(len(case.head), len(soft.head)) if soft else len(case.head)
    logits = (case.hidden @ case.head.T)[:, :shared]
    hard = F.cross_entropy(logits, case.tokens, reduction="none")
    if soft is None:
        return (case.shares * hard).sum(), hard, torch.zeros_like(hard)
    log_q = F.log_softmax((soft.hidden @ soft.head.T)[:, :shared] / t, -1)
    divergence = F.kl_div(F.log_softmax(logits / t, -1), log_q, reduction="none", log_target=True).sum(-1)
    return (case.shares * ((1 - weight) * hard + weight * divergence)).sum(), hard, divergence


def likeliest(logits: torch.Tensor, k: int, t: float = 2.0) -> TopKTargets:
    """The k likeliest tokens of [N, V] logits and the log of the mass of the others."""
    log_p = F.log_softmax(logits / t, -1)
    top = log_p.topk(k, -1)
    return TopKTargets(top.values, top.indices, log_p.scatter(-1, top.indices, -math.inf).logsumexp(-1))


def same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], within: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=within, rtol=0)


# ---- values and gradients ----


@pytest.mark.parametrize(("vocabulary", "others"), [(V, V), (V, V + 6), (V + 6, V)])
@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 2.0), (0.0, 2.0), (1.0, 1.0), (0.5, 3.7), (0.5, 0.5)])
def test_value_and_gradients_are_those_of_the_plain_formula(
    vocabulary: int, others: int, weight: float, temperature: float
) -> None:
    """Also where the vocabularies are padded to different sizes: both terms are over the ids that they share."""
    case = Case(1, vocabulary, others).trained()
    expected = plain(case, case.targets, weight, temperature)
    found = case.loss(case.targets, weight=weight, temperature=temperature, chunk=4)
    same(tuple(found), expected)
    same(case.gradients(found.total), case.gradients(expected[0]))
    assert not found.hard.requires_grad and not found.soft.requires_grad


def test_without_soft_targets_the_cross_entropy_is_left() -> None:
    case = Case(2).trained()
    expected, found = plain(case, None), case.loss(weight=0.9, temperature=7.0)
    same(tuple(found), expected)
    same(case.gradients(found.total), case.gradients(expected[0]))
    assert not found.soft.any()


@pytest.mark.parametrize("k", [None, 1, 6, V])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
def test_gradients_are_those_of_finite_differences(k: int | None, temperature: float) -> None:
    case = Case(3, positions=4).trained()
    logits = case.targets.hidden @ case.targets.head.T
    soft = likeliest(logits, k, temperature) if k else case.targets

    def total(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return answer_loss(hidden, head, case.tokens, case.shares, soft, 0.4, temperature, chunk=3).total

    assert torch.autograd.gradcheck(total, (case.hidden, case.head))


def test_a_model_and_itself_have_no_divergence_and_no_gradient() -> None:
    case = Case(4).trained()
    for soft in (HiddenTargets(case.hidden.detach(), case.head.detach()), likeliest(logits_of(case), 5)):
        loss = case.loss(soft, weight=1.0)
        assert float(loss.soft.abs().max()) < 1e-12
        assert max(float(gradient.abs().max()) for gradient in case.gradients(loss.total)) < 1e-12


def logits_of(case: Case) -> torch.Tensor:
    return (case.hidden @ case.head.T).detach()


def test_the_incoming_gradient_multiplies_and_a_second_backward_gives_the_same() -> None:
    case = Case(5).trained()
    total = case.loss(case.targets).total
    once = torch.autograd.grad(total, (case.hidden, case.head), retain_graph=True)
    thrice = torch.autograd.grad(3 * total, (case.hidden, case.head), retain_graph=True)
    same(thrice, tuple(3 * gradient for gradient in once))
    same(case.gradients(total), once, 0)


def test_with_a_mean_over_samples_as_shares_it_is_the_loss_of_response_positions() -> None:
    case = Case(23, positions=21).trained()
    hidden, targets = case.hidden.unflatten(0, (3, 7)), case.targets.hidden.unflatten(0, (3, 7))
    labels = torch.randint(0, V, (3, 7), generator=case.g)
    labels[0, :2] = labels[1, :5] = labels[2, 4:] = IGNORE
    z, a = hidden @ case.head.T, targets @ case.targets.head.T
    rows = []
    for b in range(3):
        at = (labels[b, 1:] != IGNORE).nonzero()[:, 0]
        hard = F.cross_entropy(z[b, at], labels[b, at + 1])
        rows.append((hard, F.kl_div((z[b, at] / 2).log_softmax(-1), (a[b, at] / 2).softmax(-1), reduction="batchmean")))
    expected = sum(0.7 * hard + 0.3 * soft for hard, soft in rows) / 3
    answer = labels[:, 1:] != IGNORE
    shares = (1 / (3 * answer.sum(1, keepdim=True).double())).expand_as(answer)[answer]
    soft = HiddenTargets(targets[:, :-1][answer], case.targets.head)
    found = answer_loss(hidden[:, :-1][answer], case.head, labels[:, 1:][answer], shares, soft)
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close((shares * found.soft).sum(), sum(soft.detach() for _, soft in rows) / 3)
    same(case.gradients(found.total), case.gradients(expected))


# ---- what it must not depend on ----


@pytest.mark.parametrize("chunk", [1, 2, 7, N, 1000])
def test_the_chunk_size_does_not_matter(chunk: int) -> None:
    case = Case(6).trained()
    for soft in (None, case.targets, likeliest(case.targets.hidden @ case.targets.head.T, 4)):
        whole, parts = case.loss(soft), case.loss(soft, chunk=chunk)
        same(tuple(parts), tuple(whole))
        same(case.gradients(parts.total), case.gradients(whole.total))


def test_positions_in_a_grid_are_those_in_a_row() -> None:
    case = Case(7, positions=12).trained()
    logits = case.targets.hidden @ case.targets.head.T
    for soft in (case.targets, likeliest(logits, 4)):
        row = case.loss(soft, chunk=5)
        hidden = case.hidden.detach().view(3, 4, D).requires_grad_()
        folded = type(soft)(*(x if len(x) != 12 else x.unflatten(0, (3, 4)) for x in soft))
        grid = answer_loss(hidden, case.head, case.tokens.view(3, 4), case.shares.view(3, 4), folded, chunk=5)
        assert grid.hard.shape == grid.soft.shape == (3, 4)
        same((grid.total, grid.hard.flatten(), grid.soft.flatten()), tuple(row), 0)
        found = torch.autograd.grad(grid.total, (hidden, case.head))
        same((found[0].flatten(0, 1), found[1]), case.gradients(row.total), 0)


def test_accumulated_parts_are_the_whole() -> None:
    case = Case(8).trained()
    expected = case.gradients(case.loss(case.targets).total)
    for rows in (slice(0, 1), slice(1, 9), slice(9, N)):
        targets = HiddenTargets(case.targets.hidden[rows], case.targets.head)
        answer_loss(case.hidden[rows], case.head, case.tokens[rows], case.shares[rows], targets).total.backward()
    assert case.hidden.grad is not None and case.head.grad is not None
    same((case.hidden.grad, case.head.grad), expected)


def test_the_same_call_gives_the_same_bits() -> None:
    case = Case(9).trained()
    first, second = (case.loss(case.targets, chunk=4) for _ in range(2))
    same((*second, *case.gradients(second.total)), (*first, *case.gradients(first.total)), 0)


# ---- which weights learn ----


def test_a_frozen_head_gets_no_gradient_and_the_assistant_never_does() -> None:
    case = Case(10).trained()
    expected = case.gradients(case.loss(case.targets).total)
    case.head.requires_grad_(False)
    targets = HiddenTargets(*(x.clone().requires_grad_() for x in case.targets))
    case.loss(targets).total.backward()
    assert case.head.grad is None and targets.hidden.grad is None and targets.head.grad is None
    same((case.hidden.grad,), expected[:1])  # type: ignore[arg-type]
    case.hidden.requires_grad_(False)
    case.head.requires_grad_()
    same(torch.autograd.grad(case.loss(case.targets).total, case.head), expected[1:])


def test_a_head_tied_to_the_embedding_gets_both_gradients() -> None:
    case = Case(11).trained()

    def states() -> torch.Tensor:
        return torch.tanh(case.head[case.tokens] + case.hidden)

    tied = Case(11)
    tied.hidden, tied.head = states(), case.head
    expected = case.gradients(plain(tied, case.targets)[0])
    tied.hidden = states()
    same(case.gradients(tied.loss(case.targets).total), expected)


def test_where_no_gradient_is_wanted_only_the_value_is_computed() -> None:
    case = Case(12)
    assert not case.loss(case.targets).total.requires_grad
    expected = case.trained().loss(case.targets)
    with torch.no_grad(), Products() as products:
        found = case.loss(case.targets)
    assert not found.total.requires_grad and products.count == 2  # the logits of both, no gradient
    same(tuple(found), tuple(expected))


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_")
        return func(*args, **(kwargs or {}))


# ---- top-k ----


def test_all_tokens_as_top_k_are_the_full_divergence() -> None:
    case = Case(13).trained()
    full = case.loss(case.targets)
    every = case.loss(likeliest(case.targets.hidden @ case.targets.head.T, V))
    same(tuple(every), tuple(full))
    same(case.gradients(every.total), case.gradients(full.total))


def test_the_coarse_divergence_against_a_loop_and_never_above_the_full_one() -> None:
    case = Case(14)
    logits, full = case.targets.hidden @ case.targets.head.T, case.loss(case.targets).soft
    last = torch.zeros(N, dtype=torch.float64)
    for k in (1, 3, 10, 28, V):
        targets = likeliest(logits, k)
        found = case.loss(targets).soft
        for n in range(N):
            p = [math.exp(z) for z in (logits_of(case)[n] / 2).tolist()]
            p = [value / sum(p) for value in p]
            ids, q = targets.ids[n].tolist(), targets.log_q[n].exp().tolist()
            rest = sum(value for v, value in enumerate(p) if v not in ids)
            expected = sum(q_i * math.log(q_i / p[i]) for i, q_i in zip(ids, q, strict=True))
            if k < V:
                expected += (1 - sum(q)) * math.log((1 - sum(q)) / rest)
            assert float(found[n]) == pytest.approx(expected, abs=1e-10)
        assert (found <= full + 1e-12).all() and (found >= last - 1e-12).all()  # finer events tell more
        last = found


def test_agreement_within_the_top_k_does_not_hide_what_lies_outside() -> None:
    """Renormalised within the top 2, both are (1/2, 1/2) and the KL is 0; the student holds nearly all elsewhere."""
    student = torch.tensor([[0.0, 0.0, 9.0, 0.0]], dtype=torch.float64)
    assistant = torch.tensor([[9.0, 9.0, 0.0, 0.0]], dtype=torch.float64)
    eye, one = torch.eye(4, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    token = torch.tensor([0])
    coarse = answer_loss(student, eye, token, one, likeliest(assistant, 2, 1.0), 1.0, 1.0)
    full = answer_loss(student, eye, token, one, HiddenTargets(assistant, eye), 1.0, 1.0)
    assert float(full.soft) > 8
    assert float(full.soft) >= float(coarse.soft) > 8


def test_nothing_left_for_the_rest_and_a_rest_that_underflows_are_exact() -> None:
    eye, one, token = torch.eye(4), torch.ones(1), torch.tensor([0])
    student = torch.tensor([[400.0, 399.0, 0.0, 1.0]], requires_grad=True)  # exp(-399) is 0 in float32
    top = torch.tensor([[0, 1]])
    nothing = TopKTargets(torch.tensor([[0.5, 0.5]]).log(), top, torch.tensor([-math.inf]))
    p = torch.softmax(student[0, :2].detach(), 0)
    loss = answer_loss(student, eye, token, one, nothing, 1.0, 1.0)
    assert float(loss.soft) == pytest.approx(float(math.log(0.5) - p.log().mean()), abs=1e-5)
    (gradient,) = torch.autograd.grad(loss.total, student)
    torch.testing.assert_close(gradient, torch.tensor([[p[0] - 0.5, p[1] - 0.5, 0.0, 0.0]]))

    some = TopKTargets(torch.tensor([[0.4, 0.4]]).log(), top, torch.tensor([0.2]).log())
    loss = answer_loss(student, eye, token, one, some, 1.0, 1.0)
    among = torch.softmax(student[0, 2:].detach(), 0)  # the rest lacks 0.2, shared as the student shares it
    (gradient,) = torch.autograd.grad(loss.total, student)
    torch.testing.assert_close(gradient, torch.cat([p - 0.4, -0.2 * among])[None])
    log_rest = float(torch.logsumexp(student[0, 2:].detach(), 0) - torch.logsumexp(student[0].detach(), 0))
    expected = 0.8 * math.log(0.4) - 0.4 * float(p.log().sum()) + 0.2 * (math.log(0.2) - log_rest)
    assert float(loss.soft) == pytest.approx(expected, rel=1e-5)


def test_cached_log_probabilities_in_half_precision_and_32_bit_ids_will_do() -> None:
    case = Case(15)
    targets = likeliest(case.targets.hidden @ case.targets.head.T, 6)
    cached = TopKTargets(targets.log_q.half(), targets.ids.int(), targets.log_rest.half())
    torch.testing.assert_close(case.loss(cached).soft, case.loss(targets).soft, atol=1e-2, rtol=0)


# ---- precision and size ----


def single(seed: int, dtype: torch.dtype, positions: int = 6, vocabulary: int = QWEN) -> Case:
    case = Case(seed, vocabulary, vocabulary, positions)
    case.hidden, case.head = case.hidden.to(dtype), case.head.to(dtype)
    case.targets = HiddenTargets(*(x.to(dtype) for x in case.targets))
    case.shares = case.shares.float()
    return case


def exactly(case: Case) -> Case:
    """The same numbers in double precision."""
    exact = Case()
    exact.hidden, exact.head, exact.tokens, exact.shares = (
        case.hidden.double(), case.head.double(), case.tokens, case.shares.double()
    )  # fmt: skip
    exact.targets = HiddenTargets(*(x.double() for x in case.targets))
    return exact


def test_the_vocabulary_of_qwen_in_single_precision() -> None:
    case = single(16, torch.float32)
    exact = exactly(case).trained()
    expected = plain(exact, exact.targets)
    found = case.trained().loss(case.targets, chunk=4)
    same(tuple(x.double() for x in found), expected, 1e-4)
    for one, other in zip(case.gradients(found.total), exact.gradients(expected[0]), strict=True):
        assert float((one - other).abs().max()) < 2e-4 * float(other.abs().max())  # so far is the plain formula, too


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    case = single(17, dtype, vocabulary=1000).trained()
    exact = exactly(case)
    exact.hidden, exact.head = (x.detach().requires_grad_() for x in (exact.hidden, exact.head))
    expected = plain(exact, exact.targets)
    found = case.loss(case.targets, chunk=4)
    assert found.total.dtype == found.hard.dtype == found.soft.dtype == torch.float32
    same(tuple(x.double() for x in found), expected, 0.1)
    for one, other in zip(case.gradients(found.total), exact.gradients(expected[0]), strict=True):
        assert one.dtype == dtype
        assert float((one - other).abs().max()) < 2e-2 * float(other.abs().max())


def test_a_huge_vocabulary_in_bfloat16_is_finite_and_has_no_negative_divergence() -> None:
    case = single(18, torch.bfloat16, positions=3)
    own = HiddenTargets(case.hidden, case.head)
    for soft in (case.targets, own, likeliest(logits_of(case).float(), 8)):
        loss = case.loss(soft)
        assert torch.isfinite(loss.total) and torch.isfinite(loss.soft).all() and float(loss.soft.min()) > -1e-5
    assert float(case.loss(own).soft.abs().max()) < 1e-6


def test_a_flat_student_at_a_high_temperature_does_not_underflow() -> None:
    head = torch.zeros(QWEN, D)
    hidden = torch.ones(1, D, requires_grad=True)
    loss = answer_loss(hidden, head, torch.tensor([3]), torch.ones(1), HiddenTargets(torch.ones(1, D), head), 0.3, 20.0)
    assert float(loss.hard) == pytest.approx(math.log(QWEN), abs=1e-4)
    assert torch.isfinite(torch.autograd.grad(loss.total, hidden)[0]).all()


def test_autocast_multiplies_in_bfloat16_and_returns_the_types_it_got() -> None:
    case = single(19, torch.float32, vocabulary=500).trained()
    with torch.autocast("cpu", torch.bfloat16):
        found = case.loss(case.targets, chunk=4)
    halves = single(19, torch.float32, vocabulary=500)
    halves.hidden, halves.head = (x.bfloat16().requires_grad_() for x in (halves.hidden, halves.head))
    expected = halves.loss(HiddenTargets(*(x.bfloat16() for x in halves.targets)), chunk=4)
    same(tuple(found), tuple(expected), 0)
    for one, other in zip(case.gradients(found.total), halves.gradients(expected.total), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.bfloat16(), other, atol=0, rtol=0)


@pytest.mark.parametrize("soft", [True, False])
def test_no_positions_cost_nothing(soft: bool) -> None:
    case = Case(20, positions=0).trained()
    loss = case.loss(case.targets if soft else None)
    assert loss.total == 0 and loss.hard.shape == loss.soft.shape == (0,)
    hidden, head = case.gradients(loss.total)
    assert hidden.shape == (0, D) and head.shape == (V, D) and not head.any()
    empty = TopKTargets(torch.empty(0, 3), torch.empty(0, 3, dtype=torch.long), torch.empty(0))
    assert case.loss(empty).total == 0


class Largest(TorchDispatchMode):
    """Elements of the storages behind all tensors with V columns, by address."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.storages = vocabulary, dict[int, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() == 2 and out.is_contiguous() and out.shape[1] == self.vocabulary:
            storage = out.untyped_storage()
            self.storages[storage.data_ptr()] = storage.nbytes() // out.element_size()
        return out


@pytest.mark.parametrize("positions", [40, 400])
def test_the_logits_of_a_chunk_are_all_that_is_ever_held(positions: int) -> None:
    vocabulary, chunk = 3001, 8
    for kind in ("hard", "hidden", "top-k"):
        case = Case(21, vocabulary, vocabulary, positions).trained()
        top = likeliest(case.targets.hidden @ case.targets.head.T, 5)
        soft = {"hard": None, "hidden": case.targets, "top-k": top}[kind]
        with Largest(vocabulary) as seen:
            case.loss(soft, chunk=chunk).total.backward()
        assert max(seen.storages.values()) == chunk * vocabulary
        assert sum(seen.storages.values()) <= 3 * chunk * vocabulary  # the same buffers for every chunk


# ---- refused ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"head": c.head[:, :-1]}, "head"),
        (lambda c: {"head": c.head[0]}, "head"),
        (lambda c: {"hidden": c.hidden[0]}, "head"),
        (lambda c: {"tokens": c.tokens[:-1]}, "tokens"),
        (lambda c: {"shares": c.shares[:, None]}, "shares"),
        (lambda c: {"soft": HiddenTargets(c.targets.hidden[:-1], c.targets.head)}, "assistant's hidden states"),
        (lambda c: {"soft": HiddenTargets(c.targets.hidden, c.targets.head[:, 1:])}, "assistant's head"),
        (lambda c: {"soft": c.top._replace(ids=c.top.ids[:, 1:])}, "top-k ids"),
        (lambda c: {"soft": c.top._replace(log_rest=c.top.log_rest[1:])}, "log-probabilities"),
        (lambda c: {"soft": c.top, "head": c.head[:2]}, "top-k ids"),
        (lambda c: {"chunk": 0}, "chunk of 0"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, message: str) -> None:
    case = Case(22)
    case.top = likeliest(case.targets.hidden @ case.targets.head.T, 3)  # type: ignore[attr-defined]
    given = {"hidden": case.hidden, "head": case.head, "tokens": case.tokens, "shares": case.shares}
    with pytest.raises(ValueError, match=message):
        answer_loss(**{**given, **change(case)})
