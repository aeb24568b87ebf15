"""The losses against plain implementations of the published formulas, in double precision and in bfloat16."""

import math

import pytest
import torch
import torch.nn.functional as F

from distill.models.backbone import IGNORE
from distill.task.labels import Scale
from distill.training.losses import kl_divergence, label_loss, task_loss

B, T, V = 3, 11, 17


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student and assistant logits [B, T, V], and labels [B, T] of answers of very different lengths."""
    g = torch.Generator().manual_seed(seed)
    student, assistant = (3 * torch.randn(B, T, V, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, V, (B, T), generator=g)
    labels[0, :2] = labels[1, :8] = labels[2, :5] = IGNORE
    labels[1, 9:] = labels[2, 10:] = IGNORE  # padding on the right
    return student.to(dtype), assistant.to(dtype), labels


def published(student: torch.Tensor, assistant: torch.Tensor, labels: torch.Tensor, weight: float, t: float) -> float:
    """MulCoT-RD's loss as its code has it: transformers' shifted token mean, and a KL over the whole padded grid."""
    shifted, targets = student[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1)
    hard = F.cross_entropy(shifted, targets, ignore_index=-100, reduction="mean")
    soft = F.kl_div(
        F.log_softmax(student / t, dim=-1).reshape(-1, V), F.softmax(assistant / t, dim=-1).reshape(-1, V),
        reduction="batchmean",
    )  # fmt: skip
    return float((1 - weight) * hard + weight * soft)


@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 2.0), (0.5, 1.0), (0.0, 2.0), (1.0, 4.0)])
def test_all_positions_is_the_published_formula(weight: float, temperature: float) -> None:
    for seed in range(4):
        student, assistant, labels = batch(seed, torch.float32)
        loss = task_loss(student, labels, assistant, weight, temperature, "all")
        expected = published(student, assistant, labels, weight, temperature)
        assert float(loss.total) == pytest.approx(expected, abs=1e-5)


def by_hand(student: torch.Tensor, assistant: torch.Tensor, labels: torch.Tensor, t: float) -> tuple[float, float]:
    """Cross-entropy and KL of `response`, one number at a time."""
    hard = soft = 0.0
    for b in range(B):
        answer = [i for i in range(1, T) if labels[b, i] != IGNORE]
        for i in answer:
            z, a = student[b, i - 1].tolist(), assistant[b, i - 1].tolist()
            hard -= log_softmax(z, 1.0)[int(labels[b, i])] / len(answer) / B
            p, q = log_softmax(z, t), log_softmax(a, t)
            soft += sum(math.exp(q_v) * (q_v - p_v) for p_v, q_v in zip(p, q, strict=True)) / len(answer) / B
    return hard, soft


def log_softmax(logits: list[float], t: float) -> list[float]:
    total = math.log(sum(math.exp(z / t) for z in logits))
    return [z / t - total for z in logits]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_response_positions_against_a_loop(temperature: float) -> None:
    student, assistant, labels = batch(1)
    hard, soft = by_hand(student, assistant, labels, temperature)
    loss = task_loss(student, labels, assistant, 0.3, temperature, "response")
    assert float(loss.hard) == pytest.approx(hard, abs=1e-10)
    assert float(loss.soft) == pytest.approx(soft, abs=1e-10)
    assert float(loss.total) == pytest.approx(0.7 * hard + 0.3 * soft, abs=1e-10)


def test_without_soft_targets_only_the_cross_entropy_is_left() -> None:
    student, assistant, labels = batch(2)
    loss = task_loss(student, labels)
    assert loss.total == loss.hard == task_loss(student, labels, assistant).hard
    assert float(loss.soft) == 0


def test_the_shares_of_hard_and_soft_sum_to_one() -> None:
    student, assistant, labels = batch(3)
    for positions in ("response", "all"):
        for weight in (0.0, 0.3, 1.0):
            loss = task_loss(student, labels, assistant, weight, 2.0, positions)
            torch.testing.assert_close(loss.total, (1 - weight) * loss.hard + weight * loss.soft)
    constant = torch.zeros(B, T, V)  # every token costs ln V, so the weights of the tokens must sum to one
    for positions in ("response", "all"):
        assert float(task_loss(constant, labels, positions=positions).hard) == pytest.approx(math.log(V), abs=1e-6)


def test_the_divergence_of_a_model_from_itself_is_zero_and_its_gradient_too() -> None:
    student, _, labels = batch(4)
    student.requires_grad_()
    for positions in ("response", "all"):
        loss = task_loss(student, labels, student.detach(), 1.0, 2.0, positions)
        assert abs(float(loss.soft.detach())) < 1e-12
        (gradient,) = torch.autograd.grad(loss.total, student)
        assert float(gradient.abs().max()) < 1e-12


def test_the_divergence_runs_from_the_assistant_to_the_student() -> None:
    """KL(a || s) punishes a student that gives nothing to what the assistant thinks likely, not the reverse."""
    broad, narrow = torch.zeros(1, 4), torch.tensor([[20.0, 0.0, 0.0, 0.0]])
    assert float(kl_divergence(narrow, broad, 1.0)) > 10
    assert float(kl_divergence(broad, narrow, 1.0)) == pytest.approx(math.log(4), abs=1e-4)


def test_where_nothing_is_predicted_nothing_counts() -> None:
    student, assistant, labels = batch(5)
    expected = task_loss(student, labels, assistant)
    changed = student.clone()
    changed[0, 0] = changed[1, 9:] = changed[2, -1] = 1e4  # prompt, padding, the last position
    found = task_loss(changed, labels, assistant)
    assert found == expected
    cut = task_loss(student[:, 1:], labels[:, 1:], assistant[:, 1:])  # the last positions of a longer sequence
    torch.testing.assert_close(cut.total, expected.total)


def test_accumulated_gradients_equal_those_of_the_large_batch() -> None:
    """Samples with answers of 9, 1 and 5 tokens: a mean over a batch's tokens would weigh them differently."""
    student, assistant, labels = batch(6)
    whole = student.clone().requires_grad_()
    task_loss(whole, labels, assistant).total.backward()
    parts = student.clone().requires_grad_()
    for b in range(B):
        row = slice(b, b + 1)
        (task_loss(parts[row], labels[row], assistant[row]).total / B).backward()
    torch.testing.assert_close(parts.grad, whole.grad, atol=1e-12, rtol=0)


