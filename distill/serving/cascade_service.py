"""One post through the rules of the cascade, within a deadline: the student always, the teacher where it can be had."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from distill.cascade.cascade import CascadePolicy, Decision, Prediction
from distill.models.encoding import Prompt
from distill.models.endpoint import Endpoint
from distill.models.local import Completion, Local
from distill.models.reasoner import Answer, ClassScores, Cost, Reasoner, Sampling
from distill.serving.batcher import Batcher, DeadlineExceeded, result
from distill.serving.metrics import Metrics
from distill.serving.settings import ServeSettings
from distill.task.prompts import EarlierAnswers
from distill.task.rationale import InvalidRationale, Rationale, check
from distill.task.sample import Sample

log = logging.getLogger(__name__)

_LABEL, _CHAT, _REASON = range(3)
"""What the student does first: every answer needs a label, and may go without a rationale."""


class Overloaded(Exception):
    """Not even the student has answered in time."""


class StudentUnavailable(Exception):
    """The student, behind an endpoint of its own, cannot be had."""


@dataclass(frozen=True)
class CascadeResult:
    """A decision with its label, the student's rationale where it argues for that label, and what both took.

    `value` is on the scale, where labels are one. `price` is in the currency of the teacher's prices; None without.
    """

    decision: Decision
    label: str
    value: float | None
    rationale: Rationale | None
    cost: Cost
    price: float | None

    @property
    def prediction(self) -> Prediction:
        """Of the model that answered."""
        found = {"student": self.decision.student, "teacher_first": self.decision.teacher}
        prediction = found.get(self.decision.stage, self.decision.review)
        assert prediction is not None
        return prediction


@dataclass(frozen=True)
class _Chat:
    """A way of answering prompts verbatim; requests that share it may share a batch."""

    sampling: Sampling
    logprobs: int
    token_ids: tuple[int, ...]
    alone: object = None


class CascadeService:
    """Student and teacher in service. Each model on this machine has one thread, on which its questions are batched."""

    def __init__(
        self,
        settings: ServeSettings,
        policy: CascadePolicy,
        student: Reasoner,
        teacher: Reasoner | None,
        metrics: Metrics,
    ) -> None:
        self.policy = policy
        self.local = student if isinstance(student, Local) else None
        self._settings = settings
        self._models = (student, teacher)
        self._student = self._batcher(student, self._ask_student, "student", metrics)
        self._teacher = self._batcher(teacher, self._ask_teacher, "teacher") if teacher is not None else None
        self._teacher_answers = True

    @property
    def vocabulary(self) -> int:
        """Number of tokens that a student on this machine knows; 0 for another."""
        return len(self.local.backbone.processor.tokenizer) if self.local else 0

    async def judge(self, sample: Sample, by: float, rationale: bool = True) -> CascadeResult:
        """The verdict on one post, before `by` (of `time.monotonic`).

        Raises:
            Overloaded: the student has not classified it by then.
            StudentUnavailable: the student cannot be had.
        """
        student: Prediction = await self._student_says("classify", sample, by)
        reasoning = asyncio.create_task(self._reasoning(sample, by)) if rationale else None
        try:
            decision = self.policy.first(student) or await self._deferred(sample, student, by)
            if decision.stage == "student" and not student.answered:
                raise StudentUnavailable("the student did not answer")
            answer = await reasoning if reasoning else None
        finally:
            if reasoning:
                reasoning.cancel()
        label, value = self._label(decision)
        cost = decision.cost + (answer.cost if answer else Cost())
        return CascadeResult(decision, label, value, self._argues(answer, label), cost, self._price(decision))

    async def complete(
        self, prompt: Prompt, sampling: Sampling, logprobs: int, token_ids: Sequence[int], by: float
    ) -> Completion:
        """The student's own answer to a prompt. Raises Overloaded."""
        # what is drawn must not depend on who shares the batch
        kind = _Chat(sampling, logprobs, tuple(token_ids), object() if sampling.temperature > 0 else None)
        return await self._student_says(kind, prompt, by, _CHAT)

    async def tokenize(self, text: str, by: float) -> list[int]:
        """The student's tokens of a text. Raises Overloaded."""
        return await self._student_says("tokenize", text, by)

    async def warm(self) -> None:
        """Let the student answer once, however long that takes.

        Raises:
            Exception: the student cannot answer.
        """
        sample = Sample("warm", "A first post.")
        await asyncio.wrap_future(self._student.submit("classify", sample))
        if self._settings.rationale:
            await asyncio.wrap_future(self._student.submit("reason", sample))

    def close(self) -> None:
        """End the threads; a teacher that is still at work is left behind after the deadline."""
        for batcher in (self._student, self._teacher):
            if batcher is not None:
                batcher.close(self._settings.deadline_s)

    async def _deferred(self, sample: Sample, student: Prediction, by: float) -> Decision:
        """Stages 2 and 3, by the cascade's policy."""
        if self._teacher is None:
            return self.policy.without_teacher(student, "there is no teacher")
        first, why = await self._teacher_says(sample, None, by)
        if first is None or why:
            return self.policy.without_teacher(student, why, first)
        if decision := self.policy.second(student, first):
            return decision
        review, _ = await self._teacher_says(sample, self.policy.earlier(student, first), by)
        if review is None:
            return replace(self.policy.third(student, first, self._unanswered(Cost())), review=None)
        return self.policy.third(student, first, review)

    async def _teacher_says(
        self, sample: Sample, earlier: EarlierAnswers | None, by: float
    ) -> tuple[Prediction | None, str]:
        """A prediction and why there is none, else nothing: None where the teacher was never asked."""
        assert self._teacher is not None
        begin = time.monotonic()
        future = self._teacher.submit("classify" if earlier is None else "review", (sample, earlier))
        why = "the teacher did not answer"
        try:
            prediction: Prediction = await result(future, by)
        except DeadlineExceeded as late:
            if not late.begun:
                return None, "the teacher is busy"
            why = "the teacher was late"
        except Exception as error:  # noqa: BLE001 - whatever ails the teacher, the student's answer stands
            if self._teacher_answers:
                log.warning("the teacher fails: %s", error)
        else:
            self._teacher_answers = prediction.answered
            return prediction, "" if prediction.answered else why
        self._teacher_answers = False
        return self._unanswered(Cost(1, seconds=time.monotonic() - begin)), why

    async def _reasoning(self, sample: Sample, by: float) -> Answer | None:
        try:
            return await result(self._student.submit("reason", sample, _REASON), by)
        except DeadlineExceeded:
            return None
        except Exception as error:  # noqa: BLE001 - the label is the answer, and stands without its reasons
            log.warning("the student does not reason: %s", error)
            return None

    def _argues(self, answer: Answer | None, label: str) -> Rationale | None:
        """The student's rationale where it is one and argues for the label."""
        if answer is None or answer.error is not None:
            return None
        try:
            return check(answer.text, self.policy.labels, label, finished=answer.finished)
        except InvalidRationale:
            return None

    async def _student_says(self, kind: Any, item: Any, by: float, rank: int = _LABEL) -> Any:
        try:
            return await result(self._student.submit(kind, item, rank), by)
        except DeadlineExceeded:
            raise Overloaded("the student has not answered in time") from None
        except Exception as error:
            if self.local is not None:
                raise
            raise StudentUnavailable(f"the student did not answer: {error}") from error

    def _ask_student(self, kind: Any, items: list[Any]) -> Sequence[Any]:
        student = self._models[0]
        if kind == "classify":
            return self.policy.student(student.classify(items))
        if kind == "reason":
            answers = dict(student.reason(items, "reason", Sampling(max_new_tokens=self._settings.max_new_tokens)))
            return [answers[index] for index in range(len(items))]
        assert self.local is not None
        if kind == "tokenize":
            return [self.local.tokenize(text) for text in items]
        return self.local.chat(items, kind.sampling, kind.logprobs, kind.token_ids)

    def _ask_teacher(self, kind: str, items: list[tuple[Sample, EarlierAnswers]]) -> list[Prediction]:
        teacher = self._models[1]
        assert teacher is not None
        samples, earlier = zip(*items, strict=True)
        return self.policy.teacher(teacher.classify(samples, earlier if kind == "review" else None))

    def _batcher(self, model: Reasoner, work: Any, name: str, metrics: Metrics | None = None) -> Batcher:
        """For a model on this machine batches on one thread; for an endpoint single questions on several."""

        def observe(kind: Any, size: int) -> None:
            if metrics is not None:
                metrics.batch(kind if isinstance(kind, str) else "chat", size)

        settings = self._settings
        if not isinstance(model, Endpoint):
            return Batcher(work, settings.batch_size, settings.batch_wait_ms / 1000, name=name, observe=observe)
        threads = settings.teacher_concurrency if name == "teacher" else model.settings.concurrency
        return Batcher(work, 1, 0.0, threads=threads, name=name, observe=observe)

    def _label(self, decision: Decision) -> tuple[str, float | None]:
        """The label's name, and on a scale the value, which falls into the bin of that name."""
        found, scale = self.policy.label(decision.probabilities), self.policy.labels.scale
        if isinstance(found, str) or scale is None:
            return str(found), None
        value = min(max(found, scale.low), scale.high)  # rounding may leave the scale
        return self.policy.labels.name(value), value

    def _unanswered(self, cost: Cost) -> Prediction:
        count = len(self.policy.labels)
        return self.policy.teacher(ClassScores(np.full((1, count), 1 / count), np.zeros(1), (cost,)))[0]

    def _price(self, decision: Decision) -> float | None:
        teacher = self._models[1]
        if not isinstance(teacher, Endpoint):
            return None
        asked = [prediction.cost for prediction in (decision.teacher, decision.review) if prediction is not None]
        total = sum(asked, Cost())
        return teacher.cost(total.prompt_tokens, total.completion_tokens)
