"""Tables and curves of a finished chain, logged with the real wandb library, and the artifact of its report."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.recipe import Recipe
from distill.stages import cascade, report, tables
from distill.stages.context import Context
from distill.tracking import StageRun, Tracker, TrackingSettings
from distill.tracking.lineage import Lineage

pytest.importorskip("wandb")


@pytest.fixture
def tracked(tmp_path: Path) -> Iterator[StageRun]:
    with Tracker(TrackingSettings(mode="offline"), tmp_path, "micro").stage("tables", {}) as run:
        assert run.active
        yield run
        assert run.active, "a call has failed"


@pytest.fixture
def logged(tracked: StageRun, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is logged by name: the rows of a table, or the lines of a chart."""
    seen: dict[str, Any] = {}
    table, curves = tracked.table, tracked.curves

    def see_table(name: str, rows: list[Any]) -> None:
        seen[name] = list(rows)
        table(name, seen[name])

    def see_curves(name: str, title: str, x: str, lines: dict[str, Any]) -> None:
        seen[name] = lines
        curves(name, title, x, lines)

    monkeypatch.setattr(tracked, "table", see_table)
    monkeypatch.setattr(tracked, "curves", see_curves)
    return seen


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rationales_and_quarantine_have_their_pictures(
    finished: Recipe, tracked: StageRun, logged: dict[str, Any]
) -> None:
    tables.rationales(Context(finished, {}), tracked, "annotate")
    written = rows_of(finished.folder / "annotate" / "rationales.jsonl")
    assert [row["id"] for row in logged["rationales"]] == [row["id"] for row in written][: tables.ROWS]
    first = logged["rationales"][0]
    assert first["image"].is_file() and first["text"] == written[0]["text"]
    assert (first["label"], first["source"]) == (written[0]["label"], written[0]["source"])
    dropped = rows_of(finished.folder / "annotate" / "quarantine.jsonl")
    assert [(row["id"], row["reason"]) for row in logged["quarantine"]] == [(r["id"], r["reason"]) for r in dropped]
    assert all(row["image"].is_file() and row["text"] for row in logged["quarantine"])


def test_predictions_have_a_column_for_each_role(
    finished: Recipe, tracked: StageRun, logged: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "ROWS", 5)
    written = rows_of(finished.folder / "evaluate" / "predictions.jsonl")
    tables.predictions(Context(finished, {}), tracked, written)
    assert len(logged["predictions"]) == 5
    first = logged["predictions"][0]
    assert list(first)[:4] == ["id", "image", "text", "gold"]
    assert {role: first[role] for role in written[0]["roles"]} == {
        role: answer["label"] for role, answer in written[0]["roles"].items()
    }


def test_decisions_and_curves_of_the_cascade(finished: Recipe, tracked: StageRun, logged: dict[str, Any]) -> None:
    tables.decisions(Context(finished, {}), tracked)
    written = rows_of(finished.folder / "cascade" / "decisions.jsonl")
    assert [(row["id"], row["label"], row["stage"]) for row in logged["decisions"]] == [
        (row["id"], row["label"], row["stage"]) for row in written
    ]
    assert logged["decisions"][0]["student"] == written[0]["student"]["label"]

    metrics = cascade.read_metrics(finished.folder)
    curve = [
        {"policy": policy, "deferred": deferred, "quality": deferred / 2}
        for policy in ("entropy", "random")
        for deferred in (0.0, 1.0)
    ]
    tables.curves(tracked, curve, metrics["selective"])
    assert logged["cascade/deferral"] == dict.fromkeys(("entropy", "random"), ([0.0, 1.0], [0.0, 0.5]))
    diagram = logged["cascade/reliability_student"]
    assert list(diagram) == ["before calibration", "after calibration"]
    assert all(xs and len(xs) == len(ys) and None not in (*xs, *ys) for xs, ys in diagram.values())


def test_a_stage_without_tracking_reads_no_files(finished: Recipe, tmp_path: Path) -> None:
    context = Context(replace(finished, runs=str(tmp_path)), {})
    with Tracker(TrackingSettings(mode="disabled"), tmp_path, "micro").stage("annotate", {}) as run:
        tables.rationales(context, run, "annotate")
        tables.decisions(context, run)
        tables.predictions(context, run, [{}])


def test_the_report_is_an_artifact(finished: Recipe, tmp_path: Path) -> None:
    shutil.copytree(finished.folder, tmp_path / finished.name, ignore=shutil.ignore_patterns("checkpoints", "adapter"))
    recipe = replace(finished, runs=str(tmp_path), tracking=TrackingSettings(mode="offline"))
    report.run(recipe)
    (edge,) = Lineage(recipe.folder)
    assert (edge.kind, edge.stage, edge.artifact, edge.linked) == ("logs", "report", "micro-report", False)
    kept = recipe.folder / "wandb" / "uploads" / edge.run / "report" / "report.html"
    assert kept.read_bytes() == (recipe.folder / "report.html").read_bytes()
