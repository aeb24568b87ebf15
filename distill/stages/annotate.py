"""Stage `annotate`: the teacher's rationales, with a ledger of all answers."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from typing import IO, Any

from distill.annotation import curation
from distill.annotation.annotate import AnnotationCounts, Kept, Quarantined, annotate, recording_defects
from distill.annotation.batch import Batches
from distill.annotation.cached_teacher import CachedTeacher, Start
from distill.annotation.ledger import Ledger
from distill.data import jsonl
from distill.data.source import SPLITS
from distill.errors import RunError, SettingsError
from distill.files import atomic_write, write_json
from distill.stages import tables
from distill.stages.context import Context, progress
from distill.stages.prefill import prefill
from distill.task.rationale import Rationale
from distill.task.sample import Sample
from distill.tracking import StageRun

log = logging.getLogger(__name__)


def run(context: Context, tracked: StageRun) -> None:
    """Write `rationales.jsonl`, `quarantine.jsonl`, `curated.jsonl`, `summary.json` and the ledger of the stage.

    Raises:
        RunError, SettingsError: no post has a valid rationale, or the teacher's first answers are all invalid. Only the
            ledger is written then.
    """
    settings = context.recipe.annotate
    assert settings is not None
    folder = context.folder / "annotate"
    curated = curation.curate(context.corpus.train, context.decisions, context.labels)
    samples, tally = curated.posts, AnnotationCounts()
    if unknown := curated.unknown:
        log.warning(
            "%s has decisions about %d posts that are not in the training split, such as %s",
            context.folder / curation.DECISIONS, len(unknown), ", ".join(unknown[:3]),
        )  # fmt: skip
    labels, other_servers = context.teacher_labels, context.recipe.other_servers()
    teacher = context.teacher(context.recipe.annotating_teacher, labels, on_workers=context.recipe.on_ray)
    first = context.first_answers("annotate")

    found: list[Batches] = []

    def fill(teacher: CachedTeacher, start: Start) -> None:
        batches = prefill(context, "annotate", teacher, samples, [start], settings.batch)
        found.extend(filter(None, [batches]))

    def nothing_kept() -> Exception:
        first.end()
        unlabelled = tally.unlabelled["seen"] - tally.unlabelled["quarantined"]
        counts = tally.quarantined + Counter({
            "without a label": unlabelled, "without a recording": tally.unannotated,
            "dropped by a person": curated.counts["dropped"],
        })  # fmt: skip
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        kind = SettingsError if teacher is None else RunError
        n = len(context.corpus.train)
        return kind(f"annotate: none of the {n} posts has a valid rationale ({reasons})")

    with (
        Ledger(folder / "ledger.jsonl") as ledger,
        atomic_write(folder / "quarantine.jsonl") as quarantine,
        progress("annotate") as show,
        # closed before the ledger, so that answers in flight are still written to it
        closing(
            annotate(samples, labels, teacher, settings, ledger, tally, show, other_servers, first, curated.edits, fill)
        ) as results,
    ):
        context.write_rationales("annotate", _kept(results, quarantine, nothing_kept))
    jsonl.write_rows(context.folder / curation.APPLIED, (item.fields() for item in context.decisions.values()))
    summary = tally.summary | {"curated": curated.counts}
    for batches in found:
        summary["batch"] = batches.summary
        batches.close()
    if unanswered := tally.quarantined["unanswered"]:
        log.warning(
            "%d posts got no answer; the reasons are in %s; to ask for them again, delete %s and run: distill run",
            unanswered, folder / "quarantine.jsonl", folder / "summary.json",
        )  # fmt: skip
    if filtered := tally.quarantined["filtered"]:
        log.warning(
            "%d posts were refused by a content filter; they are listed in %s", filtered, folder / "quarantine.jsonl"
        )
    if settings.recorded:  # count the defects of the recording in all splits, not only in the training rows
        splits = {name: getattr(context.corpus, name) for name in SPLITS}
        summary["recording"] = {name: recording_defects(posts, context.labels) for name, posts in splits.items()}
    write_json(folder / "summary.json", summary)
    tracked.log(summary)
    tables.rationales(context, tracked, "annotate")


def _kept(
    results: Iterator[Kept | Quarantined], quarantine: IO[str], nothing_kept: Callable[[], Exception]
) -> Iterator[tuple[Sample, Rationale, dict[str, Any]]]:
    """Yield the kept rationales in order of arrival; write the others to the quarantine file.

    Args:
        nothing_kept: returns the error to raise if there are none.
    """
    is_empty = True
    for item in results:
        if isinstance(item, Kept):
            is_empty = False
            extra = {"source": item.source, "teacher_label": item.teacher_label}
            yield replace(item.sample, label=item.label), item.rationale, extra
        else:
            quarantine.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")
    if is_empty:
        raise nothing_kept()
