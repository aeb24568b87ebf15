"""The load of a day as stretches of time in which posts arrive at a constant rate, and the posts in them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from distill.scale_settings import LoadSettings

DAY_S = 86_400.0
POSTS_PER_STRETCH = 2000
"""A part of a stretch that is simulated has at least so many posts, if the stretch has them."""


@dataclass(frozen=True)
class Stretch:
    """A time of the day with a constant load.

    Attributes:
        start, seconds: begin and length, in seconds of the day.
        rate: posts per second, of all replicas together.
        burst: whether the rate is that of a burst.
        dead: whether the teacher is dead.
    """

    start: float
    seconds: float
    rate: float
    burst: bool = False
    dead: bool = False


@dataclass(frozen=True)
class Part:
    """A part of a stretch that is simulated.

    Attributes:
        stretch: index of the stretch.
        seconds: length of the part.
        weight: number of equal parts of the stretch that it stands for.
        arrivals: times of the posts in seconds since the begin of the part, ascending.
    """

    stretch: int
    seconds: float
    weight: float
    arrivals: np.ndarray


def stretches(load: LoadSettings, posts: float) -> list[Stretch]:
    """The day as stretches of constant load, with `posts` posts in all, those of the bursts included."""
    weights = list(load.hours) * (24 // len(load.hours))
    bursts = [(*_interval(entry), entry["factor"]) for entry in load.bursts]
    outages = [_interval(entry) for entry in load.outages]
    edges = {hour * 3600.0 for hour in range(25)}
    edges |= {edge for begin, end, *_ in [*bursts, *outages] for edge in (begin, end)}
    times = sorted(edges)
    found: list[Stretch] = []
    for begin, end in pairwise(times):
        factors = [factor for first, last, factor in bursts if first <= begin < last]
        rate = weights[int(begin // 3600)] * float(np.prod(factors))
        dead = any(first <= begin < last for first, last in outages)
        if found and (found[-1].rate, found[-1].burst, found[-1].dead) == (rate, bool(factors), dead):
            found[-1] = replace(found[-1], seconds=end - found[-1].start)
        else:
            found.append(Stretch(begin, end - begin, rate, bool(factors), dead))
    total = sum(one.rate * one.seconds for one in found)
    return [replace(one, rate=one.rate * posts / total) for one in found]


def parts(day: list[Stretch], replicas: int, sample_s: float, rng: np.random.Generator) -> Iterator[Part]:
    """What one of the replicas gets: Poisson arrivals at its share of each rate.

    A balancer that picks a replica at random splits a Poisson process into independent ones, so one replica stands for
    all. The begin of a stretch is simulated, and a second part as long stands for what remains of it.
    """
    for index, stretch in enumerate(day):
        rate = stretch.rate / replicas
        wanted = max(sample_s, POSTS_PER_STRETCH / rate if rate else 0.0)
        first = min(stretch.seconds, wanted)
        rest = stretch.seconds - first
        second = min(rest, wanted)
        for seconds, weight in ((first, 1.0), (second, rest / second if second else 0.0)):
            if seconds:
                count = rng.poisson(rate * seconds)
                yield Part(index, seconds, weight, np.sort(rng.uniform(0.0, seconds, count)))


def _interval(entry: dict[str, float]) -> tuple[float, float]:
    begin = entry["hour"] * 3600.0
    return begin, min(begin + entry["minutes"] * 60.0, DAY_S)
