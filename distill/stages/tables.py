"""Tables and curves for experiment tracking, from the files that a stage has written."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from distill.data import jsonl
from distill.stages.context import Context
from distill.task.sample import Sample
from distill.tracking import StageRun

ROWS = 64
"""The most rows of a table: each has a picture."""


def rationales(context: Context, tracked: StageRun, stage: str) -> None:
    """The first rows of `rationales.jsonl` and of `quarantine.jsonl` of a stage."""
    if not tracked.active:
        return
    folder = context.folder / stage
    tracked.table("rationales", [_rationale(context, row) for row in _first_rows(folder / "rationales.jsonl")])
    dropped = list(_first_rows(folder / "quarantine.jsonl"))
    wanted = {row["id"] for row in dropped}
    posts = {sample.id: sample for sample in context.corpus.train if sample.id in wanted} if wanted else {}
    tracked.table("quarantine", [_post(posts.get(row["id"])) | dict(row) for row in dropped])


def predictions(context: Context, tracked: StageRun, rows: Sequence[Mapping[str, Any]]) -> None:
    """The first rows of `predictions.jsonl`."""
    if not tracked.active:
        return
    posts = {sample.id: sample for sample in context.corpus.test}
    tracked.table(
        "predictions",
        [
            {"id": row["id"], **_post(posts.get(row["id"])), "gold": row["gold"]}
            | {role: answer["label"] for role, answer in row["roles"].items()}
            | {"rationale": row["roles"][context.recipe.student_role]["rationale"]}
            for row in rows[:ROWS]
        ],
    )


def decisions(context: Context, tracked: StageRun) -> None:
    """The first rows of `decisions.jsonl`."""
    if not tracked.active:
        return
    posts = {sample.id: sample for sample in context.corpus.test}
    rows = _first_rows(context.folder / "cascade" / "decisions.jsonl")
    tracked.table(
        "decisions",
        [
            {"id": row["id"], **_post(posts.get(row["id"])), "gold": row["gold"], "label": row["label"]}
            | {"stage": row["stage"], "reason": row["reason"], "uncertainty": row["student"]["uncertainty"]}
            | {role: (row[role] or {}).get("label") for role in ("student", "teacher", "review")}
            for row in rows
        ],
    )


def curves(tracked: StageRun, deferral: Iterable[Mapping[str, Any]], selective: Mapping[str, Any]) -> None:
    """Deferral curves by policy, and reliability diagrams of student and teacher before and after calibration.

    Args:
        deferral: rows of `deferral_curve.csv`.
        selective: metrics by role and calibration.
    """
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for row in deferral:
        xs, ys = lines.setdefault(row["policy"], ([], []))
        xs.append(row["deferred"])
        ys.append(row["quality"])
    tracked.curves("cascade/deferral", "Quality by fraction deferred", "deferred", lines)
    for role, model in selective.items():
        diagrams = {f"{when} calibration": _reliability(found["reliability"]) for when, found in model.items()}
        tracked.curves(f"cascade/reliability_{role}", f"Accuracy by confidence: {role}", "confidence", diagrams)


def _reliability(bins: Mapping[str, Sequence[Any]]) -> tuple[list[float], list[float]]:
    """Confidence and accuracy of the bins that are not empty."""
    found = [pair for pair in zip(bins["confidence"], bins["accuracy"], strict=True) if None not in pair]
    return [confidence for confidence, _ in found], [accuracy for _, accuracy in found]


def _rationale(context: Context, row: Mapping[str, Any]) -> dict[str, Any]:
    sample = jsonl.to_sample(row, context.corpus.root)
    who = {name: row.get(name) for name in ("source", "teacher_label")}
    return {"id": sample.id, **_post(sample), "label": str(sample.label), **who, "rationale": sample.rationale}


def _post(sample: Sample | None) -> dict[str, Any]:
    picture: Path | None = sample.images[0] if sample is not None and sample.images else None
    return {"image": picture, "text": None if sample is None else sample.text}


def _first_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    for row in islice(jsonl.read(path), ROWS) if path.exists() else ():
        yield row.fields
