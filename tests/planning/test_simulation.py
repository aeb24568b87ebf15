"""The simulated gateway against queueing theory, and against the rules of the real one."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import simpy

from distill.planning.load import Part
from distill.planning.service import Service, batch_times
from distill.planning.simulation import Batches, Job, Records, Replica
from distill.serving.breaker import CircuitBreaker
from distill.serving.settings import ServeSettings

RUNS, CUSTOMERS, RATE = 10, 8000, 1.0
"""Independent runs, customers of each after a tenth that warm up, and service rate of one server."""

Work = Callable[[np.random.Generator], float]


def exponential(rng: np.random.Generator) -> float:
    return float(rng.exponential(1 / RATE))


def waiting_times(load: float, servers: int, work: Work) -> tuple[float, float]:
    """Mean waiting time of a queue with Poisson arrivals over independent runs, and its standard error."""
    means = []
    for run in range(RUNS):
        rng, env = np.random.default_rng([run, servers]), simpy.Environment()
        waits: list[float] = []

        def serve(jobs: list[Job], rng: np.random.Generator = rng, env: Any = env, waits: Any = waits) -> float:
            waits.append(env.now - jobs[0].submitted)
            return work(rng)

        def arrive(rng: np.random.Generator = rng, env: Any = env, serve: Any = serve) -> Any:
            queue = Batches(env, serve, 1, 0.0, servers)
            for _ in range(CUSTOMERS):
                yield env.timeout(rng.exponential(1 / (load * servers * RATE)))
                queue.submit("job")

        env.process(arrive())
        env.run()
        assert len(waits) == CUSTOMERS
        means.append(np.mean(waits[CUSTOMERS // 10 :]))
    return float(np.mean(means)), float(np.std(means, ddof=1) / math.sqrt(RUNS))


def erlang_c(load: float, servers: int) -> float:
    """The probability that a customer of an M/M/c queue waits (A. K. Erlang)."""
    offered = load * servers
    busy = offered**servers / math.factorial(servers) / (1 - load)
    return busy / (sum(offered**n / math.factorial(n) for n in range(servers)) + busy)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_server_with_exponential_times_is_m_m_1(load: float) -> None:
    mean, error = waiting_times(load, 1, exponential)
    assert mean == pytest.approx(load / (RATE * (1 - load)), abs=5 * error) and error < 0.15 * mean


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_server_with_constant_times_is_m_d_1(load: float) -> None:
    mean, error = waiting_times(load, 1, lambda rng: 1 / RATE)
    assert mean == pytest.approx(load / (2 * RATE * (1 - load)), abs=5 * error) and error < 0.15 * mean


@pytest.mark.parametrize(("load", "servers"), [(0.7, 2), (0.8, 8)])
def test_several_servers_are_m_m_c(load: float, servers: int) -> None:
    mean, error = waiting_times(load, servers, exponential)
    expected = erlang_c(load, servers) / (servers * RATE * (1 - load))
    assert mean == pytest.approx(expected, abs=5 * error) and error < 0.2 * mean


def batches_of(arrivals: list[tuple[float, str, int]], size: int, wait_s: float, seconds: float) -> list[Any]:
    """The batches of a queue: when each begins, its kind and its size."""
    env, found = simpy.Environment(), []

    def work(jobs: list[Job]) -> float:
        found.append((round(env.now, 6), jobs[0].kind, len(jobs)))
        return seconds

    def arrive() -> Any:
        queue = Batches(env, work, size, wait_s)
        for time, kind, priority in arrivals:
            yield env.timeout(time - env.now)
            queue.submit(kind, priority)

    env.process(arrive())
    env.run()
    return found


def test_a_batch_waits_for_more_items_and_not_longer_than_allowed() -> None:
    times = [(0.0, "a", 0), (0.03, "a", 0), (0.2, "a", 0)]
    assert batches_of(times, 8, 0.05, 0.01) == [(0.05, "a", 2), (0.25, "a", 1)]


def test_a_full_batch_does_not_wait_and_what_came_meanwhile_is_one_batch() -> None:
    times = [(0.0, "a", 0), (0.0, "a", 0), (0.1, "a", 0), (0.2, "a", 0), (0.3, "a", 0)]
    assert batches_of(times, 2, 0.05, 1.0) == [(0.0, "a", 2), (1.0, "a", 2), (2.0, "a", 1)]


def test_labels_come_before_rationales_and_kinds_do_not_share_a_batch() -> None:
    times = [(0.0, "classify", 0), (0.1, "reason", 2), (0.2, "classify", 0), (0.3, "reason", 2), (0.4, "explain", 2)]
    found = batches_of(times, 4, 0.0, 1.0)
    assert [(kind, size) for _, kind, size in found] == [
        ("classify", 1), ("classify", 1), ("reason", 2), ("explain", 1),
    ]  # fmt: skip


# ---- one replica ----


def service(**changes: Any) -> Service:
    """A replica whose student labels a post in 0.1 s and whose teacher answers in 1 s; every post is deferred."""
    serve = {"queue": 8, "batch_size": 1, "batch_wait_ms": 0.0, "deadline_s": 10.0, "explain": "none"}
    serve |= {
        name: changes.pop(name)
        for name in list(changes)
        if name in ServeSettings.__dataclass_fields__ and name != "rationale"
    }
    settings = ServeSettings(**serve)  # type: ignore[arg-type]
    given: dict[str, Any] = {
        "teacher_seconds": np.array([1.0]), "teacher_limit_s": 2.0, "long_s": 1.0, "deferred": 1.0,
        "students": {
            "classify": batch_times({1: 0.1}), "reason": batch_times({1: 0.4}),
            "explain": batch_times({1: 0.6}),
        },
    }  # fmt: skip
    return Service(settings, **(given | changes))


def run(replica: Service, *arrivals: float, dead: bool = False, seed: int = 0) -> Records:
    part = Part(0, max(arrivals, default=0.0), 1.0, np.array(arrivals))
    return Replica(replica, [dead], np.random.default_rng(seed)).run([part])


def test_a_post_passes_student_teacher_and_review() -> None:
    assert run(service(deferred=0.0), 0.0).seconds == pytest.approx([0.1])
    assert run(service(), 0.0).seconds == pytest.approx([1.1])
    assert run(service(reviewed=1.0), 0.0).seconds == pytest.approx([2.1])
    assert run(service(reviewed=1.0, overhead_s=0.05), 0.0).seconds == pytest.approx([2.15])


def test_a_rationale_is_written_beside_the_teachers_answer_and_explained_after_it() -> None:
    assert run(service(rationale=True), 0.0).seconds == pytest.approx([1.1])
    assert run(service(rationale=True, deferred=0.0), 0.0).seconds == pytest.approx([0.5])
    by_student = service(rationale=True, deferred=0.0, explained=1.0, explain="student")
    assert run(by_student, 0.0).seconds == pytest.approx([1.1])
    by_teacher = service(rationale=True, deferred=0.0, explained=1.0, explain="teacher")
    assert run(by_teacher, 0.0).seconds == pytest.approx([1.5])


def test_a_full_queue_refuses_and_frees_its_places() -> None:
    records = run(service(queue=2, deferred=0.0), 0.0, 0.0, 0.0, 0.35)
    assert Counter(records.outcome) == {"answered": 3, "refused": 1}
    assert records.reasons == {"the queue is full": 1}


def test_a_student_that_is_late_refuses_and_abandoned_posts_are_not_computed() -> None:
    records = run(service(deadline_s=1.0, queue=99, deferred=0.0), *[0.0] * 20)
    assert Counter(records.outcome) == {"answered": 9, "refused": 11}, "0.9 s are left for answers"
    assert records.reasons == {"the student was late": 11}
    assert records.student_busy[0] == pytest.approx(1.0), "the batch at the deadline goes on, the others do not begin"


def test_a_busy_teacher_degrades_and_a_late_one_goes_on() -> None:
    slow = service(
        deadline_s=4.0, teacher_concurrency=1, teacher_limit_s=9.0, teacher_seconds=np.array([3.0]), long_s=9.0
    )
    records = run(slow, 0.0, 0.0, 0.0)
    assert records.outcome == ["answered", "degraded", "degraded"]
    assert records.reasons == {"the teacher was late": 1, "the teacher is busy": 1}
    assert records.seconds[1:] == pytest.approx([3.6, 3.6]) and records.teacher_busy[0] == pytest.approx(6.0)


def test_without_a_teacher_deferred_posts_are_degraded_at_once() -> None:
    records = run(service(teacher_seconds=np.empty(0)), 0.0)
    assert records.outcome == ["degraded"] and records.seconds == pytest.approx([0.1])
    assert records.reasons == {"there is no teacher": 1}


def test_a_teacher_that_refuses_delays_nobody_and_is_not_suspended() -> None:
    records = run(service(silent=False), *np.arange(30) * 1.0, dead=True)
    assert set(records.outcome) == {"degraded"} and records.seconds == pytest.approx([0.1] * 30)
    assert records.reasons == {"the teacher did not answer": 30}


def test_a_silent_teacher_is_suspended_as_the_gateways_breaker_says() -> None:
    times = np.arange(60) * 0.73
    silent = service(breaker_failures=3, breaker_retry_s=10.0, deferred=1.0)
    records = run(silent, *times, dead=True)
    clock = {"now": 0.0}
    breaker = CircuitBreaker(3, 10.0, lambda: clock["now"])
    expected, running = Counter[str](), []
    for time in times + 0.1:  # the student has labelled the post
        for end, admitted in [item for item in running if item[0] <= time]:
            clock["now"] = end
            breaker.report(admitted, False, True)
            running.remove((end, admitted))
        clock["now"] = time
        if (admitted := breaker.admit()) is None:
            expected["the teacher is suspended"] += 1
        else:
            expected["the teacher did not answer"] += 1
            running.append((time + 2.0, admitted))
    assert records.reasons == expected and expected["the teacher is suspended"] > 40


def test_the_teacher_is_asked_again_when_it_answers() -> None:
    parts = [Part(n, 20.0, 1.0, np.arange(0.0, 20.0, 0.5)) for n in range(3)]
    revived = service(breaker_failures=2, breaker_retry_s=5.0, teacher_concurrency=4)
    records = Replica(revived, [False, True, False], np.random.default_rng(0)).run(parts)
    outcomes = {
        n: Counter(o for o, s in zip(records.outcome, records.stretch, strict=True) if s == n) for n in range(3)
    }
    assert set(outcomes[0]) == {"answered"} and set(outcomes[1]) == {"degraded"}
    assert 0 < outcomes[2]["degraded"] <= 16 and outcomes[2]["answered"] >= 24, "within the time of one retry"


@pytest.mark.parametrize("seed", range(6))
def test_every_post_ends_exactly_once_and_in_time(seed: int) -> None:
    rng = np.random.default_rng(seed)
    replica = service(
        queue=int(rng.integers(1, 40)), batch_size=int(rng.integers(1, 9)), deadline_s=float(rng.uniform(0.5, 6)),
        teacher_concurrency=int(rng.integers(1, 5)), breaker_retry_s=2.0, rationale=bool(seed % 2),
        explain=["none", "student", "teacher"][seed % 3], deferred=0.5, reviewed=0.3, explained=0.4,
        teacher_seconds=rng.uniform(0.1, 4.0, 50),
    )  # fmt: skip
    counts = [int(rng.poisson(150)) for _ in range(4)]
    parts = [Part(n, 10.0, 1.0 + n, np.sort(rng.uniform(0, 10, count))) for n, count in enumerate(counts)]
    one = Replica(replica, [False, True, False, True], rng)
    records = one.run(parts)
    assert Counter(records.stretch) == dict(enumerate(counts))
    assert len(records.outcome) == len(records.seconds) == len(records.weight) == sum(counts)
    assert one._in_flight == 0 and not one._deadlines
    assert max(records.seconds) <= replica.settings.answer_s + 1e-9
    explained = sum(w for w, outcome in zip(records.weight, records.outcome, strict=True) if outcome != "answered")
    assert sum(records.reasons.values()) == pytest.approx(explained)


def test_the_same_seed_gives_the_same_posts() -> None:
    replica = service(deferred=0.4, teacher_seconds=np.array([0.3, 2.0]))
    times = np.sort(np.random.default_rng(3).uniform(0, 60, 200))
    first, again, other = (run(replica, *times, seed=seed) for seed in (1, 1, 2))
    assert first == again and first != other
