"""`distill simulate`: where its times come from, what it prints, and what it refuses."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.planning import measured, simulate
from distill.recipe import Recipe
from distill.serving.metrics import Metrics
from tests import micro
from tests.commands import Command
from tests.planning.test_plan import ALONE, SERVER

TIMES: dict[str, Any] = {
    "student_seconds": {1: 0.02, 8: 0.06}, "teacher_seconds": [0.3, 0.5], "deferred": 0.25, "reviewed": 0.1,
}  # fmt: skip
CONTENT: dict[str, Any] = ALONE | {
    "annotate": {"endpoint": SERVER | {"timeout_s": 8.0}}, "calibrate": {}, "cascade": {},
    "serve": {"rationale": False, "deadline_s": 12.0},
    "scale": {"deadline_s": 2.0, "service": TIMES, "load": {"sample_s": 30.0}},
}  # fmt: skip


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    return micro.read(micro.write(folder, CONTENT, **changes))


def page_of(folder: Path) -> Path:
    """A page of metrics with batches of labels and rationales."""
    metrics = Metrics()
    for size, seconds in ((1, 0.01), (1, 0.03), (4, 0.08)):
        metrics.batch_seconds("classify", size, seconds)
    metrics.batch_seconds("reason", 4, 1.0)
    metrics.batch_seconds("explain", 1, 0.5)
    path = folder / "metrics.txt"
    path.write_bytes(metrics.text())
    return path


def test_the_day_and_the_smallest_number_of_replicas_are_printed(tmp_path: Path, distill: Command) -> None:
    path = micro.write(tmp_path, CONTENT)
    result = distill("simulate", "--config", path, "--posts", "6_000_000")
    assert result.status == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "Simulation of micro in service: 6,000,000 posts in a day, seed 1."
    count = int(lines[2].split()[0])
    assert lines[2] == f"{count} replicas answer 99% of the posts within 2 s; one fewer does not." and count > 1
    rows = {line.split("  ")[0]: line.split() for line in lines}
    assert {"whole day", "busiest hour", "bursts", "teacher dead"} < set(rows)
    assert float(rows["teacher dead"][-5].rstrip("%")) > 20 > float(rows["busiest hour"][-5].rstrip("%"))
    table = lines[next(n for n, line in enumerate(lines) if line.startswith("replicas")) :]
    shown = {row.split()[0]: row for row in table if row[:1].isdigit()}
    assert str(count) in shown and float(shown[str(count)].split()[1].rstrip("%")) >= 99
    assert "teacher_seconds: scale.service.teacher_seconds" in lines
    assert max(map(len, lines)) < 121
    again = distill("simulate", "--config", path, "--posts", 6_000_000, "--replicas", count)
    assert again.stdout.splitlines()[4:9] == lines[4:9], "the same seed gives the same day"
    assert again.stdout.splitlines()[2] == f"{count} replicas answer 99% of the posts within 2 s."
    fewer = distill("simulate", "--config", path, "--posts", 6_000_000, "--replicas", count - 1)
    assert fewer.stdout.splitlines()[2] == f"{count - 1} replicas do not answer 99% of the posts within 2 s."
    other = distill("simulate", "--config", path, "--posts", 6_000_000, "--replicas", count, "--seed", 2)
    assert other.stdout.splitlines()[5:] != again.stdout.splitlines()[5:]


def test_a_deadline_that_no_number_of_replicas_meets_is_said(tmp_path: Path) -> None:
    text = simulate.simulation_text(recipe_of(tmp_path, scale__deadline_s=0.2), 100_000)
    assert "No number of replicas answers 99% of the posts within 0.2 s" in text


def test_what_is_not_known_is_one_sentence(tmp_path: Path, distill: Command) -> None:
    path = micro.write(tmp_path, CONTENT, scale={}, serve={"explain": "student"})
    assert distill("simulate", "--config", path, "--posts", 1000).error == (
        "simulate needs in scale.service: student_seconds, rationale_seconds (or --metrics FILE, a saved page of the "
        "gateway's /metrics); explained (or serve.explain none); deferred, reviewed, teacher_seconds (or a first run "
        "of the stage cascade)"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "simulate needs --posts, the number of posts in a day, such as 1_000_000"),
        (("--posts", "many"), "posts: many is not a whole number"),
        (("--posts", "9", "--replicas", "0"), "--replicas is 0; it takes a whole number from 1 to "),
        (("--posts", "9_000_000_000", "--replicas", "1"), "--replicas 1 is too few to simulate: each gets up to "),
        (("--posts", "9", "--metrics", "no/page"), "--metrics: cannot read no/page: No such file or directory"),
    ],
)
def test_wrong_options_are_one_sentence(
    arguments: tuple[str, ...], message: str, tmp_path: Path, distill: Command
) -> None:
    result = distill("simulate", "--config", micro.write(tmp_path, CONTENT), *arguments)
    assert result.status == 2 and result.error.startswith(message)


def test_without_simpy_there_is_one_sentence(tmp_path: Path, distill: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("distill.planning.capacity", "distill.planning.simulation"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("distill.planning.capacity", raising=False)
    monkeypatch.setitem(sys.modules, "simpy", None)
    path = micro.write(tmp_path, CONTENT)
    result = distill("simulate", "--config", path, "--posts", 1000)
    assert result.status == 2 and result.error == "simulate needs simpy: pip install 'distill[scale]'"
    assert distill("plan", "--config", path, "--posts", 1000).status == 0, "the plan needs no simpy"


def test_the_times_of_batches_come_from_the_gateways_metrics(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    found = measured.batch_seconds(page)
    assert {kind: pytest.approx(times) for kind, times in found.items()} == {
        "classify": {1: 0.02, 4: 0.08}, "reason": {4: 1.0}, "explain": {1: 0.5},
    }  # fmt: skip
    assert measured.explained_share(page) == 0.25
    recipe = recipe_of(tmp_path, serve={"explain": "student"}, scale__service__student_seconds={})
    service, sources = simulate.measured_service(recipe, page)
    assert service.rationale and service.explained == 0.25 and service.student("classify", 2) == pytest.approx(0.04)
    assert service.student("explain", 2) == pytest.approx(1.0)
    assert f"rationale_seconds: {page}" in sources and "deferred: scale.service.deferred" in sources


def test_a_page_without_such_times_is_refused(tmp_path: Path, distill: Command) -> None:
    page = tmp_path / "metrics.txt"
    page.write_text("# HELP other\nother 1\n")
    result = distill("simulate", "--config", micro.write(tmp_path, CONTENT), "--posts", 9, "--metrics", page)
    assert result.error == f"--metrics: {page} has no distill_student_batch_seconds; save /metrics of distill serve"


def test_shares_and_times_of_the_teacher_come_from_the_run(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, scale__service={"student_seconds": {1: 0.02}})
    folder = recipe.folder / "cascade"
    folder.mkdir(parents=True)
    asked = {"student": 20, "teacher_first": 5, "teacher_review": 2}
    stages = {name: {"asked": count} for name, count in asked.items()}
    (folder / "metrics.json").write_text(json.dumps({"n": 20, "stages": stages}))

    def prediction(seconds: float | None, calls: int = 1, answered: bool = True) -> dict[str, Any]:
        return {"answered": answered, "cost": {"seconds": seconds, "calls": calls}}

    decisions = [
        {"teacher": prediction(1.0), "review": None}, {"teacher": None, "review": None},
        {"teacher": prediction(6.0, calls=5), "review": prediction(2.0)}, {"teacher": prediction(None)},
        {"teacher": prediction(9.0, answered=False)},
    ]  # fmt: skip
    (folder / "decisions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in decisions) + '{"teacher": {')
    service, _ = simulate.measured_service(recipe, None)
    assert (service.deferred, service.reviewed) == (0.25, 0.4)
    assert service.teacher_seconds == pytest.approx(np.array([1.0, 1.2, 2.0])), "a served label is one request"
    assert (service.teacher_limit_s, service.long_s) == (8.0, 4.0)


def test_a_teacher_in_the_gateways_process_answers_in_batches_and_is_never_silent(tmp_path: Path) -> None:
    stated = {"teacher_batch_seconds": {1: 0.1, 8: 0.3}, "explained": 0.0, "rationale_seconds": {1: 0.5}}
    content = micro.WITH_TEACHER | {"scale": {"service": TIMES | stated}}
    service, _ = simulate.measured_service(micro.read(micro.write(tmp_path, content)), None)
    assert service.teacher_batches is not None and service.teacher_batches(8) == 0.3 and not service.silent
