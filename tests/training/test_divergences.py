"""Divergences against plain formulas with autograd, scipy, trl and finite differences, and at the edges."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.spatial.distance import jensenshannon

from distill.training.divergences import Divergence, of_logits
from distill.training.fused_loss import HiddenTargets, answer_loss
from tests.training.loss_cases import Case, V, assert_all_close, plain_divergence, student_logits, top_k_of

ALL = [
    Divergence("forward_kl"),
    Divergence("reverse_kl"),
    Divergence("jsd", beta=0.5),
    Divergence("jsd", beta=0.1),
    Divergence("skew_kl", skew=0.1),
    Divergence("skew_reverse_kl", skew=0.3),
    Divergence("tv"),
]
every = pytest.mark.parametrize("divergence", ALL, ids=lambda d: f"{d.name}-{d.beta}-{d.skew}")


def random_logits(seed: int, dtype: torch.dtype = torch.float64, columns: int = 23) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(3 * torch.randn(6, columns, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))


@every
def test_events_have_the_value_and_gradient_of_the_plain_formula(divergence: Divergence) -> None:
    z, a = random_logits(1)
    z.requires_grad_()
    log_p, log_q = z.log_softmax(-1), a.log_softmax(-1)
    expected = plain_divergence(divergence, log_p, log_q)
    value, gradient = divergence.of_events(log_p.detach(), log_q)
    assert_all_close((value, gradient), (expected, torch.autograd.grad(expected.sum(), z)[0]))


@every
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_logits_have_the_value_and_gradient_of_events(
    divergence: Divergence, dtype: torch.dtype, tolerance: float
) -> None:
    z, a = random_logits(2, columns=2000)
    value, gradient = divergence.of_events(z.log_softmax(-1), a.log_softmax(-1))
    buffers = z.to(dtype, copy=True), a.to(dtype, copy=True), torch.empty(z.shape, dtype=dtype)
    found = of_logits(divergence, *buffers)
    expected = (z.logsumexp(-1), value, z.softmax(-1), gradient)
    assert_all_close(tuple(x.double() for x in found), expected, tolerance)
    assert {x.data_ptr() for x in (found.p, found.gradient)} == {x.data_ptr() for x in buffers[1:]}


@every
@pytest.mark.parametrize("k", [None, 1, 6, V])
def test_the_fused_loss_equals_autograd_on_all_logits(divergence: Divergence, k: int | None) -> None:
    case = Case(3).require_grad()
    a, t = case.targets.hidden @ case.targets.head.T, 3.0
    soft = top_k_of(a, k, t) if k else case.targets
    z = case.hidden @ case.head.T
    log_p, log_q = (z / t).log_softmax(-1), (a / t).log_softmax(-1)
    if k:  # the k tokens, and all others as one event
        log_q = torch.cat([soft.log_q, soft.log_rest[:, None].clamp(min=-99)], -1)
        others = torch.full_like(z, 0).scatter(-1, soft.ids, -math.inf)
        rest = (log_p + others).logsumexp(-1) if k < V else torch.full((len(z),), -99.0, dtype=z.dtype)
        log_p = torch.cat([log_p.gather(-1, soft.ids), rest[:, None]], -1)
    expected = plain_divergence(divergence, log_p, log_q)
    hard = torch.nn.functional.cross_entropy(z, case.tokens, reduction="none")
    total = (case.loss_weights * (0.6 * hard + 0.4 * expected)).sum()
    found = case.loss(soft, weight=0.4, temperature=t, divergence=divergence, chunk=4)
    assert_all_close((found.total, found.soft), (total, expected.detach()), 1e-9)
    assert_all_close(case.gradients(found.total), case.gradients(total), 1e-9)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_the_jensen_shannon_divergence_is_that_of_trl(beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    gkd = pytest.importorskip("trl.experimental.gkd")
    z, a = random_logits(4)
    found, _ = Divergence("jsd", beta=beta).of_events((z / 2).log_softmax(-1), (a / 2).log_softmax(-1))
    expected = gkd.GKDTrainer.generalized_jsd_loss(z[None], a[None], beta=beta, temperature=2.0, reduction="sum")
    torch.testing.assert_close(found.sum(), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("name", "beta"), [("forward_kl", 0), ("reverse_kl", 1)])
def test_both_directions_of_the_divergence_are_those_of_trl(
    name: Any, beta: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    gkd = pytest.importorskip("trl.experimental.gkd")
    z, a = random_logits(5)
    found, _ = Divergence(name).of_events(z.log_softmax(-1), a.log_softmax(-1))
    expected = gkd.GKDTrainer.generalized_jsd_loss(z[None], a[None], beta=beta, temperature=1.0, reduction="sum")
    torch.testing.assert_close(found.sum(), expected, atol=1e-9, rtol=1e-9)


def test_the_symmetric_jensen_shannon_divergence_is_that_of_scipy() -> None:
    z, a = random_logits(6)
    found, _ = Divergence("jsd").of_events(z.log_softmax(-1), a.log_softmax(-1))
    expected = torch.from_numpy(jensenshannon(z.softmax(-1).numpy(), a.softmax(-1).numpy(), axis=1) ** 2)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@every
def test_the_fused_gradient_matches_finite_differences(divergence: Divergence) -> None:
    case = Case(7, positions=3).require_grad()

    def total(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return answer_loss(
            hidden, head, case.tokens, case.loss_weights, case.targets, 0.4, 1.7, divergence, chunk=2
        ).total

    assert torch.autograd.gradcheck(total, (case.hidden, case.head))


@every
def test_a_student_equal_to_its_assistant_has_no_divergence_and_no_gradient(divergence: Divergence) -> None:
    case = Case(8).require_grad()
    for soft in (HiddenTargets(case.hidden.detach(), case.head.detach()), top_k_of(student_logits(case), 5)):
        loss = case.loss(soft, weight=1.0, divergence=divergence)
        assert float(loss.soft.abs().max()) < 1e-12
        if divergence.name != "tv":  # its gradient does not exist there: rounding decides the sign
            assert max(float(gradient.abs().max()) for gradient in case.gradients(loss.total)) < 1e-12


@every
def test_an_impossible_or_certain_event_is_finite_and_pulls_in_the_right_direction(divergence: Divergence) -> None:
    certain = torch.tensor([[0.0, -math.inf, -math.inf]])
    impossible = torch.tensor([[0.5, 0.5, 0.0]]).log()
    log_p = torch.tensor([[0.2, 0.2, 0.6]]).log()
    for log_q in (certain, impossible):
        value, gradient = divergence.of_events(log_p, log_q)
        assert torch.isfinite(value).all() and torch.isfinite(gradient).all() and float(value) > 0
        assert float(gradient[0, 2]) > 0 > float(gradient[0, 0])
        assert float(gradient.sum()) == pytest.approx(0, abs=1e-5)


@every
@pytest.mark.parametrize("temperature", [0.01, 50.0])
def test_extreme_temperatures_and_half_precision_are_finite(divergence: Divergence, temperature: float) -> None:
    case = Case(9, vocabulary=3000, assistant_vocabulary=3000)
    case.loss_weights = case.loss_weights.float()
    case.hidden, case.head = case.hidden.bfloat16(), case.head.bfloat16()
    case.targets = HiddenTargets(*(x.bfloat16() for x in case.targets[:2]))
    case.require_grad()
    for soft in (case.targets, top_k_of(case.targets.hidden.float() @ case.targets.head.float().T, 4, temperature)):
        loss = case.loss(soft, temperature=temperature, divergence=divergence)
        assert torch.isfinite(loss.total) and float(loss.soft.min()) > -1e-5
        assert all(torch.isfinite(gradient).all() for gradient in case.gradients(loss.total))


@every
def test_coarser_events_have_a_smaller_divergence(divergence: Divergence) -> None:
    case = Case(10)
    full = case.loss(case.targets, divergence=divergence).soft
    a = case.targets.hidden @ case.targets.head.T
    previous = torch.zeros_like(full)
    for k in (1, 4, 16, V):
        found = case.loss(top_k_of(a, k), divergence=divergence).soft
        assert (found <= full + 1e-9).all() and (found >= previous - 1e-9).all()
        previous = found


def test_the_limits_of_the_skewed_divergences_are_the_plain_ones() -> None:
    z, a = random_logits(11)
    log_p, log_q = z.log_softmax(-1), a.log_softmax(-1)
    for skewed, limit in (("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")):
        found = Divergence(skewed, skew=1e-13).of_events(log_p, log_q)  # type: ignore[arg-type]
        assert_all_close(found, replace(Divergence(), name=limit).of_events(log_p, log_q), 1e-6)  # type: ignore[arg-type]


def test_the_limits_of_the_jensen_shannon_divergence_are_multiples_of_both_directions() -> None:
    z, a = random_logits(12)
    log_p, log_q = (z / 3).log_softmax(-1), (a / 3).log_softmax(-1)
    for beta, factor, limit in ((1e-8, 1e-8, "forward_kl"), (1 - 1e-8, 1e-8, "reverse_kl")):
        found = Divergence("jsd", beta=beta).of_events(log_p, log_q)
        expected = Divergence(limit).of_events(log_p, log_q)  # type: ignore[arg-type]
        assert_all_close(tuple(x / factor for x in found), expected, 1e-5)
