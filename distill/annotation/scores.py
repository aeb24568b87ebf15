"""Classifications in the ledger: JSON text with the probabilities, the label mass and, without a label, the reply."""

import json
import math

import numpy as np

from distill.files import finite
from distill.models.reasoner import Answer


def read_scores(answer: Answer) -> tuple[list[float], float]:
    """Probabilities [K] and label mass of a classification; a mass of NaN if it is unknown."""
    probabilities, mass = json.loads(answer.text)[:2]
    return probabilities, math.nan if mass is None else mass


def read_reply(answer: Answer) -> str:
    """The model's own words in a classification without a label; empty if they were not stored."""
    return "".join(json.loads(answer.text)[2:])


def scores_text(probabilities: np.ndarray, mass: float, reply: str = "") -> str:
    """The text of a classification.

    Args:
        probabilities: [K].
        reply: the model's own words, stored if they name no label.
    """
    return json.dumps([*finite([probabilities.tolist(), float(mass)]), *([reply] if mass == 0 and reply else [])])
