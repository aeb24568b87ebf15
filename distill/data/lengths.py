"""Posts that are longer than a model or the memory bears: their texts are cut, or the posts are dropped."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from distill.data.corpus import Corpus, Dropped
from distill.data.source import PARTS, SPLITS, DataSettings
from distill.data.stored import StoredPosts
from distill.data.stream import QUARANTINED
from distill.errors import SettingsError
from distill.task.sample import Sample

log = logging.getLogger(__name__)

MAX_TOKENS = 4096
"""Largest default of `data.max_tokens`."""

_SHOWN = 10  # ids in the warning


def longest_text(corpus: Corpus) -> int:
    """Bytes of the longest text: an upper bound of its tokens, because a token has at least one byte."""
    streamed = isinstance(corpus.train, StoredPosts)
    parts = [getattr(corpus, part) for part in PARTS if part != "train" or not streamed]
    return max(corpus.longest, *(len(sample.text.encode()) for part in parts for sample in part))


def limit_lengths(corpus: Corpus, settings: DataSettings, limit: int, cut: Callable[[str, int], str]) -> Corpus:
    """Return the corpus with texts of at most `limit` tokens; longer ones are cut or dropped (`data.too_long`).

    Only the text of a post is cut, at its end. The prompt around it stays whole. Logs a warning with the ids.

    Args:
        cut: returns the first `limit` tokens of a text; the same text if it has no more.

    Raises:
        SettingsError: no post of a split is left.
    """
    parts: dict[str, Any] = {}
    dropped, long, unlisted = list(corpus.dropped), [], corpus.unlisted
    for split in PARTS:
        if isinstance(posts := getattr(corpus, split), StoredPosts):
            parts[split], changed, gone = _limit_stored(posts, settings, limit, cut)
            long += changed
            dropped += gone
            unlisted += 0 if settings.too_long == "truncate" else len(changed) - len(gone)
            if not parts[split]:
                raise SettingsError(f"data.max_tokens: every post of the {split} split has more than {limit} tokens")
            continue
        parts[split] = []
        for sample in getattr(corpus, split):
            text = sample.text if len(sample.text.encode()) <= limit else cut(sample.text, limit)
            if text == sample.text:
                parts[split].append(sample)
                continue
            long.append(sample.id)
            if settings.too_long == "truncate":
                parts[split].append(replace(sample, text=text))
            else:
                file, row = corpus.places.get((split, sample.id)) or corpus.places["train", sample.id]
                dropped.append(Dropped(file, row, sample.id, f"the text has more than {limit} tokens"))
        if not parts[split] and split in SPLITS:
            raise SettingsError(f"data.max_tokens: every post of the {split} split has more than {limit} tokens")
    if long:
        ids = ", ".join(long[:_SHOWN]) + (", ..." if len(long) > _SHOWN else "")
        action = "are cut to" if settings.too_long == "truncate" else "are dropped for having more than"
        log.warning("data: %d posts %s %d tokens (data.max_tokens, data.too_long): %s", len(long), action, limit, ids)
    fields: dict[str, Any] = {**parts, "dropped": dropped, "unlisted": unlisted}
    return replace(corpus, **fields)


@dataclass(frozen=True)
class _Cut:
    """Cuts the text of a post that is read."""

    cut: Callable[[str, int], str]
    limit: int

    def __call__(self, sample: Sample) -> Sample:
        fits = len(sample.text.encode()) <= self.limit
        return sample if fits else replace(sample, text=self.cut(sample.text, self.limit))


def _limit_stored(
    posts: StoredPosts, settings: DataSettings, limit: int, cut: Callable[[str, int], str]
) -> tuple[StoredPosts, list[str], list[Dropped]]:
    """Stored posts with texts of at most `limit` tokens, the ids of those that are changed or dropped, and the first of
    the dropped ones."""
    change, long, dropped = _Cut(cut, limit), list[str](), list[Dropped]()

    def fits(sample: Sample) -> bool:
        if change(sample).text == sample.text:
            return True
        long.append(sample.id)
        return False

    kept = posts.selected(fits)
    if settings.too_long == "truncate":
        return posts.changed(change) if long else posts, long, []
    if long:
        gone = set(long[:QUARANTINED])
        for index in range(len(posts)):
            if (fields := posts.fields(index))["id"] in gone:
                reason = f"the text has more than {limit} tokens"
                dropped.append(Dropped(fields["file"], fields["row"], fields["id"], reason))
    return kept, long, dropped
