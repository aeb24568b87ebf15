"""Stage `annotate`: the teacher's reasoning data, with the ledger of what was paid for."""

import json
import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from typing import IO, Any

from distill.annotation.annotate import Kept, Quarantined, Tally, annotate, recording_defects
from distill.annotation.ledger import Ledger
from distill.data.corpus import SPLITS
from distill.files import atomic_write, write_json
from distill.stages.context import Context, progress
from distill.task.rationale import Rationale
from distill.task.sample import Sample
from distill.tracking import StageRun

log = logging.getLogger(__name__)


def run(context: Context, tracked: StageRun) -> None:
    settings = context.recipe.annotate
    assert settings is not None
    folder = context.folder / "annotate"
    samples, teacher, tally = context.corpus.train, context.teacher(), Tally()
    with (
        Ledger(folder / "ledger.jsonl") as ledger,
        atomic_write(folder / "quarantine.jsonl") as quarantine,
        progress("annotate") as show,
        # closed before the ledger is, so that answers under way still reach it
        closing(annotate(samples, context.labels, teacher, settings, ledger, tally, show)) as outcomes,
    ):
        context.write_rationales("annotate", _kept(outcomes, quarantine))
    summary = tally.summary
    if silent := tally.quarantined["unanswered"]:
        log.warning("%d posts were left unanswered; %s says why", silent, folder / "quarantine.jsonl")
    if settings.recorded:  # of the whole recording, the rows that only judge included
        splits = {name: getattr(context.corpus, name) for name in SPLITS}
        summary["recording"] = {name: recording_defects(posts, context.labels) for name, posts in splits.items()}
    write_json(folder / "summary.json", summary)
    tracked.log({key: value for key, value in summary.items() if isinstance(value, int | float)})
    tracked.log_artifact("rationales", "dataset", folder / "rationales.jsonl")


def _kept(
    outcomes: Iterator[Kept | Quarantined], quarantine: IO[str]
) -> Iterator[tuple[Sample, Rationale, dict[str, Any]]]:
    """The rationales as they come; what was quarantined goes to its file."""
    for item in outcomes:
        if isinstance(item, Kept):
            extra = {"source": item.source, "teacher_label": item.teacher_label}
            yield replace(item.sample, label=item.label), item.rationale, extra
        else:
            quarantine.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")
