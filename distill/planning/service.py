"""The times of one replica of the gateway: those of batches by size, of the teacher's answers, and its shares."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from distill.serving.settings import ServeSettings

Times = Callable[[int], float]
"""Seconds of a batch by its size."""


def batch_times(measured: Mapping[int, float]) -> Times:
    """Times between measured sizes are linear.

    Beyond the largest size they grow as from the smallest to the largest, which a few batches of a rare size change
    little, and with one size alone in proportion to it; below the smallest size they are those of the smallest.
    """
    sizes = np.array(sorted(measured), dtype=float)
    seconds = np.array([measured[int(size)] for size in sizes])
    slope = (seconds[-1] - seconds[0]) / (sizes[-1] - sizes[0]) if len(sizes) > 1 else seconds[-1] / sizes[-1]

    def time(size: int) -> float:
        beyond = max(size - sizes[-1], 0.0) * max(slope, 0.0)
        return float(np.interp(size, sizes, seconds) + beyond)

    known = {size: time(size) for size in range(1, 257)}
    return lambda size: known[size] if size in known else time(size)


@dataclass(frozen=True)
class Service:
    """One replica.

    Attributes:
        settings: its queue, batches, deadline and circuit breaker.
        students: times of the student's batches by kind: classify, reason and explain.
        teacher_seconds: [N] times of the teacher's single answers, each as likely.
        teacher_batches: times of a teacher in the gateway's process; None: it is behind an endpoint.
        teacher_limit_s: seconds after which a request to the teacher is given up.
        long_s: a request that is unanswered after so many seconds has waited in vain.
        deferred: share of the posts that are deferred to the teacher.
        reviewed: share of the teacher's answers that are reviewed.
        explained: share of the student's rationales that cannot be used.
        rationale: whether rationales are written.
        overhead_s: seconds outside the models.
        student_threads: requests at once to a student behind an endpoint; 0: it is in the gateway's process.
        silent: whether a dead teacher leaves requests unanswered instead of refusing them.
    """

    settings: ServeSettings
    students: Mapping[str, Times]
    teacher_seconds: np.ndarray = field(default_factory=lambda: np.empty(0))
    teacher_batches: Times | None = None
    teacher_limit_s: float = np.inf
    long_s: float = np.inf
    deferred: float = 0.0
    reviewed: float = 0.0
    explained: float = 0.0
    rationale: bool = False
    overhead_s: float = 0.0
    student_threads: int = 0
    silent: bool = True

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher."""
        return self.teacher_batches is not None or len(self.teacher_seconds) > 0

    def student(self, kind: str, size: int) -> float:
        """Seconds of one batch of the student."""
        return self.students[kind](size)

    @property
    def student_s(self) -> float:
        """Seconds of the student for one post in full batches: the inverse of its highest rate."""
        size = 1 if self.student_threads else self.settings.batch_size
        shares = {"classify": 1.0}
        if self.rationale:
            shares |= {"reason": 1.0}
            shares |= {"explain": self.explained} if self.settings.explain == "student" else {}
        total = sum(share * self.student(kind, size) / size for kind, share in shares.items() if share)
        return total / max(self.student_threads, 1)

    @property
    def teacher_s(self) -> float:
        """Seconds of all connections to the teacher for one post: the inverse of the highest rate of posts."""
        calls = self.deferred * (1 + self.reviewed)
        if self.rationale and self.settings.explain == "teacher":
            calls += self.explained
        if self.teacher_batches is not None:
            return calls * self.teacher_batches(self.settings.batch_size) / self.settings.batch_size
        if not len(self.teacher_seconds):
            return 0.0
        seconds = float(np.minimum(self.teacher_seconds, self.teacher_limit_s).mean())
        return calls * seconds / self.settings.teacher_concurrency
