"""Learning rate schedules, as functions of the optimizer step."""

import math
from typing import Literal

Schedule = Literal["plateau", "constant", "linear", "cosine"]

DECAYING: tuple[Schedule, ...] = ("linear", "cosine")
"""Schedules that need the number of steps of the training."""


def learning_rate(
    schedule: Schedule, step: int, steps: float, *, peak: float, warmup: int = 0, floor: float = 0.0
) -> float | None:
    """The learning rate of an optimizer step; None if it is what ReduceLROnPlateau has set.

    It rises linearly to `peak` in the first `warmup` steps. Then it stays (constant), or falls to `floor` at the end of
    the training: on a line, or as half a period of a cosine (arXiv 1608.03983).

    Args:
        step: number of optimizer steps before this one.
        steps: number of optimizer steps of the whole training.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "plateau":
        return None
    if schedule == "constant":
        return peak
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    left = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return min(floor, peak) + (peak - min(floor, peak)) * left
