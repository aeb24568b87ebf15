"""Stage `augment`: rationales by the assistant on the training posts; those with the correct label are kept."""

import logging
from collections import Counter

from distill.annotation.augment import augment, select
from distill.annotation.cached_teacher import CachedTeacher, Start
from distill.annotation.ledger import Ledger
from distill.files import write_json
from distill.stages import tables
from distill.stages.context import Context, progress
from distill.stages.prefill import prefill
from distill.tracking import StageRun

log = logging.getLogger(__name__)


def run(context: Context, tracked: StageRun) -> None:
    settings = context.recipe.augment
    assert settings is not None
    labelled = {sample.id: sample for sample in context.curated if sample.label is not None}
    annotated = {sample.id: sample for sample in context.rationales("annotate")}
    # gold labels take precedence over the teacher's
    posts = select(list((annotated | labelled).values()), settings)
    folder = context.folder / "augment"
    assistant = context.source("assistant") if context.recipe.on_ray else context.reasoner("assistant")
    dropped: Counter[str] = Counter()
    first = context.first_answers("augment")

    def fill(teacher: CachedTeacher, start: Start) -> None:
        prefill(context, "augment", teacher, posts, [start])

    with Ledger(folder / "ledger.jsonl") as ledger, progress("augment") as show:
        kept = augment(posts, context.labels, assistant, settings, ledger, dropped, show, first, fill)
        rows = (
            (post, rationale, {"source": "augmented", "teacher_label": post.id not in labelled})
            for post, rationale in kept
        )
        context.write_rationales("augment", rows)
    summary = {"n": len(posts), "kept": len(posts) - dropped.total(), "dropped": dict(dropped)}
    if not summary["kept"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
        log.warning("augment: none of the assistant's %d rationales is kept (%s)", len(posts), reasons)
    write_json(folder / "summary.json", summary)
    tracked.log(summary)
    tables.rationales(context, tracked, "augment")