def test_gradients_are_those_of_finite_differences() -> None:
    student, assistant, labels = batch(7)
    student.requires_grad_()
    for positions in ("response", "all"):
        assert torch.autograd.gradcheck(
            lambda z, p=positions: task_loss(z, labels, assistant, 0.3, 2.0, p).total, student
        )
        (gradient,) = torch.autograd.grad(task_loss(student, labels, assistant, 0.3, 2.0, positions).total, student)
        assert gradient.dtype == torch.float64


def test_half_precision_is_summed_in_single() -> None:
    student, assistant, labels = batch(8, torch.bfloat16)
    for positions in ("response", "all"):
        loss = task_loss(student, labels, assistant, 0.3, 2.0, positions)
        exact = task_loss(student.double(), labels, assistant.double(), 0.3, 2.0, positions)
        assert loss.total.dtype == torch.float32
        torch.testing.assert_close(loss.total.double(), exact.total, atol=1e-5, rtol=0)


def test_a_huge_vocabulary_in_bfloat16_has_no_negative_divergence() -> None:
    g = torch.Generator().manual_seed(0)
    student = torch.randn(1, 3, 151_936, generator=g).bfloat16()
    labels = torch.tensor([[IGNORE, 5, 7]])
    loss = task_loss(student, labels, student, 0.3, 2.0)
    assert abs(float(loss.soft)) < 1e-6 and torch.isfinite(loss.total)


def test_different_vocabularies_are_refused() -> None:
    student, assistant, labels = batch()
    with pytest.raises(ValueError, match="do not fit"):
        task_loss(student, labels, assistant[..., :-1])


# ---- labels on a scale ----


def test_the_loss_of_labels_on_a_scale_against_a_loop() -> None:
    g = torch.Generator().manual_seed(4)
    log_p = -3 * torch.rand(B, 7, generator=g, dtype=torch.float64) - 0.5  # whole labels: they need not sum to 1
    values = [-2.4, 0.1, 3.0]
    expected = 0.0
    for row, value in enumerate(values):  # σ = 0.75 bin widths of 1
        weights = [math.exp(-(((centre - value) / 0.75) ** 2) / 2) for centre in range(-3, 4)]
        expected -= sum(w / sum(weights) * p for w, p in zip(weights, log_p[row].tolist(), strict=True)) / B
    targets = torch.tensor(Scale().targets(values))
    assert float(label_loss(log_p, targets)) == pytest.approx(expected, abs=1e-12)
    assert float(label_loss(log_p.half(), targets)) == pytest.approx(expected, abs=2e-3)
    with pytest.raises(ValueError, match=r"\(3, 6\) do not fit labels \(3, 7\)"):
        label_loss(log_p, targets[:, :6])


def test_one_hot_targets_on_a_scale_are_the_likelihood_of_the_bins() -> None:
    log_p = torch.log_softmax(torch.randn(B, 7, generator=torch.Generator().manual_seed(5)), -1)
    targets = torch.tensor(Scale(spread=0).targets([-2.4, 0.1, 3.0]))
    torch.testing.assert_close(label_loss(log_p, targets), F.nll_loss(log_p, torch.tensor([1, 3, 6])))
