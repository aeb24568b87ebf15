"""Stage `cascade`: the three stages over the test split, and the evidence of what they are worth."""

import csv
import io
from dataclasses import replace

from distill.cascade.cascade import Calibration, CascadePolicy, describe
from distill.cascade.cascade import run as take_through
from distill.cascade.deferral import cascade_metrics, deferral_rows, selective_metrics
from distill.data import jsonl
from distill.files import read_json, write_json, write_text
from distill.models.endpoint import Endpoint
from distill.models.reasoner import Cost
from distill.stages.context import Context
from distill.tracking import StageRun


def run(context: Context, tracked: StageRun) -> None:
    settings, samples, labels = context.recipe.cascade, context.corpus.test, context.labels
    assert settings is not None
    folder = context.folder / "cascade"
    student = context.reasoner("student")
    path = context.folder / "calibrate" / "calibration.json"
    calibration = Calibration.read(path, student.name)
    policy = CascadePolicy(labels, calibration, settings.on_agreement)
    gold = [sample.label for sample in samples if sample.label is not None]
    scores = {"student": student.classify(samples)}
    with context.asked_teacher(of_cascade=True) as teacher:
        assert teacher is not None  # the recipe was checked
        decisions = take_through(samples, scores["student"], teacher, policy)
        if settings.deferral_curve:
            scores["teacher"] = teacher.classify(samples)

        asked = teacher.teacher

    def price(cost: Cost) -> float | None:
        return asked.cost(cost.prompt_tokens, cost.completion_tokens) if isinstance(asked, Endpoint) else None

    plain = replace(policy, calibration=replace(calibration, student_temperature=1.0, teacher_temperature=1.0))
    predictions = {"student": policy.student(scores["student"])}
    before = {"student": plain.student(scores["student"])}
    if "teacher" in scores:
        predictions["teacher"], before["teacher"] = policy.teacher(scores["teacher"]), plain.teacher(scores["teacher"])
    metrics = cascade_metrics(decisions, gold, labels, predictions.get("teacher"), price)
    metrics["measure"] = calibration.measure
    metrics["promise"] = read_json(path)["promise"]["says"]
    metrics["selective"] = {
        role: selective_metrics(before[role], predictions[role], gold, labels) for role in predictions
    }
    rows = []
    if "teacher" in predictions:
        rows = deferral_rows(predictions["student"], predictions["teacher"], gold, labels, price, settings.resamples)
    table = io.StringIO()
    writer = csv.DictWriter(table, ["policy", "deferred", "quality", "low", "high", "seconds", "currency"])
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "deferral_curve.csv", table.getvalue())
    found = zip(samples, decisions, strict=True)
    jsonl.write_rows(
        folder / "decisions.jsonl",
        (
            {"id": sample.id, "gold": sample.label, "label": policy.label(decision.probabilities)} | describe(decision)
            for sample, decision in found
        ),
    )
    write_json(folder / "metrics.json", metrics)
    tracked.log({f"cascade/{name}": value for name, value in metrics.items() if isinstance(value, int | float)})
