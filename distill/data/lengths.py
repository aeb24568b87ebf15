"""Posts that are longer than a model or the memory bears: their texts are cut, or the posts are dropped."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from distill.data.corpus import Corpus, Dropped
from distill.data.source import PARTS, SPLITS, DataSettings
from distill.errors import SettingsError
from distill.task.sample import Sample

log = logging.getLogger(__name__)

MAX_TOKENS = 4096
"""Largest default of `data.max_tokens`."""

_SHOWN = 10  # ids in the warning


def longest_text(corpus: Corpus) -> int:
    """Bytes of the longest text: an upper bound of its tokens, because a token has at least one byte."""
    return max(len(sample.text.encode()) for part in PARTS for sample in getattr(corpus, part))


def limit_lengths(corpus: Corpus, settings: DataSettings, limit: int, cut: Callable[[str, int], str]) -> Corpus:
    """Return the corpus with texts of at most `limit` tokens; longer ones are cut or dropped (`data.too_long`).

    Only the text of a post is cut, at its end. The prompt around it stays whole. Logs a warning with the ids.

    Args:
        cut: returns the first `limit` tokens of a text; the same text if it has no more.

    Raises:
        SettingsError: no post of a split is left.
    """
    parts: dict[str, list[Sample]] = {}
    dropped, long = list(corpus.dropped), []
    for split in PARTS:
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
    changed: dict[str, Any] = {**parts, "dropped": dropped}
    return replace(corpus, **changed)
