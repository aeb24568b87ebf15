"""Stage `evaluate`: evaluates every role on the test split; writes `metrics.json` and `predictions.jsonl`."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from distill.annotation.batch import Batches
from distill.annotation.cached_teacher import CachedTeacher, TeacherQuery
from distill.data import jsonl
from distill.errors import SettingsError
from distill.evaluation.classification import majority_baseline
from distill.evaluation.evaluate import RoleOutputs, evaluate_role, gold_values, parse_or_none, role_metrics
from distill.evaluation.regression import trivial_baseline
from distill.files import read_json, write_json
from distill.models.endpoint import Endpoint
from distill.models.reasoner import Reasoner, Sampling
from distill.stages import tables
from distill.stages.context import Context, progress
from distill.stages.prefill import asking, prefill, trained
from distill.stages.student import HARD_LABELS
from distill.task.prompts import Template
from distill.task.rationale import Rationale
from distill.task.sample import MODALITIES, Sample
from distill.tracking import StageRun
from distill.workers.pool import cluster

_FILES = ("images", "video", "audio")


def run(context: Context, tracked: StageRun) -> None:
    """Run the stage; see `_run`."""
    with cluster(context.recipe.ray) if context.recipe.on_ray else nullcontext():  # once for all roles
        _run(context, tracked)


def _run(context: Context, tracked: StageRun) -> None:
    """Write `metrics.json` and `predictions.jsonl`.

    On a scale, `gold` and `label` in `predictions.jsonl` are bin names, and `value` is added.
    """
    recipe, labels, samples, root = context.recipe, context.labels, context.corpus.test, context.corpus.root
    settings = recipe.evaluate
    assert settings is not None and recipe.student is not None
    outputs: dict[str, RoleOutputs] = {}

    def evaluate(role: str, reasoner: Reasoner, template: Template | None) -> None:
        batches = _fill(context, reasoner, samples, template)
        with progress(f"evaluate {role}") as show:
            outputs[role] = evaluate_role(reasoner, samples, labels, settings, template, show)
        if batches is not None:
            batches.close()

    def evaluate_trained(role: str, stage: str, template: Template | None, part: str = "") -> None:
        with trained(context, stage, part) as reasoner:
            evaluate(role, reasoner, template)

    with context.cached_teacher("evaluate") if settings.teacher else nullcontext() as teacher:
        if teacher is not None:
            evaluate("teacher", teacher, "predict" if recipe.annotate is not None else None)
    del teacher  # frees the memory of a local teacher
    if recipe.assistant is not None:
        evaluate_trained("assistant", "assistant", "reason" if "reason" in recipe.assistant.tasks else None)
    evaluate_trained("student", "student", "reason" if "reason" in recipe.student.tasks else None)
    if recipe.refine is not None:
        evaluate_trained("student_refined", "refine", "reason")
    if recipe.student.hard_labels_baseline:
        evaluate_trained("student_hard_labels", "student", None, HARD_LABELS)

    references, texts = _references(context, outputs.get("teacher"))
    none: list[Any] = [None] * len(samples)
    metrics: dict[str, Any] = {}
    for role, output in outputs.items():
        # the teacher is not compared with its own rationales
        own = output.rationales is references
        compared = (none, none) if own else (references, texts)
        metrics[role] = role_metrics(output, samples, compared[0], labels, settings, compared[1])
    if settings.modalities:
        metrics |= _without_modalities(context)
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
            **{name: value for name, value in jsonl.to_row(sample, root).items() if name in _FILES},
            "gold": labels.name(sample.label),
            "reference": sample.rationale,
            "roles": {role: _answer(context, output, index) for role, output in outputs.items()},
        }
        | ({"value": sample.label} if labels.scale is not None else {})
        for index, sample in enumerate(samples)
    ]
    jsonl.write_rows(context.folder / "evaluate" / "predictions.jsonl", rows)
    tracked.log(metrics)
    tables.predictions(context, tracked, rows)


def _fill(
    context: Context, reasoner: Reasoner, samples: Sequence[Sample], template: Template | None = None
) -> Batches | None:
    """Fill the ledger of a role that has one. Returns its batches."""
    settings = context.recipe.evaluate
    assert settings is not None
    if not isinstance(reasoner, CachedTeacher):
        return None
    queries = [TeacherQuery("classify")]
    queries += [TeacherQuery(template, Sampling(max_new_tokens=settings.max_new_tokens))] if template else []
    batch = settings.batch if isinstance(reasoner.teacher, Endpoint) else None
    return prefill(context, "evaluate", reasoner, samples, list(map(asking, queries)), batch)


def _without_modalities(context: Context) -> dict[str, Any]:
    """The metrics of the student on the test posts without each modality that it is given, by role.

    A modality is not left out if the student's family cannot read what remains of a post.
    """
    recipe, labels = context.recipe, context.labels
    assert recipe.evaluate is not None and recipe.student is not None
    metrics = {}
    model = context.without_weights(recipe.student.model)
    media, needs_picture = model.encoder.media, model.family.needs_picture
    present = {name for post in context.corpus.test for name in post.modalities if media.takes(name)}
    removable = [name for name in MODALITIES if name in present and len(present) > 1]  # something must be left
    for name in removable:
        posts = [post.without(name) for post in context.corpus.test]
        if needs_picture and not all(media.shows(post.media) for post in posts):
            continue
        with trained(context, recipe.student_stage) as student:
            _fill(context, student, posts)
            with progress(f"evaluate student without {name}"):
                output = evaluate_role(student, posts, labels, recipe.evaluate, template=None)
        metrics[f"student_without_{name}"] = role_metrics(output, posts, [], labels, recipe.evaluate)
    return metrics


def read_metrics(folder: Path, student: str = "student") -> dict[str, Any]:
    """The metrics of roles and baselines in a run's folder. Raises SettingsError if they were edited and lack one.

    Args:
        student: the role of the student (`Recipe.student_role`).
    """
    content = read_json(path := folder / "evaluate" / "metrics.json")
    for name in (student, "majority_class"):
        if not isinstance(content, dict) or not isinstance(content.get(name), dict):
            raise SettingsError(f"{path} has no metrics of {name}; delete it and run: distill run, which rebuilds it")
    return content


def _references(context: Context, teacher: RoleOutputs | None) -> tuple[list[Rationale | None], Sequence[str | None]]:
    """Reference rationales of the test samples, parsed and as text: those recorded in the data if the recipe uses
    recordings or the teacher generated none, otherwise those of the teacher."""
    annotate, tests = context.recipe.annotate, context.corpus.test
    if (annotate is not None and annotate.recorded) or teacher is None or teacher.rationales is None:
        parsed = [parse_or_none(sample.rationale, context.labels, post=sample.text) for sample in tests]
        return parsed, [sample.rationale for sample in tests]
    return teacher.rationales, teacher.texts or []


def _answer(context: Context, outputs: RoleOutputs, index: int) -> dict[str, Any]:
    """The output of one role on one sample, as written to `predictions.jsonl`; None for what is unknown."""
    label, scores = outputs.label(index, context.labels), outputs.scores.row(index)
    return {
        "label": label,
        **({} if context.labels.scale is None else {"value": outputs.value(index, context.labels)}),
        "probabilities": None if label is None else scores.probabilities[0].tolist(),
        "label_mass": float(scores.label_mass[0]) if label is not None and scores.are_probabilities else None,
        "rationale": None if outputs.texts is None else outputs.texts[index],
    }
