"""Stage `cascade`: runs the cascade on the test split and writes its decisions, metrics and curves."""

import csv
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.cascade.calibration import stack_probabilities
from distill.cascade.cascade import Calibration, CascadePolicy, CascadeSettings, modalities_of, run_cascade
from distill.cascade.deferral import cascade_metrics, deferral_rows, selective_metrics
from distill.cascade.uncertainty import error_probability, uncertainty
from distill.data import jsonl
from distill.files import read_json, write_csv, write_json
from distill.models.endpoint import Endpoint
from distill.models.reasoner import Cost
from distill.stages import tables
from distill.stages.context import Context
from distill.tracking import StageRun

log = logging.getLogger(__name__)

CALIBRATION = "calibrate/calibration.json"
RISK_COVERAGE = "risk_coverage.csv"


def calibrated_policy(context: Context) -> CascadePolicy:
    """The policy with the calibration of a chain. Raises SettingsError if it was made with another student."""
    calibration = Calibration.read(context.folder / CALIBRATION, context.reasoner_name(context.recipe.student_stage))
    settings = context.recipe.cascade or CascadeSettings()
    reviews, explains = (context.recipe.teacher_learned(task) for task in ("review", "explain"))
    return CascadePolicy(context.labels, calibration, settings.on_agreement, reviews, explains)


def run(context: Context, tracked: StageRun) -> None:
    settings, samples, labels = context.recipe.cascade, context.corpus.test, context.labels
    assert settings is not None
    folder = context.folder / "cascade"
    student, policy = context.reasoner(context.recipe.student_stage), calibrated_policy(context)
    calibration, fitted = policy.calibration, read_json(context.folder / CALIBRATION)
    if not policy.reviews:
        log.warning("stage 3 of the cascade is skipped: teacher.tasks has no review, so the teacher did not learn it")
    gold = [sample.label for sample in samples if sample.label is not None]
    student_scores, teacher_scores = student.classify(samples), None
    with context.cached_teacher("cascade") as teacher:
        assert teacher is not None  # guaranteed by the validation of the recipe
        decisions = run_cascade(samples, student_scores, teacher, policy)
        if settings.deferral_curve:
            teacher_scores = teacher.classify(samples)
        model = teacher.teacher

    def price(cost: Cost) -> float | None:
        return model.cost(cost.prompt_tokens, cost.completion_tokens) if isinstance(model, Endpoint) else None

    plain = replace(
        calibration, student_temperature=1.0, teacher_temperature=1.0, student_errors=None, teacher_errors=None,
        student_by_modalities={}, teacher_by_modalities={},
    )  # fmt: skip
    uncalibrated = replace(policy, calibration=plain)
    modalities = modalities_of(samples)
    after = {"student": policy.student_predictions(student_scores, modalities)}
    before = {"student": uncalibrated.student_predictions(student_scores)}
    if teacher_scores is not None:
        after["teacher"] = policy.teacher_predictions(teacher_scores, modalities)
        before["teacher"] = uncalibrated.teacher_predictions(teacher_scores)
    metrics = cascade_metrics(decisions, gold, labels, after.get("teacher"), price)
    metrics["measure"], metrics["reviews"] = calibration.signal, policy.reviews
    metrics["promise"] = fitted["promise"]["says"]
    known = {role: fitted["models"][role]["ece_before"] is not None for role in ("student", "teacher")}
    if teacher_scores is not None:
        known["teacher"] = teacher_scores.are_probabilities
    if not all(known.values()):  # agreement of samples is no probability
        metrics |= {"ece": None, "aurc": None}
    metrics["selective"] = {
        role: selective_metrics(before[role], after[role], gold, labels)
        for role, predictions in after.items()
        if known[role] and any(prediction.answered for prediction in predictions)
    }
    write_csv(folder / RISK_COVERAGE, ["role", "calibration", "coverage", "risk"], _take_curves(metrics["selective"]))
    rows = []
    if "teacher" in after:
        knots = tuple(fitted["models"]["student"]["error_probability"].values())
        error = error_probability(uncertainty(stack_probabilities(after["student"]), calibration.measure), knots)
        rows = deferral_rows(after["student"], after["teacher"], gold, labels, price, settings.resamples, error)
    columns = ["policy", "deferred", "quality", "low", "high", "seconds", "currency"]
    write_csv(folder / "deferral_curve.csv", columns, rows)
    jsonl.write_rows(
        folder / "decisions.jsonl",
        (
            {"id": sample.id, "gold": sample.label, "label": policy.label(decision.probabilities)} | decision.to_json()
            for sample, decision in zip(samples, decisions, strict=True)
        ),
    )
    write_json(folder / "metrics.json", metrics)
    tracked.log({"cascade": metrics})
    tables.decisions(context, tracked)
    tables.curves(tracked, rows, metrics["selective"])


def _take_curves(selective: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Take the risk-coverage curves out of the selective metrics; returns the rows of their file."""
    rows = []
    for role, model in selective.items():
        for when, found in model.items():
            points = zip(*found.pop("risk_coverage").values(), strict=True)
            rows += [{"role": role, "calibration": when, "coverage": x, "risk": y} for x, y in points]
    return rows


def read_metrics(folder: Path) -> dict[str, Any]:
    """`cascade/metrics.json` of a run's folder, with the rows of `deferral_curve.csv` under `deferral`, and with the
    risk-coverage curves, which earlier versions wrote into that file."""
    metrics: dict[str, Any] = read_json(folder / "cascade" / "metrics.json")
    metrics["deferral"] = _rows(folder / "cascade" / "deferral_curve.csv")
    if (curves := folder / "cascade" / RISK_COVERAGE).exists():
        for row in _rows(curves):
            model = metrics["selective"][row["role"]][row["calibration"]]
            points = model.setdefault("risk_coverage", {"coverage": [], "risk": []})
            for name, values in points.items():
                values.append(float(row[name]))
    return metrics


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
