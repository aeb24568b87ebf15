"""Learning rate schedules, against those of transformers."""

from typing import Any

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from distill.training.schedules import Schedule, learning_rate

PEAK, STEPS, WARMUP = 4e-3, 20, 5


def library_rates(create: Any, **options: Any) -> list[float]:
    """Rates of STEPS steps; a scheduler of transformers has the rate 0 in the first step of the warm-up."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], PEAK)
    scheduler = create(optimizer, num_warmup_steps=WARMUP, **options)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def rates(schedule: Schedule, warmup: int = WARMUP, floor: float = 0.0) -> list[float]:
    found = [learning_rate(schedule, step, STEPS, peak=PEAK, warmup=warmup, floor=floor) for step in range(STEPS)]
    assert None not in found
    return found  # type: ignore[return-value]


def test_the_schedules_are_those_of_transformers_after_the_warm_up() -> None:
    linear = library_rates(get_linear_schedule_with_warmup, num_training_steps=STEPS)
    cosine = library_rates(get_cosine_with_min_lr_schedule_with_warmup, num_training_steps=STEPS, min_lr=1e-4)
    constant = library_rates(get_constant_schedule_with_warmup)
    assert rates("linear")[WARMUP:] == pytest.approx(linear[WARMUP:])
    assert rates("cosine", floor=1e-4)[WARMUP:] == pytest.approx(cosine[WARMUP:])
    assert rates("constant")[WARMUP:] == pytest.approx(constant[WARMUP:])


def test_the_warm_up_rises_in_equal_steps_and_begins_above_zero() -> None:
    for schedule in ("plateau", "constant", "linear", "cosine"):
        warm = [learning_rate(schedule, step, STEPS, peak=PEAK, warmup=4) for step in range(4)]
        assert warm == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3])
    assert learning_rate("plateau", 4, STEPS, peak=PEAK, warmup=4) is None


def test_the_rate_never_leaves_its_bounds() -> None:
    for schedule in ("linear", "cosine"):
        assert learning_rate(schedule, 50, STEPS, peak=PEAK, floor=1e-4) == pytest.approx(1e-4), "after the last step"
        assert learning_rate(schedule, 3, 4, peak=1e-5, floor=1e-3) == pytest.approx(1e-5), "a floor above the peak"
        assert learning_rate(schedule, 0, 0, peak=PEAK) == pytest.approx(PEAK)
        assert learning_rate(schedule, 7, 5, peak=PEAK, warmup=10) == pytest.approx(0.8 * PEAK)
