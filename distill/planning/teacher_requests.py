"""Forecast of the number of teacher requests, their tokens and their cost."""

from collections.abc import Iterable
from dataclasses import dataclass

from distill.annotation.annotate import AnnotateSettings
from distill.task.labels import LabelSpace
from distill.task.rationale import InvalidRationale, check
from distill.task.sample import Sample


@dataclass(frozen=True)
class RequestForecast:
    """Forecast of one kind of teacher request.

    Attributes:
        stage: stage that sends the requests.
        purpose: what the teacher returns: labels, rationales or reviews.
        minimum, maximum: bounds on the number of requests.
        prompt_tokens: mean prompt tokens of one request.
        answer_tokens: lower and upper estimate of the answer tokens of one request.
    """

    stage: str
    purpose: str
    minimum: int
    maximum: int
    prompt_tokens: float = 0.0
    answer_tokens: tuple[float, float] = (0.0, 0.0)

    def cost(self, prompt_price: float, completion_price: float) -> tuple[float, float]:
        """Return the minimum and maximum cost, from prices per million tokens."""
        minimum, maximum = (
            count * (self.prompt_tokens * prompt_price + answer * completion_price) / 1e6
            for count, answer in zip((self.minimum, self.maximum), self.answer_tokens, strict=True)
        )
        return minimum, maximum


def rationale_request_bounds(
    samples: Iterable[Sample], labels: LabelSpace, settings: AnnotateSettings
) -> tuple[int, int]:
    """Return the minimum and maximum number of rationale requests that `annotate` sends to a teacher.

    A labelled post needs at most one *predict* and one *explain* prompt, each with all retries; a labelled post with an
    invalid recorded rationale at most one *explain* prompt; an unlabelled post that is kept at most one *predict*.
    """
    attempts, minimum, maximum = 1 + settings.retries, 0, 0
    for sample in samples:
        if sample.label is None:
            maximum += attempts * (settings.unlabelled == "keep_confident")
            continue
        valid = _has_valid_rationale(sample, labels) if settings.recorded and sample.rationale else None
        minimum += not valid
        maximum += 0 if valid else attempts if valid is False else 2 * attempts
    return minimum, maximum


def _has_valid_rationale(sample: Sample, labels: LabelSpace) -> bool:
    try:
        check(sample.rationale or "", labels, labels.name(sample.label), post=sample.text)
    except InvalidRationale:
        return False
    return True
