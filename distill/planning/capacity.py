"""Results of the simulation of a day: times and shares of its posts, and the number of replicas for a deadline."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from distill.planning.load import Stretch, parts
from distill.planning.service import Service
from distill.planning.simulation import Records, Replica

SHARE = 0.99
"""Share of the posts that are to be answered within the deadline."""

_IDLE = 0.02
"""Share of its time that a model works in the busiest stretch, below which more replicas change nothing."""


@dataclass(frozen=True)
class Figures:
    """Figures of the posts of some stretches.

    Attributes:
        posts: simulated posts, without their weights.
        rate: posts per second of all replicas together.
        p50, p99: seconds until an answer, of the posts that got one; NaN without any.
        in_time: share of all posts that were answered within the deadline.
        degraded: share of all posts that were answered without a teacher that was needed.
        refused: share of all posts that were refused with status 429.
        student_busy, teacher_busy: share of the time in which the student, and a connection to the teacher, worked.
    """

    posts: int
    rate: float
    p50: float
    p99: float
    in_time: float
    degraded: float
    refused: float
    student_busy: float
    teacher_busy: float


@dataclass(frozen=True)
class Day:
    """A simulated day of one number of replicas."""

    replicas: int
    stretches: list[Stretch]
    records: Records
    service: Service
    deadline_s: float

    def figures(self, chosen: Collection[int] | None = None) -> Figures:
        """The figures of the posts that arrived in some stretches; None: in all."""
        chosen = range(len(self.stretches)) if chosen is None else chosen
        records = self.records
        mask = np.isin(records.stretch, list(chosen))
        weight, seconds = np.array(records.weight)[mask], np.array(records.seconds)[mask]
        outcome = np.array(records.outcome)[mask]
        total, refused = weight.sum(), outcome == "refused"
        answered = ~refused
        length = sum(self.stretches[index].seconds for index in chosen)
        posts = sum(self.stretches[index].seconds * self.stretches[index].rate for index in chosen)
        p50, p99 = (weighted_quantile(seconds[answered], weight[answered], level) for level in (0.5, 0.99))

        def share(of: np.ndarray) -> float:
            return float(weight[of].sum() / total) if total else float("nan")

        settings, remote = self.service.settings, self.service.teacher_batches is None
        connections = settings.teacher_concurrency if remote else 1
        student, teacher = (
            sum(busy[index] for index in chosen) / length for busy in (records.student_busy, records.teacher_busy)
        )
        return Figures(
            posts=int(mask.sum()),
            rate=posts / length,
            p50=p50,
            p99=p99,
            in_time=share(answered & (seconds <= self.deadline_s)),
            degraded=share(outcome == "degraded"),
            refused=share(refused),
            student_busy=student / max(self.service.student_threads, 1),
            teacher_busy=teacher / connections,
        )

    @property
    def meets(self) -> bool:
        """Whether the share of posts that are answered in time is as wanted."""
        return not self.records.stopped and self.figures().in_time >= SHARE


def simulate_day(
    service: Service, stretches: list[Stretch], replicas: int, sample_s: float, deadline_s: float, seed: int,
    *, until_missed: bool = False,
) -> Day:  # fmt: skip
    """Simulate one replica of several for a day.

    Args:
        deadline_s: seconds within which posts are to be answered; those of the gateway are in its settings.
        until_missed: end as soon as too many posts are late or refused.
    """
    arrivals, choices = (np.random.default_rng([seed, stream]) for stream in (0, 1))
    expected = sum(stretch.rate * stretch.seconds for stretch in stretches) / replicas
    missed, read = 0.0, 0

    def stop(records: Records) -> bool:
        nonlocal missed, read
        for index in range(read, len(records.weight)):
            late = records.outcome[index] == "refused" or records.seconds[index] > deadline_s
            missed += records.weight[index] * late
        read = len(records.weight)
        return until_missed and missed > 1.2 * (1 - SHARE) * expected

    replica = Replica(service, [stretch.dead for stretch in stretches], choices)
    records = replica.run(parts(stretches, replicas, sample_s, arrivals), stop)
    return Day(replicas, stretches, records, service, deadline_s)


def smallest(
    service: Service, stretches: list[Stretch], sample_s: float, deadline_s: float, seed: int
) -> Iterator[Day]:
    """Simulate numbers of replicas until the smallest one is found that answers enough posts in time.

    Yields the days in the order in which they are simulated. The smallest number is that of a day that `meets`; if none
    does, the last day is one in which the models have next to no load, and no number of replicas suffices.
    """
    mean = sum(one.rate * one.seconds for one in stretches) / sum(one.seconds for one in stretches)
    peak = max(one.rate for one in stretches)
    low = int(SHARE * mean * service.student_s)  # so many cannot label the posts of the day, whatever their order is
    load = max(service.student_s, service.teacher_s)
    high = max(low + 1, round(peak * load))
    while True:
        idle = peak / high * load < _IDLE
        day = simulate_day(service, stretches, high, sample_s, deadline_s, seed, until_missed=not idle)
        yield day
        if day.meets:
            break
        if idle:
            return
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        day = simulate_day(service, stretches, middle, sample_s, deadline_s, seed, until_missed=True)
        yield day
        low, high = (low, middle) if day.meets else (middle, high)


def weighted_quantile(values: np.ndarray, weights: np.ndarray, level: float) -> float:
    """The smallest value up to which the weights sum to at least `level` of all; NaN without values."""
    if not len(values):
        return float("nan")
    order = np.argsort(values)
    sums = np.cumsum(weights[order])
    return float(values[order][min(np.searchsorted(sums, level * sums[-1]), len(values) - 1)])
