"""The fused loss in single and half precision, with large vocabularies, and its memory."""

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill.training.fused_loss import HiddenTargets, TopKTargets, answer_loss
from tests.training.loss_cases import Case, D, V, assert_all_close, reference_loss, student_logits, top_k_of

QWEN = 151_936


def case_in(seed: int, dtype: torch.dtype, positions: int = 6, vocabulary: int = QWEN) -> Case:
    case = Case(seed, vocabulary, vocabulary, positions)
    case.hidden, case.head = case.hidden.to(dtype), case.head.to(dtype)
    case.targets = HiddenTargets(*(x.to(dtype) for x in case.targets[:2]))
    case.loss_weights = case.loss_weights.float()
    return case


def in_double_precision(case: Case) -> Case:
    """Return the same numbers in double precision."""
    exact = Case()
    exact.hidden, exact.head, exact.tokens, exact.loss_weights = (
        case.hidden.double(), case.head.double(), case.tokens, case.loss_weights.double()
    )  # fmt: skip
    exact.targets = HiddenTargets(*(x.double() for x in case.targets[:2]))
    return exact


def test_the_vocabulary_of_qwen_in_single_precision() -> None:
    case = case_in(16, torch.float32)
    exact = in_double_precision(case).require_grad()
    expected = reference_loss(exact, exact.targets)
    found = case.require_grad().loss(case.targets, chunk=4)
    assert_all_close(tuple(x.double() for x in found), expected, 1e-4)
    for one, other in zip(case.gradients(found.total), exact.gradients(expected[0]), strict=True):
        assert float((one - other).abs().max()) < 2e-4 * float(other.abs().max())  # as the plain formula


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    case = case_in(17, dtype, vocabulary=1000).require_grad()
    exact = in_double_precision(case)
    exact.hidden, exact.head = (x.detach().requires_grad_() for x in (exact.hidden, exact.head))
    expected = reference_loss(exact, exact.targets)
    found = case.loss(case.targets, chunk=4)
    assert found.total.dtype == found.hard.dtype == found.soft.dtype == torch.float32
    assert_all_close(tuple(x.double() for x in found), expected, 0.1)
    for one, other in zip(case.gradients(found.total), exact.gradients(expected[0]), strict=True):
        assert one.dtype == dtype
        assert float((one - other).abs().max()) < 2e-2 * float(other.abs().max())


def test_a_large_vocabulary_in_bfloat16_is_finite_without_negative_divergence() -> None:
    case = case_in(18, torch.bfloat16, positions=3)
    own = HiddenTargets(case.hidden, case.head)
    for soft in (case.targets, own, top_k_of(student_logits(case).float(), 8)):
        loss = case.loss(soft)
        assert torch.isfinite(loss.total) and torch.isfinite(loss.soft).all() and float(loss.soft.min()) > -1e-5
    assert float(case.loss(own).soft.abs().max()) < 1e-6


def test_a_uniform_student_at_a_high_temperature_does_not_underflow() -> None:
    head = torch.zeros(QWEN, D)
    hidden = torch.ones(1, D, requires_grad=True)
    loss = answer_loss(hidden, head, torch.tensor([3]), torch.ones(1), HiddenTargets(torch.ones(1, D), head), 0.3, 20.0)
    assert float(loss.hard) == pytest.approx(math.log(QWEN), abs=1e-4)
    assert torch.isfinite(torch.autograd.grad(loss.total, hidden)[0]).all()


def test_autocast_multiplies_in_bfloat16_and_keeps_the_dtypes_of_gradients() -> None:
    case = case_in(19, torch.float32, vocabulary=500).require_grad()
    with torch.autocast("cpu", torch.bfloat16):
        found = case.loss(case.targets, chunk=4)
    halves = case_in(19, torch.float32, vocabulary=500)
    halves.hidden, halves.head = (x.bfloat16().requires_grad_() for x in (halves.hidden, halves.head))
    expected = halves.loss(HiddenTargets(*(x.bfloat16() for x in halves.targets[:2])), chunk=4)
    assert_all_close(tuple(found), tuple(expected), 0)
    for one, other in zip(case.gradients(found.total), halves.gradients(expected.total), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.bfloat16(), other, atol=0, rtol=0)


@pytest.mark.parametrize("soft", [True, False])
def test_zero_positions_have_zero_loss(soft: bool) -> None:
    case = Case(20, positions=0).require_grad()
    loss = case.loss(case.targets if soft else None)
    assert loss.total == 0 and loss.hard.shape == loss.soft.shape == (0,)
    hidden, head = case.gradients(loss.total)
    assert hidden.shape == (0, D) and head.shape == (V, D) and not head.any()
    empty = TopKTargets(torch.empty(0, 3), torch.empty(0, 3, dtype=torch.long), torch.empty(0))
    assert case.loss(empty).total == 0


class LogitsStorages(TorchDispatchMode):
    """Records the number of elements of the storage behind each tensor with V columns, by address."""

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
def test_only_the_logits_of_one_chunk_are_held(positions: int) -> None:
    vocabulary, chunk = 3001, 8
    for kind in ("hard", "hidden", "top-k"):
        case = Case(21, vocabulary, vocabulary, positions).require_grad()
        top = top_k_of(case.targets.hidden @ case.targets.head.T, 5)
        soft = {"hard": None, "hidden": case.targets, "top-k": top}[kind]
        with LogitsStorages(vocabulary) as recorded:
            case.loss(soft, chunk=chunk).total.backward()
        assert max(recorded.storages.values()) == chunk * vocabulary
        assert sum(recorded.storages.values()) <= 3 * chunk * vocabulary  # the same buffers for every chunk
