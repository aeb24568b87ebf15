"""Stage `evaluate`: every role on the test split, `metrics.json`, `predictions.jsonl` and the report."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from distill.data import jsonl
from distill.evaluation.classification import majority_baseline
from distill.evaluation.evaluate import Judged, gold_values, judge, read, role_metrics
from distill.evaluation.regression import trivial_baseline
from distill.files import write_json
from distill.models.reasoner import Reasoner
from distill.stages.context import Context, progress
from distill.stages.student import HARD_LABELS
from distill.task.prompts import Template
from distill.task.rationale import Rationale
from distill.tracking import StageRun


def run(context: Context, tracked: StageRun) -> None:
    """On a scale, `gold` and `label` are the bins' names, and `value` stands beside them."""
    recipe, labels, samples = context.recipe, context.labels, context.corpus.test
    settings = recipe.evaluate
    assert settings is not None and recipe.student is not None
    judged: dict[str, Judged] = {}

    def ask(role: str, reasoner: Reasoner, template: Template | None) -> None:
        with progress(f"evaluate {role}") as show:
            judged[role] = judge(reasoner, samples, labels, settings, template, show)

    with context.asked_teacher() if settings.teacher else nullcontext() as teacher:
        if teacher is not None:
            ask("teacher", teacher, "predict" if recipe.annotate is not None else None)
    del teacher  # one on this machine makes room for the others
    if recipe.assistant is not None:
        ask("assistant", context.reasoner("assistant"), "reason" if "reason" in recipe.assistant.tasks else None)
    ask("student", context.reasoner("student"), "reason" if "reason" in recipe.student.tasks else None)
    if recipe.student.hard_labels_baseline:
        ask("student_hard_labels", context.reasoner("student", HARD_LABELS), None)

    references = _references(context, judged.get("teacher"))
    none: list[Rationale | None] = [None] * len(samples)
    metrics: dict[str, Any] = {}
    for role, answers in judged.items():
        held_against = none if answers.rationales is references else references  # a reference is not, against itself
        metrics[role] = role_metrics(answers, samples, held_against, labels, settings)
    gold = [labels.name(sample.label) for sample in context.corpus.train if sample.label is not None]
    metrics["majority_class"] = majority_baseline(gold, [labels.name(sample.label) for sample in samples], labels)
    if labels.scale is not None:
        train, test = gold_values(context.corpus.train), gold_values(samples)
        metrics["trivial"] = trivial_baseline(train, test, labels.scale)
    write_json(context.folder / "evaluate" / "metrics.json", metrics)
    rows = [
        {
            "id": sample.id,
            "text": sample.text,
            "aspect": sample.aspect,
            "images": jsonl.row(sample, context.corpus.root)["images"],
            "gold": labels.name(sample.label),
            "reference": sample.rationale,
            "roles": {role: _answer(context, answers, index) for role, answers in judged.items()},
        }
        | ({"value": sample.label} if labels.scale is not None else {})
        for index, sample in enumerate(samples)
    ]
    jsonl.write_rows(context.folder / "evaluate" / "predictions.jsonl", rows)
    tracked.log({f"{role}/{key}": value for role, values in metrics.items() for key, value in values.items()
                 if isinstance(value, int | float)})  # fmt: skip
    tracked.table("predictions", [_table_row(context, row) for row in rows[:32]])


def _references(context: Context, teacher: Judged | None) -> list[Rationale | None]:
    """The teacher's rationales: as recorded in the data where the recipe trusts the recording, else as just given."""
    annotate = context.recipe.annotate
    if (annotate is not None and annotate.recorded) or teacher is None or teacher.rationales is None:
        return [read(sample.rationale, context.labels) for sample in context.corpus.test]
    return teacher.rationales


def _answer(context: Context, answers: Judged, index: int) -> dict[str, Any]:
    value = answers.value(index, context.labels)
    return {
        "label": answers.label(index, context.labels),
        **({} if value is None else {"value": value}),
        "probabilities": answers.scores.probabilities[index].tolist(),
        "label_mass": float(answers.scores.label_mass[index]),
        "rationale": None if answers.texts is None else answers.texts[index],
    }


def _table_row(context: Context, row: Mapping[str, Any]) -> dict[str, Any]:
    image = context.corpus.root / row["images"][0] if row["images"] else None
    predicted = {role: answer["label"] for role, answer in row["roles"].items()}
    said = row["roles"]["student"]["rationale"]
    return {"image": image, "text": row["text"], "gold": row["gold"], **predicted, "rationale": said}
