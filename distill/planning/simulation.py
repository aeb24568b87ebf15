"""A discrete-event simulation of the gateway (`distill.serving`) with simpy: batches, admission, deadlines, breaker.

It has the parts of one replica and calls them by the same rules: `Batches` is `serving.batcher.Batcher`, `Replica` is
`serving.admission` and `serving.cascade_service`, and the circuit breaker is the gateway's own on the simulated clock.
The time of a batch is its mean by kind and size; that of a teacher behind an endpoint is drawn from measured ones.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import simpy

from distill.planning.load import Part
from distill.planning.service import Service
from distill.serving.breaker import CircuitBreaker

Process = Generator[simpy.Event, Any, Any]
Outcome = Literal["answered", "degraded", "refused"]


@dataclass(eq=False)
class Job:
    """An item in a queue. `done` has the value True when its batch has ended, False at its deadline if that is sooner.

    `answered` is False if the model returned no answer.
    """

    kind: str
    priority: int
    submitted: float
    done: simpy.Event
    begun: bool = False
    cancelled: bool = False
    answered: bool = True


class Batches:
    """`serving.batcher.Batcher` in simulated time.

    Args:
        work: the seconds that a batch takes; may set `answered` of its jobs.
        busy: called with the seconds of each batch.
    """

    def __init__(
        self,
        env: simpy.Environment,
        work: Callable[[list[Job]], float],
        size: int,
        wait_s: float,
        threads: int = 1,
        busy: Callable[[float, int], None] = lambda seconds, size: None,
    ) -> None:
        self._env, self._work, self._size, self._wait_s, self._busy = env, work, size, wait_s, busy
        self._waiting: list[Job] = []
        self._idle: deque[simpy.Event] = deque()
        for _ in range(threads):
            env.process(self._run())

    def submit(self, kind: str, priority: int = 0) -> Job:
        """Queue an item."""
        job = Job(kind, priority, self._env.now, self._env.event())
        self._waiting.append(job)
        while self._idle:
            idle = self._idle.popleft()
            if not idle.triggered:
                idle.succeed()
                break
        return job

    def _run(self) -> Process:
        while True:
            batch = self._next_batch()
            left = batch[0].submitted + self._wait_s - self._env.now if batch else None
            if left is not None and (left <= 1e-12 or len(batch) == self._size):
                self._waiting = [job for job in self._waiting if job not in batch]
                for job in batch:
                    job.begun = True
                seconds = self._work(batch)
                self._busy(seconds, len(batch))
                yield self._env.timeout(seconds)
                for job in batch:
                    if not job.done.triggered:
                        job.done.succeed(True)
                continue
            changed = self._env.event()
            self._idle.append(changed)
            if left is not None:
                self._env.timeout(left).callbacks.append(lambda _, event=changed: event.triggered or event.succeed())
            yield changed

    def _next_batch(self) -> list[Job]:
        self._waiting = [job for job in self._waiting if not job.cancelled]
        first = min(self._waiting, key=lambda job: job.priority, default=None)
        return [job for job in self._waiting if first is not None and job.kind == first.kind][: self._size]


@dataclass(eq=False)
class _Request:
    """A request in flight: its deadline, and the jobs that it waits for."""

    deadline: float
    jobs: list[Job] = field(default_factory=list)
    ended: bool = False


@dataclass
class Records:
    """One entry for each post, in the order in which they ended.

    Attributes:
        stretch: index of the stretch in which the post arrived.
        weight: number of posts that it stands for.
        seconds: time until the answer.
        outcome: of the post.
        reasons: why answers are degraded or posts refused, with their weights.
        student_busy, teacher_busy: seconds in which the models worked, weighted, by stretch.
        stopped: whether the simulation ended before the last part.
    """

    stretch: list[int] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    outcome: list[Outcome] = field(default_factory=list)
    reasons: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    student_busy: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    teacher_busy: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    stopped: bool = False


class Replica:
    """One gateway in simulated time."""

    def __init__(self, service: Service, dead: Sequence[bool], rng: np.random.Generator) -> None:
        self.env = env = simpy.Environment()
        self.records = Records()
        self._service, self._dead, self._rng = service, dead, rng
        settings = service.settings
        student_size = 1 if service.student_threads else settings.batch_size
        student_wait = 0.0 if service.student_threads else settings.batch_wait_ms / 1000
        self._student = Batches(
            env, self._student_work, student_size, student_wait, service.student_threads or 1, self._student_busy
        )
        remote = service.teacher_batches is None
        self._teacher = Batches(
            env,
            self._teacher_work,
            1 if remote else settings.batch_size,
            0.0 if remote else settings.batch_wait_ms / 1000,
            settings.teacher_concurrency if remote else 1,
            self._teacher_busy,
        )
        self._breaker = CircuitBreaker(
            settings.breaker_failures, settings.breaker_retry_s, lambda: env.now, warn=lambda *_: None
        )
        self._in_flight = 0
        self._part = Part(0, 0.0, 1.0, np.empty(0))
        self._deadlines: deque[_Request] = deque()  # equal limits, so the first to arrive is the first to expire
        self._expiring = False

    def run(self, parts: Iterable[Part], stop: Callable[[Records], bool] = lambda records: False) -> Records:
        """Simulate the parts one after the other, until all posts have ended or `stop` says so after a part."""
        self.env.process(self._arrivals(parts, stop))
        self.env.run()
        return self.records

    def _arrivals(self, parts: Iterable[Part], stop: Callable[[Records], bool]) -> Process:
        for part in parts:
            self._part, begin = part, self.env.now
            for seconds in part.arrivals:
                yield self.env.timeout(max(begin + seconds - self.env.now, 0.0))
                self.env.process(self._post(part))
            yield self.env.timeout(max(begin + part.seconds - self.env.now, 0.0))
            if stop(self.records):
                self.records.stopped = True
                return

    # ---- what the gateway does with a post ----

    def _post(self, part: Part) -> Process:
        """Admission and the answer; see `AdmissionControl.admit`."""
        settings, begin = self._service.settings, self.env.now
        if self._in_flight >= settings.queue:
            self._record(part, 0.0, "refused", "the queue is full")
            return
        self._in_flight += 1
        request = _Request(begin + settings.answer_s)
        self._deadlines.append(request)
        if not self._expiring:
            self._expiring = True
            self.env.process(self._expire())
        outcome, reason = yield from self._classify(request)
        request.ended = True
        self._in_flight -= 1
        self._record(part, self.env.now - begin + self._service.overhead_s, outcome, reason)

    def _classify(self, request: _Request) -> Generator[simpy.Event, Any, tuple[Outcome, str]]:
        """See `CascadeService.classify`."""
        service = self._service
        if not (yield from self._wait(request, self._student.submit("classify", 0))):
            return "refused", "the student was late"
        reasoning = None
        if service.rationale:
            reasoning = self._student.submit("reason", 2)
            self._watch(request, reasoning)
        reason = ""
        if self._rng.random() < service.deferred:
            reason = yield from self._defer(request)
        reasoned = reasoning is not None and (yield reasoning.done)
        if service.rationale and (not reasoned or self._rng.random() < service.explained):
            if service.settings.explain == "student":
                yield from self._wait(request, self._student.submit("explain", 2))
            elif service.settings.explain == "teacher" and service.has_teacher:
                yield from self._ask_teacher(request)
        return ("degraded", reason) if reason else ("answered", "")

    def _defer(self, request: _Request) -> Generator[simpy.Event, Any, str]:
        """Stages 2 and 3; returns why the answer is degraded, or nothing. See `CascadeService._defer`."""
        if not self._service.has_teacher:
            return "there is no teacher"
        if (reason := (yield from self._ask_teacher(request))) or self._rng.random() >= self._service.reviewed:
            return reason
        return (yield from self._ask_teacher(request)) and "the review was not answered"

    def _ask_teacher(self, request: _Request) -> Generator[simpy.Event, Any, str]:
        """Returns why the teacher did not answer, or nothing. See `CascadeService._ask_teacher`."""
        admitted = self._breaker.admit()
        if admitted is None:
            return "the teacher is suspended"
        begin, job = self.env.now, self._teacher.submit("teacher")
        finished = yield from self._wait(request, job)
        answered = finished and job.answered
        waited = (finished or job.begun) and self.env.now - begin >= self._service.long_s
        self._breaker.report(admitted, answered, waited)
        if finished:
            return "" if answered else "the teacher did not answer"
        return "the teacher was late" if job.begun else "the teacher is busy"

    # ---- deadlines ----

    def _wait(self, request: _Request, job: Job) -> Generator[simpy.Event, Any, bool]:
        """Whether a job has ended by the deadline; see `wait_for_result`."""
        self._watch(request, job)
        return bool((yield job.done))

    def _watch(self, request: _Request, job: Job) -> None:
        request.jobs.append(job)
        if self.env.now >= request.deadline:
            self._give_up(request)

    def _expire(self) -> Process:
        """Give up the requests at their deadlines, one after the other."""
        while self._deadlines:
            request = self._deadlines[0]
            if not request.ended and request.deadline > self.env.now:
                yield self.env.timeout(request.deadline - self.env.now)
            if not request.ended:
                self._give_up(request)
            self._deadlines.popleft()
        self._expiring = False

    def _give_up(self, request: _Request) -> None:
        for job in request.jobs:
            if not job.done.triggered:
                job.cancelled = not job.begun  # a batch that has begun goes on
                job.done.succeed(False)

    # ---- times and records ----

    def _student_work(self, jobs: list[Job]) -> float:
        return self._service.student(jobs[0].kind, len(jobs))

    def _teacher_work(self, jobs: list[Job]) -> float:
        service = self._service
        if self._dead[self._part.stretch]:
            for job in jobs:
                job.answered = False
            return service.teacher_limit_s if service.silent else 0.0
        if service.teacher_batches is not None:
            return service.teacher_batches(len(jobs))
        seconds = float(service.teacher_seconds[self._rng.integers(len(service.teacher_seconds))])
        jobs[0].answered = seconds < service.teacher_limit_s
        return min(seconds, service.teacher_limit_s)

    def _student_busy(self, seconds: float, size: int) -> None:
        self.records.student_busy[self._part.stretch] += seconds * self._part.weight

    def _teacher_busy(self, seconds: float, size: int) -> None:
        self.records.teacher_busy[self._part.stretch] += seconds * self._part.weight

    def _record(self, part: Part, seconds: float, outcome: Outcome, reason: str) -> None:
        records = self.records
        records.stretch.append(part.stretch)
        records.weight.append(part.weight)
        records.seconds.append(seconds)
        records.outcome.append(outcome)
        if reason:
            records.reasons[reason] += part.weight
