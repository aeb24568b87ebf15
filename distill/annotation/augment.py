"""Self-written reasoning data: the assistant reasons without the label, and what it gets right is kept (MulCoT-RD)."""

from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

from distill.annotation.cached_teacher import CachedTeacher, Question
from distill.annotation.ledger import Ledger
from distill.annotation.scheduler import Progress, run_conversations
from distill.models.reasoner import Answer, Reasoner, Sampling
from distill.task.labels import LabelSpace
from distill.task.rationale import InvalidRationale, Rationale, Reason, check
from distill.task.sample import Sample


@dataclass
class AugmentSettings:
    """How the assistant writes rationales of its own."""

    temperature: float = 0.7
    """Temperature of the assistant's rationales."""
    max_new_tokens: int = 512
    """Token limit of a rationale; one that reaches it is dropped."""
    chunk: int = 64
    """How many samples the assistant is handed at a time."""


def augment(
    samples: Iterable[Sample],
    labels: LabelSpace,
    assistant: Reasoner,
    settings: AugmentSettings,
    ledger: Ledger,
    dropped: Counter[str],
    progress: Progress | None = None,
) -> Iterator[tuple[Sample, Rationale]]:
    """One rationale a sample, kept where it is valid and its prediction is the sample's label; in the samples' order.

    Args:
        dropped: counts the others by the rule that they break.
    """
    sampling = Sampling(settings.temperature, settings.max_new_tokens)

    def dialogue(sample: Sample) -> Generator[Question, Answer, tuple[Sample, Rationale | Reason]]:
        answer = yield Question("reason", sampling)
        try:
            return sample, check(answer.text, labels, sample.label, finished=answer.finished)
        except InvalidRationale as invalid:
            return sample, invalid.reason

    teacher_cache = CachedTeacher(assistant, labels, ledger, settings.chunk)
    for sample, found in run_conversations(samples, dialogue, teacher_cache, progress):
        if isinstance(found, Rationale):
            yield sample, found
        else:
            dropped[found] += 1
