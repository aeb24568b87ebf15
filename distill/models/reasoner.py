"""`Reasoner`, the common interface of teacher, assistant and student, and its inputs and outputs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from distill.task.prompts import EarlierAnswers, Template
from distill.task.sample import Sample


@dataclass(frozen=True)
class Cost:
    """Cost of answers: model calls, prompt tokens, completion tokens, and latency in seconds."""

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


NoAnswer = Literal["unanswered", "filtered"]
"""Why there is no answer: the request failed, or a content filter refused the post or the answer."""

UNKNOWN_CONFIDENCE = 1e-12
"""Label mass of a single answer without log-probabilities: there is a label, and its probability is unknown."""


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    Attributes:
        text: empty if the request failed.
        finished: False if the token limit cut the answer or no usable answer was returned.
        error: why there is no answer (refused request, deadline exceeded), as one sentence.
        kind: of the error.
        calls: number of model calls.
        seconds: latency; the time of a batch is divided equally among its answers. Ignored when comparing answers.
    """

    text: str
    finished: bool
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None
    calls: int = 1
    seconds: float = field(default=0.0, compare=False)
    kind: NoAnswer = "unanswered"

    @property
    def answered(self) -> bool:
        return self.error is None

    @property
    def cost(self) -> Cost:
        return Cost(self.calls, self.prompt_tokens, self.completion_tokens, self.seconds)


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. Temperature 0 is greedy; answers with different `attempt`s are sampled independently."""

    temperature: float = 0.0
    max_new_tokens: int = 512
    attempt: int = 0
    seed: int = 42


@dataclass(frozen=True)
class ClassScores:
    """Label scores of B samples over K labels.

    A sample without an answer has uniform probabilities and a label mass of exactly 0.

    Attributes:
        probabilities: [B, K], rows sum to 1.
        label_mass: [B], total probability of the labels before normalising; NaN if the model does not return it.
        costs: B costs, one per sample; empty if they were not recorded.
    """

    probabilities: np.ndarray
    label_mass: np.ndarray
    costs: tuple[Cost, ...] = ()

    def select(self, mask: np.ndarray) -> "ClassScores":
        """The scores of the samples whose entry of the boolean mask [B] is True."""
        costs = tuple(cost for cost, keep in zip(self.costs, mask, strict=False) if keep)
        return ClassScores(self.probabilities[mask], self.label_mass[mask], costs)

    def row(self, index: int) -> "ClassScores":
        """The scores of one sample, with B = 1."""
        rows = slice(index, index + 1)
        return ClassScores(self.probabilities[rows], self.label_mass[rows], self.costs[rows])

    @staticmethod
    def concatenate(parts: "Sequence[ClassScores]") -> "ClassScores":
        """The scores of one or more parts along the sample axis."""
        return ClassScores(
            np.concatenate([part.probabilities for part in parts]),
            np.concatenate([part.label_mass for part in parts]),
            tuple(cost for part in parts for cost in part.costs),
        )

    @property
    def answered(self) -> np.ndarray:
        """[B], False for samples without an answer."""
        return self.label_mass != 0

    @property
    def are_probabilities(self) -> bool:
        """Whether the model returned the probabilities; False if the share of agreeing answers replaces one of them."""
        return bool(np.isfinite(self.label_mass).all() and (self.label_mass != UNKNOWN_CONFIDENCE).all())


class Reasoner(Protocol):
    """A model that classifies samples and generates rationales."""

    name: str

    def classify(self, samples: Sequence[Sample], earlier: Sequence[EarlierAnswers] | None = None) -> ClassScores:
        """Label scores of B samples, in the order of the samples.

        Args:
            earlier: B earlier answers of student and teacher; with them, the *review* prompt replaces *classify*.
        """

    def reason(
        self, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, Answer]]:
        """Generate one answer per sample; yields pairs of sample index and answer as answers become available.

        Raises:
            RunError: the model is unreachable or refuses all requests.
        """


@runtime_checkable
class JointReasoner(Reasoner, Protocol):
    """A Reasoner that scores labels and generates an answer from one prefill per sample."""

    def classify_and_reason(
        self, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, ClassScores, Answer]]:
        """See the module function; an answer's cost excludes the tokens and time already counted for label scoring."""


def classify_and_reason(
    reasoner: Reasoner, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
) -> Iterator[tuple[int, ClassScores, Answer]]:
    """Label scores and one generated answer per sample; yields index, scores and answer as they become available.

    Raises:
        RunError: the model is unreachable or refuses all requests.
    """
    if isinstance(reasoner, JointReasoner):
        return reasoner.classify_and_reason(samples, template, sampling)
    return classify_then_reason(reasoner, samples, template, sampling)


def classify_then_reason(
    reasoner: Reasoner, samples: Sequence[Sample], template: Template, sampling: Sampling
) -> Iterator[tuple[int, ClassScores, Answer]]:
    """`classify_and_reason` as two separate calls: label scores of all samples first, then generation."""
    scores = reasoner.classify(samples)
    for index, answer in reasoner.reason(samples, template, sampling):
        yield index, scores.row(index), answer
