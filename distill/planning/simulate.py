"""`distill simulate`: the cascade service under the load of a day, from the settings of a recipe and measured times."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distill.errors import SettingsError
from distill.models.endpoint import EndpointSettings
from distill.planning import measured
from distill.planning.load import Stretch, stretches
from distill.planning.service import Service, Times, batch_times
from distill.planning.text import align
from distill.recipe import Recipe
from distill.serving.settings import endpoint_for_serving

if TYPE_CHECKING:
    from distill.planning.capacity import Day

log = logging.getLogger(__name__)


def simulation_text(recipe: Recipe, posts: int, *, metrics: Path | None = None, replicas: int | None = None) -> str:
    """Simulate a day and return its figures as text tables.

    Args:
        posts: posts of the day.
        metrics: a saved page of `/metrics` of the recipe's gateway, with the times of the student's batches.
        replicas: their number; None: the smallest one that answers 99% of the posts within the deadline.

    Raises:
        SettingsError: simpy is not installed, or a time or a share is not known.
    """
    try:
        from distill.planning import capacity
    except ImportError as error:
        raise SettingsError(f"simulate needs {error.name}: pip install 'distill[scale]'") from None
    service, sources = measured_service(recipe, metrics)
    load, deadline_s = recipe.scale.load, recipe.scale.deadline_s or recipe.serve.deadline_s
    sample_s = max(load.sample_s, 2 * recipe.serve.breaker_retry_s)
    day = stretches(load, posts)
    common = service, day, sample_s, deadline_s, recipe.seed
    if replicas is not None:
        rate, most = max(stretch.rate for stretch in day) / replicas, 1 / service.student_s
        if rate > 20 * most:
            raise SettingsError(
                f"--replicas {replicas} is too few to simulate: each gets up to {rate:,.3g} posts a second, and a "
                f"student labels {most:,.3g}"
            )
        found = [capacity.simulate_day(service, day, replicas, sample_s, deadline_s, recipe.seed)]
    else:
        found = []
        for one in capacity.smallest(*common):
            log.info("%d replicas: %s", one.replicas, "enough" if one.meets else "too few")
            found.append(one)
    enough = [one for one in found if one.meets]
    chosen = min(enough, key=lambda one: one.replicas) if enough and replicas is None else found[-1]
    seconds = f"{deadline_s:g} s"
    if chosen.meets:
        verdict = f"{chosen.replicas:,} replicas answer 99% of the posts within {seconds}"
        verdict += "; one fewer does not." if replicas is None and chosen.replicas > 1 else "."
    elif replicas is not None:
        verdict = f"{replicas:,} replicas do not answer 99% of the posts within {seconds}."
    else:
        verdict = (
            f"No number of replicas answers 99% of the posts within {seconds}: the models have next to no load here."
        )
    reasons = chosen.records.reasons
    total = sum(chosen.records.weight)
    why = [
        f"{name}: {count / total:.2%} of the posts" for name, count in sorted(reasons.items(), key=lambda one: -one[1])
    ]
    parts = [
        f"Simulation of {recipe.name} in service: {posts:,} posts in a day, seed {recipe.seed}.",
        verdict,
        _day_table(chosen, day),
        "\n".join(["degraded and refused:", *(f"  {line}" for line in why)]) if why else "",
        _replica_table(found) if replicas is None else "",
        "\n".join(sources + _NOTES),
    ]
    return "\n\n".join(part for part in parts if part)


_NOTES = [
    "p50, p99: seconds of the posts that got an answer. degraded: answered without a teacher that was needed.",
    "refused: status 429. busy: share of the time in which the student, and a connection to the teacher, worked.",
    "A balancer that picks a replica at random is assumed; clients that are refused do not ask again.",
]


def measured_service(recipe: Recipe, metrics: Path | None) -> tuple[Service, list[str]]:
    """One replica of the recipe's gateway, and lines that say where its times and shares come from.

    Raises:
        SettingsError: a time or a share is not known. The message names all of them, and what would give each.
    """
    stated, settings = recipe.scale.service, recipe.serve
    missing: dict[str, list[str]] = {}  # names by their remedy
    sources: list[str] = []
    rationale = settings.rationale and recipe.student is not None and "reason" in recipe.student.tasks
    page = measured.batch_seconds(metrics) if metrics else {}

    def known(name: str, value: object, found: object, source: str, remedy: str) -> object:
        """A stated value, otherwise a measured one; notes where it comes from, or that it is not known."""
        given = value is not None and value != {} and value != []
        if not given and found is None:
            missing.setdefault(remedy, []).append(name)
            return None
        sources.append(f"{name}: {f'scale.service.{name}' if given else source}")
        return value if given else found

    def batches(name: str, kind: str, table: dict[int, float]) -> Times:
        times = known(
            name, table, page.get(kind), str(metrics), "or --metrics FILE, a saved page of the gateway's /metrics"
        )
        return batch_times(times) if isinstance(times, dict) else lambda size: math.nan

    students = {"classify": batches("student_seconds", "classify", stated.student_seconds)}
    explained = 0.0
    if rationale:
        students["reason"] = batches("rationale_seconds", "reason", stated.rationale_seconds)
        if settings.explain != "none":
            share = measured.explained_share(metrics) if metrics and settings.explain == "student" else None
            explained = _number(known("explained", stated.explained, share, str(metrics), "or serve.explain none"))
        if settings.explain == "student" and explained:
            students["explain"] = batches("explain_seconds", "explain", stated.explain_seconds)
    service = Service(
        settings, students, explained=explained, rationale=rationale, overhead_s=stated.overhead_s,
        student_threads=settings.student.concurrency if settings.student else 0,
        silent=recipe.scale.load.dead_teacher == "silent",
    )  # fmt: skip
    if recipe.cascade_teacher is not None:
        metrics_of_run = measured.cascade(recipe.folder)
        place = f"{recipe.folder}/cascade"
        asked = {name: stage["asked"] for name, stage in metrics_of_run["stages"].items()} if metrics_of_run else {}
        deferred = asked["teacher_first"] / asked["student"] if asked else None
        reviewed = asked["teacher_review"] / max(asked["teacher_first"], 1) if asked else None
        run = "or a first run of the stage cascade"
        service = dataclasses.replace(
            service,
            deferred=_number(known("deferred", stated.deferred, deferred, place, run)),
            reviewed=_number(known("reviewed", stated.reviewed, reviewed, place, run)),
        )
        if isinstance(recipe.cascade_teacher, EndpointSettings):
            endpoint = endpoint_for_serving(recipe.cascade_teacher, settings.deadline_s)
            times = measured.teacher_seconds(recipe.folder)
            found = known("teacher_seconds", stated.teacher_seconds, times if len(times) else None, place, run)
            service = dataclasses.replace(
                service,
                teacher_seconds=np.array(found if found is not None else [math.nan], dtype=float),
                teacher_limit_s=min(endpoint.timeout_s, endpoint.deadline_s),
                long_s=min(settings.answer_s, endpoint.timeout_s) / 2,
            )
        else:
            remedy = "of the teacher in the gateway's process"
            own = known("teacher_batch_seconds", stated.teacher_batch_seconds, None, "", remedy)
            service = dataclasses.replace(
                service,
                teacher_batches=batch_times(own) if isinstance(own, dict) else None,
                long_s=settings.answer_s / 2,
                silent=False,  # a model in this process fails at once
            )
    if missing:
        needs = "; ".join(f"{', '.join(names)} ({remedy})" for remedy, names in missing.items())
        raise SettingsError(f"simulate needs in scale.service: {needs}")
    return service, sources


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _day_table(day: "Day", all_stretches: list[Stretch]) -> str:
    indices = range(len(all_stretches))
    calm = [index for index in indices if not all_stretches[index].burst]
    chosen: dict[str, list[int]] = {
        "whole day": list(indices),
        "busiest hour": [max(calm, key=lambda index: all_stretches[index].rate)] if calm else [],
        "bursts": [index for index in indices if all_stretches[index].burst],
        "teacher dead": [index for index in indices if all_stretches[index].dead],
    }
    rows = [["", "posts a second", "p50", "p99", "degraded", "refused", "student busy", "teacher busy", "simulated"]]
    for name, part in chosen.items():
        if part:
            f = day.figures(part)
            shares = (f.degraded, f.refused, f.student_busy, f.teacher_busy)
            rows.append([name, f"{f.rate:,.3g}", _seconds(f.p50), _seconds(f.p99),
                         *(f"{share:.2%}" for share in shares), f"{f.posts:,}"])  # fmt: skip
    return align(rows)


def _replica_table(days: Sequence["Day"]) -> str:
    rows = [["replicas", "in time", "p50", "p99", "degraded", "refused"]]
    for day in sorted(days, key=lambda day: day.replicas):
        f = day.figures()
        figures = [f"{f.in_time:.2%}", _seconds(f.p50), _seconds(f.p99), f"{f.degraded:.2%}", f"{f.refused:.2%}"]
        rows.append([f"{day.replicas:,}", *(["below 99%"] + ["–"] * 4 if day.records.stopped else figures)])
    return align(rows)


def _seconds(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g} s"
