"""`report.html` and the table at the end of a chain, from the files of the stages."""

from collections import Counter
from typing import Any

from distill.data import jsonl
from distill.data.clips import ClipReader
from distill.errors import SettingsError
from distill.evaluation.report import Report, write_report
from distill.evaluation.report_tables import TITLES, format_table
from distill.files import read_json
from distill.models.backbone import ModelSettings
from distill.recipe import Recipe, masked, to_yaml
from distill.stages import cascade
from distill.stages.evaluate import read_metrics
from distill.stages.report_posts import posts_and_decisions
from distill.stages.student import HARD_LABELS
from distill.tracking import Tracker

_CURVES = {
    "teacher": "teacher", "assistant": "assistant", "student": "student", "student_refined": "refine",
    "student_hard_labels": f"student/{HARD_LABELS}",
}  # fmt: skip
"""The folders with the `metrics.csv` of the roles."""
_SOURCES = (
    "annotate/summary.json", "evaluate/metrics.json", "evaluate/predictions.jsonl", "cascade/metrics.json",
    "cascade/deferral_curve.csv", "cascade/risk_coverage.csv", "cascade/decisions.jsonl",
)  # fmt: skip


def run(recipe: Recipe) -> None:
    """Write the report.

    Raises:
        SettingsError: the chain has not been evaluated, only with other labels, or its manifest is missing.
    """
    folder = recipe.folder
    roles, baselines = _metrics(recipe)
    if not is_available(recipe):
        raise SettingsError(f"{folder / 'evaluate'} was written with other task.labels; run: distill run")
    if not (folder / "chain.json").exists():
        raise SettingsError(f"{folder / 'chain.json'} is missing; run: distill run")
    # stages of removed sections keep their files
    stages = {
        name: entry for name, entry in read_json(folder / "chain.json")["stages"].items() if getattr(recipe, name, None)
    }
    summary = folder / "annotate" / "summary.json"
    gallery, decisions = posts_and_decisions(recipe)
    report = Report(
        name=recipe.name,
        labels=recipe.labels,
        roles=roles,
        baselines=baselines,
        curves={
            role: folder / name / "metrics.csv" for role, name in _CURVES.items() if name.partition("/")[0] in stages
        },
        annotation=read_json(summary) if recipe.annotate is not None and summary.exists() else None,
        cascade=_cascade(recipe),
        stages=stages,
        gallery=gallery,
        decisions=decisions,
        clips=ClipReader(recipe.data.video),
        without_images=[TITLES.get(role, role) for role in roles if not _reads_images(recipe, role)],
        settings=to_yaml(recipe),
        dates={
            "started": min(entry["started"] for entry in stages.values()),
            "evaluated": stages["evaluate"]["started"],
        },
        versions=stages["evaluate"]["versions"],
    )
    write_report(folder / "report.html", report)
    shown = [stage for stage in ("annotate", "evaluate", "cascade") if getattr(recipe, stage) is not None]
    with Tracker(recipe.tracking, folder, recipe.name).stage("report", masked(recipe), shown):
        pass  # the report is logged at the end of its run


def is_available(recipe: Recipe) -> bool:
    """Whether the chain has been evaluated, with the labels of the recipe: the metrics count them by position."""
    folder = recipe.folder / "evaluate"
    if not (folder / "metrics.json").exists():
        return False
    if "confusion" not in (majority := read_metrics(recipe.folder)["majority_class"]):
        return True
    gold = Counter(row.fields["gold"] for row in jsonl.read(folder / "predictions.jsonl"))
    return [sum(row) for row in majority["confusion"]] == [gold[name] for name in recipe.labels.names]


def is_current(recipe: Recipe) -> bool:
    """Whether `report.html` is newer than the files that it shows."""
    report, sources = recipe.folder / "report.html", [recipe.folder / name for name in _SOURCES]
    times = [path.stat().st_mtime_ns for path in sources if path.exists()]
    return report.exists() and report.stat().st_mtime_ns >= max(times, default=0)


def summary(recipe: Recipe) -> str:
    """The table of the roles, and the paths of the report and the exported student."""
    roles, baselines = _metrics(recipe)
    lines = [format_table(roles, baselines)]
    if (cascade := _cascade(recipe)) is not None:
        calls = f"{cascade['teacher_calls_per_sample']:.3f} teacher calls per post"
        lines.append(f"cascade  accuracy {cascade['accuracy']:.3f} with {calls}")
    lines.append(f"report   {recipe.folder / 'report.html'}")
    if recipe.export is not None and (recipe.folder / "export" / "config.json").exists():
        lines.append(f"student  {recipe.folder / 'export'}")
    return "\n".join(lines)


def _metrics(recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metrics of the roles by name, and of the baselines by title."""
    path = recipe.folder / "evaluate" / "metrics.json"
    if not path.exists():
        raise SettingsError(f"{path} is missing; run: distill run --until evaluate with the same recipe")
    roles = read_metrics(recipe.folder)
    majority = roles.pop("majority_class")
    baselines = {f"majority class ({majority['label']})": majority}
    if (trivial := roles.pop("trivial", None)) is not None:
        baselines[f"training mean ({trivial['value']:.2f})"] = trivial
    return roles, baselines


def _reads_images(recipe: Recipe, role: str) -> bool:
    """Whether a role is given the images of the posts."""
    section = {"teacher": recipe.annotating_teacher, "assistant": recipe.assistant}.get(role, recipe.student)
    model = section if isinstance(section, ModelSettings) else getattr(section, "model", None)
    return not isinstance(model, ModelSettings) or model.images


def _cascade(recipe: Recipe) -> dict[str, Any] | None:
    """The cascade metrics with their curves; None if the cascade did not run."""
    if recipe.cascade is None or not (recipe.folder / "cascade" / "metrics.json").exists():
        return None
    return cascade.read_metrics(recipe.folder)
