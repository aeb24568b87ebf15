"""The cascade on single posts, within a deadline: student first, then the teacher if it is needed and available."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from distill.cascade.cascade import CascadePolicy, Decision, Prediction, modalities_of
from distill.models.encoding import Prompt
from distill.models.endpoint import Endpoint
from distill.models.local import Completion, Local
from distill.models.reasoner import Answer, ClassScores, Cost, Reasoner, Sampling
from distill.serving.batcher import Batcher, DeadlineExceeded, wait_for_result
from distill.serving.breaker import CircuitBreaker
from distill.serving.metrics import Metrics
from distill.serving.result import CascadeResult, Explanation
from distill.serving.settings import ServeSettings
from distill.serving.tracing import Tracing, prediction_attributes
from distill.task.prompts import EarlierAnswers, Template
from distill.task.rationale import InvalidRationale, Rationale, check
from distill.task.sample import Sample

log = logging.getLogger(__name__)

_LABEL, _CHAT, _REASON = range(3)
"""Priorities of the student's batches: every result needs a label, and a rationale is optional."""


class Overloaded(Exception):
    """The student did not answer by the deadline."""


class StudentUnavailable(Exception):
    """A student behind an endpoint did not answer."""


@dataclass(frozen=True)
class _ChatBatch:
    """Batch key of chat prompts: prompts with equal keys may share a batch."""

    sampling: Sampling
    logprobs: int
    token_ids: tuple[int, ...]
    beginning: str
    unique: object = None


