"""The label distributions from which the student learns, scored once per post by the assistant or the teacher."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property

from distill.annotation.cached_teacher import CachedTeacher
from distill.annotation.ledger import Ledger
from distill.annotation.scores import read_scores
from distill.data import jsonl
from distill.errors import RunError
from distill.models.endpoint import Endpoint
from distill.models.local import Local
from distill.models.reasoner import UNKNOWN_CONFIDENCE, Answer, ClassScores, Sampling
from distill.stages.context import Context, progress
from distill.task.prompts import EarlierAnswers, Template
from distill.task.sample import Sample
from distill.training.batches import LabelTargets
from distill.training.processes import worker_folder
from distill.training.soft_target_cache import FOLDER

log = logging.getLogger(__name__)

_CHUNK = 256  # posts per call of a model on this machine


def label_targets(context: Context, rows: Sequence[Sample]) -> LabelTargets:
    """Return the label distributions of the posts in `rows`, without those that are unknown.

    Answers are taken from the ledger of the teacher or of the assistant, and only the others are requested. All posts
    are written to `labels.jsonl` beside the soft targets, `null` for an unknown distribution; the workers of a
    distributed training read that file.

    Raises:
        RunError: no post has a distribution.
    """
    path = context.folder / FOLDER / "labels.jsonl"
    if worker_folder() is None:
        posts = list({sample.id: sample for sample in rows}.values())
        with _scorer(context) as scorer:
            found = _score(scorer, posts)
        jsonl.write_rows(path, ({"id": post.id, "probabilities": found[post.id]} for post in posts))
        unknown = [post for post, row in found.items() if row is None]
        if unknown:
            log.warning(
                "student: %s gave no label probabilities for %d of %d posts, such as %s; they take no label loss and "
                "have null in %s", scorer.name, len(unknown), len(posts), unknown[0], path,
            )  # fmt: skip
    stored = {row.fields["id"]: row.fields["probabilities"] for row in jsonl.read(path)}
    return {post: probabilities for post, probabilities in stored.items() if probabilities is not None}


def unlabelled(posts: Sequence[Sample], rows: Sequence[Sample]) -> list[Sample]:
    """Return the posts without a label that are not among the rows: they can only teach a label distribution."""
    known = {row.id for row in rows}
    return [post for post in posts if post.label is None and post.id not in known]


@contextmanager
def _scorer(context: Context) -> Iterator[CachedTeacher]:
    """The model that scores the labels. A teacher that annotates shares the ledger, which may have scored posts."""
    recipe = context.recipe
    assert recipe.student is not None
    own = context.folder / "student" / "ledger.jsonl"
    if recipe.student.distillation.label_teacher == "assistant":
        with Ledger(own) as ledger:
            yield CachedTeacher(_Assistant(context), context.labels, ledger, _CHUNK)
        return
    teacher = context.teacher(recipe.annotating_teacher)
    assert teacher is not None
    first = context.first_answers("student") if isinstance(teacher, Endpoint) else None
    with Ledger(context.folder / "annotate" / "ledger.jsonl" if recipe.annotate is not None else own) as ledger:
        yield CachedTeacher(teacher, context.labels, ledger, _CHUNK, recipe.other_servers(), first)
        if first is not None:
            first.end()


def _score(scorer: CachedTeacher, posts: Sequence[Sample]) -> dict[str, list[float] | None]:
    """Return the label probabilities of each post; None if they are unknown. Raises RunError if all are."""
    found: dict[str, list[float] | None] = dict.fromkeys(post.id for post in posts)
    any_known = False
    with progress("label distributions") as show, closing(scorer.scores(posts)) as answers:
        for done, (index, answer) in enumerate(answers, start=1):
            probabilities = found[posts[index].id] = _probabilities(answer)
            any_known = any_known or probabilities is not None
            show(done, len(posts))
            if not any_known and isinstance(scorer.teacher, Endpoint) and not scorer.teacher.returns_logprobs:
                break  # every further answer would be paid for in vain
    if not any_known:
        raise RunError(
            f"student.distillation: {scorer.name} gave label probabilities for none of the {len(posts)} posts; "
            "set label_teacher to assistant, or label_weight to 0"
        )
    return found


def _probabilities(answer: Answer) -> list[float] | None:
    """The label probabilities of an answer; None without an answer or without log-probabilities."""
    if answer.error is not None:
        return None
    probabilities, mass = read_scores(answer)
    return probabilities if mass > 0 and mass != UNKNOWN_CONFIDENCE else None


class _Assistant:
    """The assistant as a `Reasoner` that is loaded only if the ledger lacks an answer."""

    def __init__(self, context: Context) -> None:
        self.name = context.reasoner_name("assistant")
        self._context = context

    @cached_property
    def _reasoner(self) -> Local:
        return self._context.reasoner("assistant")

    def classify(self, samples: Sequence[Sample], earlier: Sequence[EarlierAnswers] | None = None) -> ClassScores:
        """See `Reasoner.classify`."""
        return self._reasoner.classify(samples, earlier)

    def reason(
        self, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, Answer]]:
        """See `Reasoner.reason`."""
        return self._reasoner.reason(samples, template, sampling)
