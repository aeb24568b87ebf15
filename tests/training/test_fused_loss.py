"""The fused loss against the plain formula: values, gradients, independence of chunks, invalid arguments."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from distill.models.backbone import IGNORE
from distill.training.fused_loss import HiddenTargets, answer_loss
from tests.training.loss_cases import Case, D, N, V, assert_all_close, reference_loss, student_logits, top_k_of

# ---- values and gradients ----


@pytest.mark.parametrize(("vocabulary", "assistant_vocabulary"), [(V, V), (V, V + 6), (V + 6, V)])
@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 2.0), (0.0, 2.0), (1.0, 1.0), (0.5, 3.7), (0.5, 0.5)])
def test_value_and_gradients_equal_the_plain_formula(
    vocabulary: int, assistant_vocabulary: int, weight: float, temperature: float
) -> None:
    """Also if the vocabularies are padded to different sizes: both terms use the shared ids."""
    case = Case(1, vocabulary, assistant_vocabulary).require_grad()
    expected = reference_loss(case, case.targets, weight, temperature)
    found = case.loss(case.targets, weight=weight, temperature=temperature, chunk=4)
    assert_all_close(tuple(found), expected)
    assert_all_close(case.gradients(found.total), case.gradients(expected[0]))
    assert not found.hard.requires_grad and not found.soft.requires_grad


@pytest.mark.parametrize(("cap", "assistants"), [(4.0, None), (None, 4.0), (4.0, 7.0)])
@pytest.mark.parametrize("chunk", [4, None])
def test_capped_logits_of_student_or_assistant(cap: float | None, assistants: float | None, chunk: int | None) -> None:
    case = Case(1).require_grad()
    targets = case.targets._replace(cap=assistants)
    expected = reference_loss(case, targets, 0.4, 1.7, cap)
    found = case.loss(targets, weight=0.4, temperature=1.7, chunk=chunk, cap=cap)
    assert_all_close(tuple(found), expected)
    assert_all_close(case.gradients(found.total), case.gradients(expected[0]))
    hard = case.loss(cap=cap)
    assert_all_close(tuple(hard), reference_loss(case, None, cap=cap))
    assert_all_close(case.gradients(hard.total), case.gradients(reference_loss(case, None, cap=cap)[0]))


def test_without_soft_targets_the_loss_is_the_cross_entropy() -> None:
    case = Case(2).require_grad()
    expected, found = reference_loss(case, None), case.loss(weight=0.9, temperature=7.0)
    assert_all_close(tuple(found), expected)
    assert_all_close(case.gradients(found.total), case.gradients(expected[0]))
    assert not found.soft.any()


@pytest.mark.parametrize("targets", ["none", "full", "top-k"])
@pytest.mark.parametrize("chunk", [1, 3, None])
def test_tokens_of_the_same_position_share_its_logits(targets: str, chunk: int | None) -> None:
    """As the first tokens of all labels do; some of them are the same token, and some have no weight."""
    case = Case(6).require_grad()
    positions = torch.tensor([7, 2, 7, 9, 2, 7, 0])  # of hidden states 0 to 3, in the order of the positions
    rows = torch.tensor([2, 1, 2, 3, 1, 2, 0])
    tokens, weights = torch.tensor([3, 5, 3, 8, 1, 0, 2]), torch.tensor([0.3, 0.0, 0.2, 0.5, 0.0, 0.1, 1.0])
    soft: Any = case.targets._replace(hidden=case.targets.hidden[rows])
    if targets == "top-k":
        soft = top_k_of((case.targets.hidden @ case.targets.head.T)[rows], 4, 2.0)
    options: dict[str, Any] = {"weight": 0.4, "chunk": chunk, "soft_targets": None if targets == "none" else soft}
    expected = answer_loss(case.hidden[rows], case.head, tokens, weights, **options)
    found = answer_loss(case.hidden[rows], case.head, tokens, weights, **options, positions=positions)
    assert_all_close(tuple(found), tuple(expected))
    assert_all_close(case.gradients(found.total), case.gradients(expected.total))


@pytest.mark.parametrize("k", [None, 1, 6, V])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
def test_gradients_match_finite_differences(k: int | None, temperature: float) -> None:
    case = Case(3, positions=4).require_grad()
    logits = case.targets.hidden @ case.targets.head.T
    soft = top_k_of(logits, k, temperature) if k else case.targets

    def total(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return answer_loss(hidden, head, case.tokens, case.loss_weights, soft, 0.4, temperature, chunk=3).total

    assert torch.autograd.gradcheck(total, (case.hidden, case.head))


def test_the_divergence_of_a_model_from_itself_and_its_gradient_are_zero() -> None:
    case = Case(4).require_grad()
    for soft in (HiddenTargets(case.hidden.detach(), case.head.detach()), top_k_of(student_logits(case), 5)):
        loss = case.loss(soft, weight=1.0)
        assert float(loss.soft.abs().max()) < 1e-12
        assert max(float(gradient.abs().max()) for gradient in case.gradients(loss.total)) < 1e-12


def test_the_incoming_gradient_is_a_factor_and_backward_can_be_repeated() -> None:
    case = Case(5).require_grad()
    total = case.loss(case.targets).total
    once = torch.autograd.grad(total, (case.hidden, case.head), retain_graph=True)
    thrice = torch.autograd.grad(3 * total, (case.hidden, case.head), retain_graph=True)
    assert_all_close(thrice, tuple(3 * gradient for gradient in once))
    assert_all_close(case.gradients(total), once, 0)


def test_with_equal_weight_per_sample_the_loss_is_the_mean_over_samples() -> None:
    case = Case(23, positions=21).require_grad()
    hidden, targets = case.hidden.unflatten(0, (3, 7)), case.targets.hidden.unflatten(0, (3, 7))
    labels = torch.randint(0, V, (3, 7), generator=case.generator)
    labels[0, :2] = labels[1, :5] = labels[2, 4:] = IGNORE
    z, a = hidden @ case.head.T, targets @ case.targets.head.T
    rows = []
    for b in range(3):
        at = (labels[b, 1:] != IGNORE).nonzero()[:, 0]
        hard = F.cross_entropy(z[b, at], labels[b, at + 1])
        rows.append((hard, F.kl_div((z[b, at] / 2).log_softmax(-1), (a[b, at] / 2).softmax(-1), reduction="batchmean")))
    expected = sum(0.7 * hard + 0.3 * soft for hard, soft in rows) / 3
    answer = labels[:, 1:] != IGNORE
    loss_weights = (1 / (3 * answer.sum(1, keepdim=True).double())).expand_as(answer)[answer]
    soft = HiddenTargets(targets[:, :-1][answer], case.targets.head)
    found = answer_loss(hidden[:, :-1][answer], case.head, labels[:, 1:][answer], loss_weights, soft)
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close((loss_weights * found.soft).sum(), sum(soft.detach() for _, soft in rows) / 3)
    assert_all_close(case.gradients(found.total), case.gradients(expected))


# ---- independence of chunks and layout ----


@pytest.mark.parametrize("chunk", [1, 2, 7, N, 1000])
def test_the_chunk_size_does_not_matter(chunk: int) -> None:
    case = Case(6).require_grad()
    for soft in (None, case.targets, top_k_of(case.targets.hidden @ case.targets.head.T, 4)):
        whole, parts = case.loss(soft), case.loss(soft, chunk=chunk)
        assert_all_close(tuple(parts), tuple(whole))
        assert_all_close(case.gradients(parts.total), case.gradients(whole.total))


def test_positions_may_have_several_dimensions() -> None:
    case = Case(7, positions=12).require_grad()
    logits = case.targets.hidden @ case.targets.head.T
    for soft in (case.targets, top_k_of(logits, 4)):
        row = case.loss(soft, chunk=5)
        hidden = case.hidden.detach().view(3, 4, D).requires_grad_()
        folded = type(soft)(*(x if x is None or len(x) != 12 else x.unflatten(0, (3, 4)) for x in soft))
        grid = answer_loss(hidden, case.head, case.tokens.view(3, 4), case.loss_weights.view(3, 4), folded, chunk=5)
        assert grid.hard.shape == grid.soft.shape == (3, 4)
        assert_all_close((grid.total, grid.hard.flatten(), grid.soft.flatten()), tuple(row), 0)
        found = torch.autograd.grad(grid.total, (hidden, case.head))
        assert_all_close((found[0].flatten(0, 1), found[1]), case.gradients(row.total), 0)


def test_gradients_of_parts_add_up() -> None:
    case = Case(8).require_grad()
    expected = case.gradients(case.loss(case.targets).total)
    for rows in (slice(0, 1), slice(1, 9), slice(9, N)):
        targets = HiddenTargets(case.targets.hidden[rows], case.targets.head)
        answer_loss(case.hidden[rows], case.head, case.tokens[rows], case.loss_weights[rows], targets).total.backward()
    assert case.hidden.grad is not None and case.head.grad is not None
    assert_all_close((case.hidden.grad, case.head.grad), expected)


def test_repeated_calls_are_bitwise_equal() -> None:
    case = Case(9).require_grad()
    first, second = (case.loss(case.targets, chunk=4) for _ in range(2))
    assert_all_close((*second, *case.gradients(second.total)), (*first, *case.gradients(first.total)), 0)


# ---- which tensors receive a gradient ----


def test_a_frozen_head_and_the_assistant_receive_no_gradient() -> None:
    case = Case(10).require_grad()
    expected = case.gradients(case.loss(case.targets).total)
    case.head.requires_grad_(False)
    targets = HiddenTargets(*(x.clone().requires_grad_() for x in case.targets[:2]))
    case.loss(targets).total.backward()
    assert case.head.grad is None and targets.hidden.grad is None and targets.head.grad is None
    assert_all_close((case.hidden.grad,), expected[:1])  # type: ignore[arg-type]
    case.hidden.requires_grad_(False)
    case.head.requires_grad_()
    assert_all_close(torch.autograd.grad(case.loss(case.targets).total, case.head), expected[1:])


def test_a_head_tied_to_the_embedding_receives_both_gradients() -> None:
    case = Case(11).require_grad()

    def states() -> torch.Tensor:
        return torch.tanh(case.head[case.tokens] + case.hidden)

    tied = Case(11)
    tied.hidden, tied.head = states(), case.head
    expected = case.gradients(reference_loss(tied, case.targets)[0])
    tied.hidden = states()
    assert_all_close(case.gradients(tied.loss(case.targets).total), expected)


def test_without_gradients_only_the_value_is_computed() -> None:
    case = Case(12)
    assert not case.loss(case.targets).total.requires_grad
    expected = case.require_grad().loss(case.targets)
    with torch.no_grad(), MatrixProducts() as products:
        found = case.loss(case.targets)
    assert not found.total.requires_grad and products.count == 2  # the logits of both, no gradient
    assert_all_close(tuple(found), tuple(expected))


class MatrixProducts(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_")
        return func(*args, **(kwargs or {}))


# ---- invalid arguments ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"head": c.head[:, :-1]}, "head"),
        (lambda c: {"head": c.head[0]}, "head"),
        (lambda c: {"hidden": c.hidden[0]}, "head"),
        (lambda c: {"tokens": c.tokens[:-1]}, "tokens"),
        (lambda c: {"loss_weights": c.loss_weights[:, None]}, "loss_weights"),
        (lambda c: {"soft_targets": HiddenTargets(c.targets.hidden[:-1], c.targets.head)}, "soft_targets.hidden"),
        (lambda c: {"soft_targets": HiddenTargets(c.targets.hidden, c.targets.head[:, 1:])}, "soft_targets.head"),
        (lambda c: {"soft_targets": c.top._replace(ids=c.top.ids[:, 1:])}, "soft_targets.ids"),
        (lambda c: {"soft_targets": c.top._replace(log_rest=c.top.log_rest[1:])}, "soft_targets.log_q or log_rest"),
        (lambda c: {"soft_targets": c.top, "head": c.head[:2]}, "soft_targets.ids"),
        (lambda c: {"chunk": 0}, "chunk is 0"),
    ],
)
def test_shapes_that_do_not_match_are_rejected(change: Any, message: str) -> None:
    case = Case(22)
    case.top = top_k_of(case.targets.hidden @ case.targets.head.T, 3)  # type: ignore[attr-defined]
    given = {"hidden": case.hidden, "head": case.head, "tokens": case.tokens, "loss_weights": case.loss_weights}
    with pytest.raises(ValueError, match=message):
        answer_loss(**{**given, **change(case)})
