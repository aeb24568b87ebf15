"""How much a teacher will be asked: bounds that are known before it is asked anything."""

from collections.abc import Iterable
from dataclasses import dataclass

from distill.annotation.annotate import AnnotateSettings
from distill.task.labels import LabelSpace
from distill.task.rationale import InvalidRationale, check
from distill.task.sample import Sample


@dataclass(frozen=True)
class RequestForecast:
    """Questions of one kind, at least and at most, and the tokens of one of them and of its answer."""

    stage: str
    about: str
    least: int
    most: int
    prompt_tokens: float = 0.0
    answer_tokens: tuple[float, float] = (0.0, 0.0)

    def cost(self, prompt_price: float, completion_price: float) -> tuple[float, float]:
        """At least and at most, from prices of a million tokens."""
        least, most = (
            count * (self.prompt_tokens * prompt_price + answer * completion_price) / 1e6
            for count, answer in zip((self.least, self.most), self.answer_tokens, strict=True)
        )
        return least, most


def rationale_bounds(samples: Iterable[Sample], labels: LabelSpace, settings: AnnotateSettings) -> tuple[int, int]:
    """How many rationales the teacher is asked for, at least and at most (`annotate`, with someone to ask).

    A labelled post takes at most a *predict* and an *explain*, each with all retries; one with a recorded rationale
    that breaks a rule at most an *explain*; an unlabelled one, where it is kept, at most a *predict*.
    """
    tries, least, most = 1 + settings.retries, 0, 0
    for sample in samples:
        if sample.label is None:
            most += tries * (settings.unlabelled == "keep_confident")
            continue
        recorded = _valid(sample, labels) if settings.recorded and sample.rationale else None
        least += not recorded
        most += 0 if recorded else tries if recorded is False else 2 * tries
    return least, most


def _valid(sample: Sample, labels: LabelSpace) -> bool:
    try:
        check(sample.rationale or "", labels, labels.name(sample.label))
    except InvalidRationale:
        return False
    return True
