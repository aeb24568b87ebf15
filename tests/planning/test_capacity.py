"""The load of a day, its figures, and the number of replicas."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from distill.errors import SettingsError
from distill.planning import capacity
from distill.planning.capacity import simulate_day, smallest, weighted_quantile
from distill.planning.load import Stretch, parts, stretches
from distill.planning.service import Service, batch_times
from distill.scale_settings import LoadSettings
from distill.serving.settings import ServeSettings


def flat(**changes: Any) -> LoadSettings:
    given: dict[str, Any] = {"hours": [1.0], "bursts": [], "outages": []}
    return LoadSettings(**(given | changes))


def replica(**changes: Any) -> Service:
    settings = ServeSettings(explain="none", batch_size=4, batch_wait_ms=5.0, queue=32)
    given: dict[str, Any] = {
        "teacher_seconds": np.array([0.2, 0.3]),
        "teacher_limit_s": 5.0,
        "long_s": 2.5,
        "deferred": 0.2,
    }
    return Service(settings, {"classify": batch_times({1: 0.05, 4: 0.08})}, **(given | changes))


def test_the_stretches_of_a_day_have_all_posts() -> None:
    day = stretches(flat(hours=[float(n) for n in range(24)]), 1e6)
    assert len(day) == 24 and sum(one.seconds for one in day) == 86_400
    assert sum(one.rate * one.seconds for one in day) == pytest.approx(1e6)
    assert day[5].rate == pytest.approx(1e6 * 5 / 276 / 3600)


def test_bursts_and_outages_cut_the_hours_and_are_part_of_the_posts() -> None:
    day = stretches(
        flat(bursts=[{"hour": 1.5, "minutes": 60, "factor": 4}], outages=[{"hour": 1.75, "minutes": 6}]), 1e6
    )
    burst = [one for one in day if one.burst]
    assert [(one.start, one.seconds, one.dead) for one in burst] == [
        (5400, 900, False), (6300, 360, True), (6660, 2340, False),
    ]  # fmt: skip
    assert burst[0].rate == pytest.approx(4 * day[0].rate)
    assert sum(one.rate * one.seconds for one in day) == pytest.approx(1e6)
    assert stretches(flat(outages=[{"hour": 23.5, "minutes": 99}]), 1)[-1] == Stretch(
        84_600, 1800, 1 / 86_400, False, True
    )


def test_the_parts_of_a_stretch_stand_for_all_of_it() -> None:
    day = [Stretch(0, 3600, 200.0), Stretch(3600, 100, 50.0), Stretch(3700, 3600, 0.0)]
    found = list(parts(day, 2, 120.0, np.random.default_rng(0)))
    for index, stretch in enumerate(day):
        assert sum(p.seconds * p.weight for p in found if p.stretch == index) == pytest.approx(stretch.seconds)
    assert [(p.stretch, p.seconds, round(p.weight, 3)) for p in found] == [
        (0, 120, 1.0), (0, 120, 29.0), (1, 100, 1.0), (2, 120, 1.0), (2, 120, 29.0),
    ]  # fmt: skip
    assert len(found[0].arrivals) == pytest.approx(12_000, rel=0.05), "one of two replicas gets half of the posts"
    assert all((np.diff(part.arrivals) >= 0).all() for part in found)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hours": [1.0, 2.0]}, "hours takes 24 numbers"),
        ({"hours": [0.0] * 24}, "hours takes 24 numbers"),
        ({"bursts": [{"hour": 1.0, "minutes": 5.0}]}, "bursts: .* must have exactly factor, hour, minutes"),
        ({"hours": [float("nan")]}, "hours takes 24 numbers"),
        ({"outages": [{"hour": 25.0, "minutes": 5.0}]}, "outages: .* takes an hour from 0 to below 24"),
        ({"bursts": [{"hour": 1.0, "minutes": 5.0, "factor": 0.0}]}, "bursts: .* and others above 0"),
    ],
)
def test_an_impossible_load_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        LoadSettings(**wrong)


def test_a_sampled_day_has_the_figures_of_the_whole_day() -> None:
    day = stretches(flat(hours=[1.0] * 12 + [3.0] * 12), 100_000)
    whole, sampled = (simulate_day(replica(), day, 1, sample_s, 2.0, 5).figures() for sample_s in (86_400.0, 120.0))
    assert whole.posts > 95_000 and sampled.posts < 30_000
    assert sampled.p50 == pytest.approx(whole.p50, rel=0.05) and sampled.p99 == pytest.approx(whole.p99, rel=0.05)
    assert sampled.student_busy == pytest.approx(whole.student_busy, rel=0.05)
    assert sampled.teacher_busy == pytest.approx(whole.teacher_busy, rel=0.08)


def test_busy_shares_are_those_of_the_offered_load() -> None:
    day = simulate_day(replica(deferred=0.5), [Stretch(0, 4000, 3.0)], 1, 4000.0, 2.0, 0)
    figures = day.figures()
    assert figures.rate == 3.0 and figures.teacher_busy == pytest.approx(3 * 0.5 * 0.25 / 8, rel=0.05)
    assert 0.1 < figures.student_busy < 0.16, "between batches of one post and full ones"


def test_more_replicas_answer_more_posts_in_time() -> None:
    day = stretches(flat(bursts=[{"hour": 12.0, "minutes": 20.0, "factor": 3.0}]), 20_000_000)
    found = [simulate_day(replica(), day, count, 60.0, 0.5, 0).figures() for count in (4, 6, 10, 16, 28)]
    for fewer, more in pairwise(found):
        assert more.in_time >= fewer.in_time - 0.002 and more.refused <= fewer.refused
        assert fewer.refused or more.p99 <= fewer.p99 * 1.02, "with refusals, the slowest posts have no answer"
    assert found[0].in_time < 0.9 < 0.99 < found[-1].in_time


def test_the_smallest_number_of_replicas_is_found() -> None:
    day = stretches(flat(), 40_000_000)
    days = list(smallest(replica(), day, 60.0, 0.6, 0))
    best = min((one for one in days if one.meets), key=lambda one: one.replicas)
    assert best.figures().in_time >= capacity.SHARE
    fewer = next(one for one in days if one.replicas == best.replicas - 1)
    assert not fewer.meets and not simulate_day(replica(), day, best.replicas - 1, 60.0, 0.6, 0).meets
    assert best.replicas >= 40_000_000 / 86_400 * replica().student_s, "a student that is busy all the time"


def test_no_number_of_replicas_makes_the_teacher_faster() -> None:
    days = list(smallest(replica(), stretches(flat(), 100_000), 60.0, 0.15, 0))
    assert not any(one.meets for one in days) and not days[-1].records.stopped
    assert days[-1].figures().in_time == pytest.approx(0.8, abs=0.03), "the posts that are not deferred"


def test_quantiles_are_weighted() -> None:
    values, weights = np.array([3.0, 1.0, 2.0]), np.array([1.0, 1.0, 8.0])
    assert [weighted_quantile(values, weights, level) for level in (0.05, 0.1, 0.5, 0.9, 0.91)] == [1, 1, 2, 2, 3]
    assert np.isnan(weighted_quantile(np.empty(0), np.empty(0), 0.5))


def test_times_of_batches_are_linear_between_measured_sizes() -> None:
    times = batch_times({4: 0.4, 1: 0.1, 8: 0.6})
    assert [times(size) for size in (1, 2, 4, 6, 8, 10)] == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.6, 0.6 + 2 * 0.5 / 7])
    assert [batch_times({2: 0.4})(size) for size in (1, 2, 4)] == pytest.approx([0.4, 0.4, 0.8])
