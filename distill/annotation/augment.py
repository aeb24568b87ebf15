"""Self-augmentation of MulCoT-RD (arXiv 2508.05234): rationales of the assistant that predict the correct label."""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from distill.annotation.cached_teacher import CachedTeacher, Start, TeacherQuery
from distill.annotation.first_answers import FirstAnswers
from distill.annotation.ledger import Ledger
from distill.annotation.scheduler import Progress, run_conversations
from distill.models.reasoner import Answer, Reasoner, Sampling
from distill.settings import Count, NonNegative, Settings
from distill.task.labels import LabelSpace
from distill.task.rationale import InvalidRationale, Rationale, Reason, check
from distill.task.sample import Sample


@dataclass
class AugmentSettings(Settings):
    """How the assistant generates rationales."""

    posts: Count | None = None
    """Maximum number of posts, evenly spaced over the training posts; null: all."""
    temperature: NonNegative = 0.7
    """Sampling temperature."""
    max_new_tokens: Count = 512
    """Maximum number of tokens of a rationale; a rationale that reaches it is dropped."""
    chunk: Count = 64
    """Number of posts per call of the assistant."""


def select(posts: Sequence[Sample], settings: AugmentSettings) -> list[Sample]:
    """The posts that are augmented, in order: all, or `settings.posts` of them, evenly spaced."""
    count = min(settings.posts or len(posts), len(posts))
    return [posts[index * len(posts) // count] for index in range(count)]


def augment(
    samples: Iterable[Sample],
    labels: LabelSpace,
    assistant: Reasoner,
    settings: AugmentSettings,
    ledger: Ledger,
    dropped: Counter[str],
    progress: Progress | None = None,
    first_answers: FirstAnswers | None = None,
    prefill: Callable[[CachedTeacher, Start], None] | None = None,
) -> Iterator[tuple[Sample, Rationale]]:
    """Generate one rationale per sample, without giving the assistant the label.

    Yields samples with their rationale, in sample order, if the rationale is valid and predicts the sample's label.

    Args:
        dropped: updated with the number of dropped rationales by the rule that they break.
        first_answers: see `CachedTeacher`.
        prefill: fills the ledger before the first request; see `annotate`.

    Raises:
        RunError: the assistant fails, its first answers are all invalid, or the ledger cannot be written.
    """
    conversation = partial(
        _conversation, labels=labels, sampling=Sampling(settings.temperature, settings.max_new_tokens)
    )
    teacher_cache = CachedTeacher(assistant, labels, ledger, settings.chunk, first_answers=first_answers)
    if prefill is not None:
        prefill(teacher_cache, conversation)
    for sample, result in run_conversations(samples, conversation, teacher_cache, progress):
        if isinstance(result, Rationale):
            yield sample, result
        else:
            dropped[result] += 1


def _conversation(
    sample: Sample, labels: LabelSpace, sampling: Sampling
) -> Generator[TeacherQuery, Answer, tuple[Sample, Rationale | Reason]]:
    answer = yield TeacherQuery("reason", sampling)
    try:
        return sample, check(answer.text, labels, sample.label, finished=answer.finished, post=sample.text)
    except InvalidRationale as invalid:
        return sample, invalid.reason
