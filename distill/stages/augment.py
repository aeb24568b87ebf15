"""Stage `augment`: rationales by the assistant on the training posts; those with the correct label are kept."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from distill.annotation.augment import AugmentSettings, augment, select
from distill.annotation.cached_teacher import CachedTeacher, Start
from distill.annotation.ledger import Ledger
from distill.data.stored import StoredPosts, labelled
from distill.files import write_json
from distill.stages import tables
from distill.stages.context import Context, progress
from distill.stages.prefill import prefill
from distill.task.sample import Sample
from distill.tracking import StageRun

log = logging.getLogger(__name__)


def run(context: Context, tracked: StageRun) -> None:
    settings = context.recipe.augment
    assert settings is not None
    folder = context.folder / "augment"
    parts = _posts(context, settings)
    count = sum(len(posts) for posts, _ in parts)
    assistant = context.source("assistant") if context.recipe.on_ray else context.reasoner("assistant")
    dropped: Counter[str] = Counter()
    first = context.first_answers("augment")

    def fill(posts: Sequence[Sample], teacher: CachedTeacher, start: Start) -> None:
        prefill(context, "augment", teacher, posts, [start])

    with Ledger(folder / "ledger.jsonl") as ledger, progress("augment") as show:
        rows = (
            (post, rationale, {"source": "augmented", "teacher_label": is_teachers(post.id)})
            for posts, is_teachers in parts
            for post, rationale in augment(
                posts, context.labels, assistant, settings, ledger, dropped, show, first, partial(fill, posts)
            )
        )
        context.write_rationales("augment", rows)
    summary = {"n": count, "kept": count - dropped.total(), "dropped": dict(dropped)}
    if not summary["kept"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
        log.warning("augment: none of the assistant's %d rationales is kept (%s)", count, reasons)
    write_json(folder / "summary.json", summary)
    tracked.log(summary)
    tables.rationales(context, tracked, "augment")


def _posts(context: Context, settings: AugmentSettings) -> list[tuple[Sequence[Sample], Callable[[str], bool]]]:
    """The posts that are augmented, each part with whether the label of a post is the teacher's.

    Gold labels take precedence over the teacher's.
    """
    gold, annotated = labelled(context.curated), context.rationales("annotate")
    if not isinstance(gold, StoredPosts) or not isinstance(annotated, StoredPosts):
        names = {sample.id: sample for sample in gold}
        posts = {sample.id: sample for sample in annotated} | names
        return [(select(list(posts.values()), settings), lambda name: name not in names)]
    flags = (bool(annotated.fields(number).get("teacher_label")) for number in range(len(annotated)))
    others = annotated.taken(np.flatnonzero(np.fromiter(flags, dtype=bool)))
    total = len(gold) + len(others)
    count = min(settings.posts or total, total)
    chosen = np.arange(count, dtype=np.int64) * total // max(1, count)
    parts = gold.taken(chosen[chosen < len(gold)]), others.taken(chosen[chosen >= len(gold)] - len(gold))
    return [(parts[0], lambda _: False), (parts[1], lambda _: True)]
