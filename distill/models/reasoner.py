"""The one interface of teacher, assistant and student."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from distill.task.prompts import EarlierAnswers, Template
from distill.task.sample import Sample


@dataclass(frozen=True)
class Cost:
    """What answers took: how often a model was asked, the tokens it read and wrote, and seconds until it answered."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.calls + other.calls,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class Answer:
    """One generated answer. `finished` is False where the token limit cut it or nothing usable came back.

    `error` says in a sentence why nothing came back (a refused request, a passed deadline); `text` is empty then.
    `calls` and `seconds` are what it took; a model that answers a batch at once shares the batch's seconds out.
    Two answers that differ in their seconds alone are equal.
    """

    text: str
    finished: bool
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None
    calls: int = 1
    seconds: float = field(default=0.0, compare=False)

    @property
    def cost(self) -> Cost:
        return Cost(self.calls, self.prompt_tokens, self.completion_tokens, self.seconds)


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
    before they were normalised (NaN where the model does not tell); costs: B, what each answer took, where that was
    counted. A sample without an answer has equally likely labels at a mass of exactly 0.
    """

    probabilities: np.ndarray
    label_mass: np.ndarray
    costs: tuple[Cost, ...] = ()

    def only(self, kept: np.ndarray) -> "ClassScores":
        """The scores of the samples that are True in [B]."""
        costs = tuple(cost for cost, keep in zip(self.costs, kept, strict=False) if keep)
        return ClassScores(self.probabilities[kept], self.label_mass[kept], costs)

    def row(self, index: int) -> "ClassScores":
        """The scores of one sample."""
        rows = slice(index, index + 1)
        return ClassScores(self.probabilities[rows], self.label_mass[rows], self.costs[rows])

    @staticmethod
    def together(parts: "Sequence[ClassScores]") -> "ClassScores":
        """The scores of all samples of one or more parts, in their order."""
        return ClassScores(
            np.concatenate([part.probabilities for part in parts]),
            np.concatenate([part.label_mass for part in parts]),
            tuple(cost for part in parts for cost in part.costs),
        )

    @property
    def answered(self) -> np.ndarray:
        """[B] False where the model gave no answer."""
        return self.label_mass != 0


class Reasoner(Protocol):
    """A model that classifies samples and reasons about them."""

    name: str

    def classify(self, samples: Sequence[Sample], earlier: Sequence[EarlierAnswers] | None = None) -> ClassScores:
        """Label probabilities of B samples, in their order.

        Args:
            earlier: B pairs of earlier answers; the samples are then put to *review* instead of *classify*.
        """

    def reason(
        self, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, Answer]]:
        """Answers to one question about each sample, as they come: pairs of the sample's index and its answer.

        Raises:
            RunError: the model cannot be reached or refuses to serve at all.
        """


@runtime_checkable
class ReadsOnce(Reasoner, Protocol):
    """A Reasoner that classifies and reasons from one reading of each sample."""

    def classify_and_reason(
        self, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, ClassScores, Answer]]:
        """As the function of this name; an answer's cost is what it took beyond the label's."""


def classify_and_reason(
    reasoner: Reasoner, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
) -> Iterator[tuple[int, ClassScores, Answer]]:
    """Label scores and the answer to one question about each sample, as the answers come: its index, and both.

    Raises:
        RunError: the model cannot be reached or refuses to serve at all.
    """
    if isinstance(reasoner, ReadsOnce):
        return reasoner.classify_and_reason(samples, template, sampling)
    return classify_then_reason(reasoner, samples, template, sampling)


def classify_then_reason(
    reasoner: Reasoner, samples: Sequence[Sample], template: Template, sampling: Sampling
) -> Iterator[tuple[int, ClassScores, Answer]]:
    """The same from two readings: first all labels, then the answers."""
    scores = reasoner.classify(samples)
    for index, answer in reasoner.reason(samples, template, sampling):
        yield index, scores.row(index), answer
