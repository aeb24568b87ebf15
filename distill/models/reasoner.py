"""The one interface of teacher, assistant and student."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from distill.task.prompts import Template
from distill.task.sample import Sample


@dataclass(frozen=True)
class Answer:
    """One generated answer. `finished` is False where the token limit cut it or nothing usable came back.

    `error` says in a sentence why nothing came back (a refused request, a passed deadline); `text` is empty then.
    """

    text: str
    finished: bool
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn. Temperature 0 is greedy; `attempt` tells apart answers drawn with the same settings."""

    temperature: float = 0.0
    max_new_tokens: int = 512
    attempt: int = 0
    seed: int = 42


@dataclass(frozen=True)
class ClassScores:
    """Label scoring of B samples over K labels.

    probabilities: [B, K], rows sum to 1; label_mass: [B], how much of the next-token probability the labels held
    before they were normalised (NaN where the model does not tell).
    """

    probabilities: np.ndarray
    label_mass: np.ndarray


class Reasoner(Protocol):
    """A model that classifies samples and reasons about them."""

    name: str

    def classify(self, samples: Sequence[Sample]) -> ClassScores:
        """Label probabilities of B samples, in their order."""

    def reason(
        self, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, Answer]]:
        """Answers to one question about each sample, as they come: pairs of the sample's index and its answer.

        Raises:
            RunError: the model cannot be reached or refuses to serve at all.
        """
