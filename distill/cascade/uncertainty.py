"""How sure a model is, from its label probabilities. Pure functions."""

from typing import Literal

import numpy as np

Measure = Literal["entropy", "max_probability", "margin"]


def uncertainty(probabilities: np.ndarray, measure: Measure = "entropy") -> np.ndarray:
    raise NotImplementedError


def temper(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    raise NotImplementedError
