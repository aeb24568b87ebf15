"""Validation and test splits for data without them: stratified, seeded, and without leakage from training."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

from distill.task.sample import Sample

PLACEHOLDER_SHARE, PLACEHOLDER_MINIMUM = 0.1, 10
"""A file or text of more than this share, and more than this number, of the samples says nothing about them."""


def stratified_split(samples: Sequence[Sample], fractions: Mapping[str, float], seed: int) -> dict[str, list[Sample]]:
    """Split off a stratified part of the labelled samples for each name in `fractions`; the rest is `train`.

    Samples that share an image, a video, a sound or a text form a group and stay together, so that no part repeats one
    of `train`. A file or text of more than PLACEHOLDER_SHARE of the samples is a placeholder and forms no group. A
    group with an unlabelled sample stays in `train`. Groups are assigned in random order, each to the first part that
    still has room for all of it. The assignment depends on the seed and the ids, not on the order of the rows; each
    part keeps that order. Values on a continuous scale are stratified by the nearest integer.
    """
    totals = Counter(_stratum(sample) for sample in samples if sample.label is not None)
    room = {
        part: Counter({stratum: int(count * fraction + 0.5) for stratum, count in totals.items()})
        for part, fraction in fractions.items()
    }
    part_of: dict[str, str] = {}
    for group in sorted(_groups(samples), key=lambda group: _sort_key(min(sample.id for sample in group), seed)):
        counts = Counter(_stratum(sample) for sample in group)
        part = next((part for part, left in room.items() if counts <= left), "train")
        if part != "train":
            room[part] -= counts
        part_of |= {sample.id: part for sample in group}
    return {part: [sample for sample in samples if part_of[sample.id] == part] for part in ("train", *fractions)}


def _groups(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Connected groups of samples that share a file (by content) or a text (up to case and white space)."""
    parent = list(range(len(samples)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    digests = {path: _digest(path) for path in {path for sample in samples for path in sample.media.files}}
    keys: list[set[Hashable]] = []
    for sample in samples:
        text = " ".join(sample.text.casefold().split())
        keys.append({*(digests[path] for path in sample.media.files), *([text] if text else [])})
    counts = Counter(key for found in keys for key in found)
    most = max(PLACEHOLDER_MINIMUM, PLACEHOLDER_SHARE * len(samples))
    owner: dict[Hashable, int] = {}
    for i, found in enumerate(keys):
        for key in found:
            if counts[key] <= most:
                parent[find(i)] = find(owner.setdefault(key, i))
    groups: dict[int, list[Sample]] = defaultdict(list)
    for i, sample in enumerate(samples):
        groups[find(i)].append(sample)
    return list(groups.values())


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _stratum(sample: Sample) -> str | int | None:
    return round(sample.label) if isinstance(sample.label, float) else sample.label


def _sort_key(identity: str, seed: int) -> bytes:
    """A key that sorts ids in an order that is random but fixed by the seed."""
    return hashlib.sha256(f"{seed} {identity}".encode()).digest()