class CascadeService:
    """Runs student and teacher with dynamic batching. A model in this process has one thread."""

    def __init__(
        self,
        settings: ServeSettings,
        policy: CascadePolicy,
        student: Reasoner,
        teacher: Reasoner | None,
        metrics: Metrics,
        tracing: Tracing | None = None,
    ) -> None:
        self.policy = policy
        self.local = student if isinstance(student, Local) else None
        self._settings, self._metrics, self._tracing = settings, metrics, tracing or Tracing()
        self._models = (student, teacher)
        self._student = self._batcher(student, self._time_student, "student", metrics)
        self._teacher = self._batcher(teacher, self._run_teacher, "teacher") if teacher is not None else None
        self.breaker = CircuitBreaker(settings.breaker_failures, settings.breaker_retry_s) if teacher else None
        metrics.watch(self.breaker)
        for role, model in (("student", student), ("teacher", teacher)):
            if isinstance(model, Endpoint):
                metrics.watch_endpoint(role, model)
        self._teacher_available = True
        patience_s = settings.answer_s
        if isinstance(teacher, Endpoint):
            patience_s = min(patience_s, teacher.settings.timeout_s)
        self._long_s = patience_s / 2  # a request that is unanswered after this has waited in vain

    @property
    def vocabulary(self) -> int:
        """Vocabulary size of a student in this process; 0 for a student behind an endpoint."""
        return len(self.local.backbone.processor.tokenizer) if self.local else 0

    async def classify(self, sample: Sample, deadline: float, rationale: bool = True) -> CascadeResult:
        """Classify one post by a deadline on the clock of `time.monotonic`.

        Args:
            rationale: whether a rationale is generated.

        Raises:
            Overloaded: the student did not classify the post by the deadline.
            StudentUnavailable: the student did not answer.
        """
        with self._tracing.span("student") as note:
            student: Prediction = await self._ask_student("classify", sample, deadline)
            note(**prediction_attributes(student))
        reasoning = asyncio.create_task(self._reason("reason", sample, deadline)) if rationale else None
        try:
            decision = self.policy.accept_student(student) or await self._defer(sample, student, deadline)
            if decision.stage == "student" and not student.answered:
                raise StudentUnavailable("the student did not answer")
            answer = await reasoning if reasoning else None
        finally:
            if reasoning:
                reasoning.cancel()
        label, value = self.policy.labels.decide(decision.probabilities)
        explanation = (
            await self._explain(replace(sample, label=label), answer, deadline) if rationale else Explanation()
        )
        return CascadeResult(decision, label, value, explanation, self._price(decision, explanation))

    async def complete(
        self,
        prompt: Prompt,
        sampling: Sampling,
        logprobs: int,
        token_ids: Sequence[int],
        deadline: float,
        beginning: str = "",
    ) -> Completion:
        """The student's answer to a prompt, or what follows the beginning of the answer. Raises Overloaded."""
        # with sampling the result must not depend on the other prompts of a batch
        unique = object() if sampling.temperature > 0 else None
        kind = _ChatBatch(sampling, logprobs, tuple(token_ids), beginning, unique)
        return await self._ask_student(kind, prompt, deadline, _CHAT)

    async def tokenize(self, text: str, deadline: float) -> list[int]:
        """Token ids of a text by the student's tokenizer. Raises Overloaded."""
        return await self._ask_student("tokenize", text, deadline)

    async def warm(self) -> None:
        """Run the student once, without a deadline.

        Raises:
            Exception: the student cannot answer.
        """
        sample = Sample("warm", "A first post.")
        await asyncio.wrap_future(self._student.submit("classify", sample))
        if self._settings.rationale:
            await asyncio.wrap_future(self._student.submit("reason", sample))

    def close(self) -> None:
        """End the threads; calls of the teacher that take longer than the deadline are abandoned."""
        for batcher in (self._student, self._teacher):
            if batcher is not None:
                batcher.close(self._settings.deadline_s)

    async def _defer(self, sample: Sample, student: Prediction, deadline: float) -> Decision:
        """Stages 2 and 3 of the cascade."""
        if self._teacher is None:
            return self.policy.fallback_to_student(student, "there is no teacher")
        teacher, reason = await self._ask_teacher("classify", (sample, None), self._no_prediction, deadline)
        if teacher is None or reason:
            return self.policy.fallback_to_student(student, reason, teacher)
        if decision := self.policy.accept_teacher(student, teacher):
            return decision
        earlier = self.policy.earlier_answers(student, teacher)
        review, _ = await self._ask_teacher("review", (sample, earlier), self._no_prediction, deadline)
        if review is None:
            return replace(self.policy.accept_review(student, teacher, self._no_prediction(Cost())), review=None)
        return self.policy.accept_review(student, teacher, review)

    async def _explain(self, sample: Sample, answer: Answer | None, deadline: float) -> Explanation:
        """The rationale for the label of a post: the student's answer, or an explanation (`serve.explain`)."""
        cost, by = answer.cost if answer else Cost(), self._settings.explain
        if found := self._rationale(answer, sample):
            return Explanation(found, "student", cost)
        if by == "student":
            answer = await self._reason("explain", sample, deadline)
            found = self._rationale(answer, sample)
            return Explanation(found, by if found else None, cost + (answer.cost if answer else Cost()))
        if by == "teacher" and self._teacher is not None:
            answer, _ = await self._ask_teacher(self.policy.explaining, (sample, None), _no_answer, deadline)
            found = self._rationale(answer, sample)
            return Explanation(found, by if found else None, cost, answer.cost if answer else None)
        return Explanation(student=cost)

    async def _ask_teacher(
        self, kind: str, item: tuple[Sample, EarlierAnswers | None], unanswered: Callable[[Cost], Any], deadline: float
    ) -> tuple[Any, str]:
        """The teacher's prediction or explanation and, if it did not answer, the reason.

        The reply is None if the teacher did not receive the request.
        """
        name = {"classify": "teacher", "review": "review"}.get(kind, "rationale")
        with self._tracing.span(name, by="teacher") as note:
            reply, reason = await self._call_teacher(kind, item, unanswered, deadline)
            note(**prediction_attributes(reply), reason=reason or None)
            return reply, reason

    async def _call_teacher(
        self, kind: str, item: tuple[Sample, EarlierAnswers | None], unanswered: Callable[[Cost], Any], deadline: float
    ) -> tuple[Any, str]:
        assert self._teacher is not None and self.breaker is not None
        admitted = self.breaker.admit()
        if admitted is None:
            return None, "the teacher is suspended"
        begin, reply, begun = time.monotonic(), None, True
        reason = "the teacher did not answer"
        try:
            reply = await wait_for_result(self._teacher.submit(kind, item), deadline)
        except DeadlineExceeded as error:
            begun = error.begun
            reason = "the teacher was late" if begun else "the teacher is busy"
        except Exception as error:  # noqa: BLE001 - whatever the error, the student's answer is final
            if self._teacher_available:
                log.warning("the teacher failed: %s", error)
        finally:
            seconds = time.monotonic() - begin
            answered = reply is not None and reply.answered
            self.breaker.report(admitted, answered, begun and seconds >= self._long_s)
        if not begun:
            return None, reason
        self._teacher_available = answered
        return reply or unanswered(Cost(1, seconds=seconds)), "" if answered else reason

    async def _reason(self, kind: Literal["reason", "explain"], sample: Sample, deadline: float) -> Answer | None:
        """The student's generated rationale; None if it fails, because the label does not depend on it."""
        try:
            with self._tracing.span("rationale", by="student", template=kind):
                return await wait_for_result(self._student.submit(kind, sample, _REASON), deadline)
        except DeadlineExceeded:
            return None
        except Exception as error:  # noqa: BLE001 - the label is returned without a rationale
            log.warning("the student failed to generate a rationale: %s", error)
            return None

    def _rationale(self, answer: Answer | None, sample: Sample) -> Rationale | None:
        """The parsed rationale; None if it is missing, invalid or predicts another label than that of the post."""
        if answer is None or not answer.answered:
            return None
        try:
            return check(answer.text, self.policy.labels, sample.label, finished=answer.finished, post=sample.text)
        except InvalidRationale:
            return None

    async def _ask_student(self, kind: Any, item: Any, deadline: float, priority: int = _LABEL) -> Any:
        try:
            return await wait_for_result(self._student.submit(kind, item, priority), deadline)
        except DeadlineExceeded:
            raise Overloaded("the student did not answer in time") from None
        except Exception as error:
            if self.local is not None:
                raise
            raise StudentUnavailable(f"the student did not answer: {error}") from error

    def _time_student(self, kind: Any, items: list[Any]) -> Sequence[Any]:
        begin = time.monotonic()
        results = self._run_student(kind, items)
        self._metrics.batch_seconds(_name(kind), len(items), time.monotonic() - begin)
        return results

    def _run_student(self, kind: Any, items: list[Any]) -> Sequence[Any]:
        student = self._models[0]
        if kind == "classify":
            return self.policy.student_predictions(student.classify(items), modalities_of(items))
        if kind in ("reason", "explain"):
            return self._generate(student, items, kind)
        assert self.local is not None
        if kind == "tokenize":
            return [self.local.tokenize(text) for text in items]
        return self.local.chat(items, kind.sampling, kind.logprobs, kind.token_ids, kind.beginning)

    def _run_teacher(self, kind: Any, items: list[tuple[Sample, EarlierAnswers]]) -> Sequence[Prediction | Answer]:
        teacher = self._models[1]
        assert teacher is not None
        samples, earlier = zip(*items, strict=True)
        if kind in ("explain", "predict"):
            return self._generate(teacher, samples, kind)
        scores = teacher.classify(samples, earlier if kind == "review" else None)
        return self.policy.teacher_predictions(scores, modalities_of(samples))

    def _generate(self, model: Reasoner, samples: Sequence[Sample], template: Template) -> list[Answer]:
        answers = dict(model.reason(samples, template, Sampling(max_new_tokens=self._settings.max_new_tokens)))
        return [answers[index] for index in range(len(samples))]

    def _batcher(self, model: Reasoner, work: Any, name: str, metrics: Metrics | None = None) -> Batcher:
        """Batches on one thread for a model in this process; single requests on several threads for an endpoint."""

        def observe(kind: Any, size: int) -> None:
            if metrics is not None:
                metrics.batch(_name(kind), size)

        settings = self._settings
        if not isinstance(model, Endpoint):
            return Batcher(work, settings.batch_size, settings.batch_wait_ms / 1000, name=name, observe=observe)
        threads = settings.teacher_concurrency if name == "teacher" else model.settings.concurrency
        return Batcher(work, 1, 0.0, threads=threads, name=name, observe=observe)

    def _no_prediction(self, cost: Cost) -> Prediction:
        """A teacher's prediction without an answer."""
        count = len(self.policy.labels)
        scores = ClassScores(np.full((1, count), 1 / count), np.zeros(1), (cost,))
        return self.policy.teacher_predictions(scores)[0]

    def _price(self, decision: Decision, explanation: Explanation) -> float | None:
        teacher = self._models[1]
        if not isinstance(teacher, Endpoint):
            return None
        total = decision.teacher_cost + (explanation.teacher or Cost())
        return teacher.cost(total.prompt_tokens, total.completion_tokens)


def _name(kind: Any) -> str:
    """The kind of a student's batch in the metrics."""
    return kind if isinstance(kind, str) else "chat"


def _no_answer(cost: Cost) -> Answer:
    """A teacher's explanation without an answer."""
    return Answer("", False, error="no answer", calls=cost.calls, seconds=cost.seconds)
