"""The published loss against plain implementations of its formula, in double precision and in bfloat16."""

import math

import pytest
import torch
import torch.nn.functional as F

from distill.models.backbone import IGNORE
from distill.training.losses import kl_divergence, published_loss

B, T, V = 3, 11, 17


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return student and assistant logits [B, T, V], and labels [B, T] with answers of very different lengths."""
    g = torch.Generator().manual_seed(seed)
    student, assistant = (3 * torch.randn(B, T, V, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, V, (B, T), generator=g)
    labels[0, :2] = labels[1, :8] = labels[2, :5] = IGNORE
    labels[1, 9:] = labels[2, 10:] = IGNORE  # padding on the right
    return student.to(dtype), assistant.to(dtype), labels


def published(student: torch.Tensor, assistant: torch.Tensor, labels: torch.Tensor, weight: float, t: float) -> float:
    """The loss of the MulCoT-RD code: transformers' shifted token mean, and the KL over all padded positions."""
    shifted, targets = student[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1)
    hard = F.cross_entropy(shifted, targets, ignore_index=-100, reduction="mean")
    soft = F.kl_div(
        F.log_softmax(student / t, dim=-1).reshape(-1, V), F.softmax(assistant / t, dim=-1).reshape(-1, V),
        reduction="batchmean",
    )  # fmt: skip
    return float((1 - weight) * hard + weight * soft)


@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 2.0), (0.5, 1.0), (0.0, 2.0), (1.0, 4.0)])
def test_the_loss_equals_the_published_formula(weight: float, temperature: float) -> None:
    for seed in range(4):
        student, assistant, labels = batch(seed, torch.float32)
        loss = published_loss(student, labels, assistant, weight, temperature)
        expected = published(student, assistant, labels, weight, temperature)
        assert float(loss.total) == pytest.approx(expected, abs=1e-5)


def test_without_soft_targets_the_loss_is_the_cross_entropy() -> None:
    student, assistant, labels = batch(2)
    loss = published_loss(student, labels)
    assert loss.total == loss.hard == published_loss(student, labels, assistant).hard
    assert float(loss.soft) == 0


def test_the_weight_divides_the_loss_between_hard_and_soft() -> None:
    student, assistant, labels = batch(3)
    for weight in (0.0, 0.3, 1.0):
        loss = published_loss(student, labels, assistant, weight)
        torch.testing.assert_close(loss.total, (1 - weight) * loss.hard + weight * loss.soft)
    constant = torch.zeros(B, T, V)  # every token costs ln V
    assert float(published_loss(constant, labels).hard) == pytest.approx(math.log(V), abs=1e-6)


def test_the_divergence_of_a_model_from_itself_and_its_gradient_are_zero() -> None:
    student, _, labels = batch(4)
    student.requires_grad_()
    loss = published_loss(student, labels, student.detach(), 1.0)
    assert abs(float(loss.soft.detach())) < 1e-12
    (gradient,) = torch.autograd.grad(loss.total, student)
    assert float(gradient.abs().max()) < 1e-12


def test_the_direction_of_the_divergence() -> None:
    """KL(a || s) is large if the student gives little probability to likely tokens of the assistant, not vice versa."""
    broad, narrow = torch.zeros(1, 4), torch.tensor([[20.0, 0.0, 0.0, 0.0]])
    assert float(kl_divergence(narrow, broad, 1.0)) > 10
    assert float(kl_divergence(broad, narrow, 1.0)) == pytest.approx(math.log(4), abs=1e-4)


def test_padding_enters_the_divergence_but_not_the_cross_entropy() -> None:
    student, assistant, labels = batch(5)
    expected = published_loss(student, labels, assistant)
    changed = student.clone()
    changed[0, 0] = changed[1, 9:] = changed[2, -1] = 9.0 * torch.arange(V)  # prompt and padding
    found = published_loss(changed, labels, assistant)
    assert found.hard == expected.hard and abs(float(found.soft - expected.soft)) > 0.1


def test_gradients_match_finite_differences() -> None:
    student, assistant, labels = batch(7)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: published_loss(z, labels, assistant).total, student)


def test_half_precision_logits_are_summed_in_float32() -> None:
    student, assistant, labels = batch(8, torch.bfloat16)
    loss = published_loss(student, labels, assistant)
    exact = published_loss(student.double(), labels, assistant.double())
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.total.double(), exact.total, atol=1e-5, rtol=0)


def test_different_vocabularies_are_rejected() -> None:
    student, assistant, labels = batch()
    with pytest.raises(ValueError, match="do not match"):
        published_loss(student, labels, assistant[..., :-1])
