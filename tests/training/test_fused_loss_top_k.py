"""The fused loss with top-k targets: the divergence over k tokens and the rest."""

import math

import pytest
import torch

from distill.training.fused_loss import HiddenTargets, TopKTargets, answer_loss
from tests.training.loss_cases import Case, N, V, assert_all_close, student_logits, top_k_of


def test_with_k_equal_to_the_vocabulary_the_divergence_is_the_full_one() -> None:
    case = Case(13).require_grad()
    full = case.loss(case.targets)
    every = case.loss(top_k_of(case.targets.hidden @ case.targets.head.T, V))
    assert_all_close(tuple(every), tuple(full))
    assert_all_close(case.gradients(every.total), case.gradients(full.total))


def test_the_top_k_divergence_equals_a_loop_and_is_a_lower_bound() -> None:
    case = Case(14)
    logits, full = case.targets.hidden @ case.targets.head.T, case.loss(case.targets).soft
    previous = torch.zeros(N, dtype=torch.float64)
    for k in (1, 3, 10, 28, V):
        targets = top_k_of(logits, k)
        found = case.loss(targets).soft
        for n in range(N):
            p = [math.exp(z) for z in (student_logits(case)[n] / 2).tolist()]
            p = [value / sum(p) for value in p]
            ids, q = targets.ids[n].tolist(), targets.log_q[n].exp().tolist()
            rest = sum(value for v, value in enumerate(p) if v not in ids)
            expected = sum(q_i * math.log(q_i / p[i]) for i, q_i in zip(ids, q, strict=True))
            if k < V:
                expected += (1 - sum(q)) * math.log((1 - sum(q)) / rest)
            assert float(found[n]) == pytest.approx(expected, abs=1e-10)
        assert (found <= full + 1e-12).all() and (found >= previous - 1e-12).all()  # finer events, larger KL
        previous = found


def test_the_top_k_divergence_includes_the_mass_outside() -> None:
    """Renormalized over the top 2, both are (1/2, 1/2) and the KL is 0; the student's mass is elsewhere."""
    student = torch.tensor([[0.0, 0.0, 9.0, 0.0]], dtype=torch.float64)
    assistant = torch.tensor([[9.0, 9.0, 0.0, 0.0]], dtype=torch.float64)
    eye, one = torch.eye(4, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    token = torch.tensor([0])
    coarse = answer_loss(student, eye, token, one, top_k_of(assistant, 2, 1.0), 1.0, 1.0)
    full = answer_loss(student, eye, token, one, HiddenTargets(assistant, eye), 1.0, 1.0)
    assert float(full.soft) > 8
    assert float(full.soft) >= float(coarse.soft) > 8


def test_a_rest_of_zero_mass_and_a_rest_that_underflows_are_exact() -> None:
    eye, one, token = torch.eye(4), torch.ones(1), torch.tensor([0])
    student = torch.tensor([[400.0, 399.0, 0.0, 1.0]], requires_grad=True)  # exp(-399) is 0 in float32
    top = torch.tensor([[0, 1]])
    no_rest = TopKTargets(torch.tensor([[0.5, 0.5]]).log(), top, torch.tensor([-math.inf]))
    p = torch.softmax(student[0, :2].detach(), 0)
    loss = answer_loss(student, eye, token, one, no_rest, 1.0, 1.0)
    assert float(loss.soft) == pytest.approx(float(math.log(0.5) - p.log().mean()), abs=1e-5)
    (gradient,) = torch.autograd.grad(loss.total, student)
    torch.testing.assert_close(gradient, torch.tensor([[p[0] - 0.5, p[1] - 0.5, 0.0, 0.0]]))

    with_rest = TopKTargets(torch.tensor([[0.4, 0.4]]).log(), top, torch.tensor([0.2]).log())
    loss = answer_loss(student, eye, token, one, with_rest, 1.0, 1.0)
    within_rest = torch.softmax(student[0, 2:].detach(), 0)  # the rest misses 0.2, divided as by the student
    (gradient,) = torch.autograd.grad(loss.total, student)
    torch.testing.assert_close(gradient, torch.cat([p - 0.4, -0.2 * within_rest])[None])
    log_rest = float(torch.logsumexp(student[0, 2:].detach(), 0) - torch.logsumexp(student[0].detach(), 0))
    expected = 0.8 * math.log(0.4) - 0.4 * float(p.log().sum()) + 0.2 * (math.log(0.2) - log_rest)
    assert float(loss.soft) == pytest.approx(expected, rel=1e-5)


def test_log_probabilities_in_half_precision_and_32_bit_ids_are_accepted() -> None:
    case = Case(15)
    targets = top_k_of(case.targets.hidden @ case.targets.head.T, 6)
    cached = TopKTargets(targets.log_q.half(), targets.ids.int(), targets.log_rest.half())
    torch.testing.assert_close(case.loss(cached).soft, case.loss(targets).soft, atol=1e-2, rtol=0)
