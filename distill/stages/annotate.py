"""Stage `annotate`: the teacher's reasoning data, with the ledger of what was paid for."""

from dataclasses import asdict, replace

from distill.annotation.annotate import annotate, recording_defects
from distill.annotation.ledger import Ledger
from distill.data import jsonl
from distill.data.corpus import SPLITS
from distill.stages.context import Context, progress, write_json
from distill.tracking import StageRun


def run(context: Context, tracked: StageRun) -> None:
    settings = context.recipe.annotate
    assert settings is not None
    folder = context.folder / "annotate"
    samples, teacher = context.corpus.train, context.teacher()
    with Ledger(folder / "ledger.jsonl") as ledger, progress("annotate") as show:
        outcome = annotate(samples, context.labels, teacher, settings, ledger, show)
    rows = []
    for kept in outcome.kept:
        extra = {"source": kept.source, "teacher_label": kept.teacher_label}
        rows.append((replace(kept.sample, label=kept.label), kept.rationale, extra))
    context.write_rationales("annotate", rows)
    jsonl.write_rows(folder / "quarantine.jsonl", (asdict(item) for item in outcome.quarantined))
    summary = outcome.summary
    if settings.recorded:  # of the whole recording, the rows that only judge included
        splits = {name: getattr(context.corpus, name) for name in SPLITS}
        summary["recording"] = {name: recording_defects(posts, context.labels) for name, posts in splits.items()}
    write_json(folder / "summary.json", summary)
    tracked.log({key: value for key, value in summary.items() if isinstance(value, int | float)})
    tracked.log_artifact("rationales", "dataset", folder / "rationales.jsonl")
