"""Validation and test parts for data that brings none: stratified, seeded, and without leaks."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence

from distill.task.sample import Sample


def set_apart(samples: Sequence[Sample], fractions: Mapping[str, float], seed: int) -> dict[str, list[Sample]]:
    """`train`, and for each name in `fractions` a stratified part of the labelled samples, all in their given order.

    Posts that share an image or a text stay together, so a part never sees a training post again; a group that holds
    an unlabelled post stays in train. Groups are taken in a random order, each by the first part that still wants all
    of it. Who goes where depends on the seed and on the ids, not on the order of the rows. Values on a continuous
    scale are stratified by the nearest integer.
    """
    totals = Counter(_stratum(sample) for sample in samples if sample.label is not None)
    wanted = {part: Counter({s: int(n * share + 0.5) for s, n in totals.items()}) for part, share in fractions.items()}
    part_of: dict[str, str] = {}
    for group in sorted(_groups(samples), key=lambda group: _shuffled(min(sample.id for sample in group), seed)):
        counts = Counter(_stratum(sample) for sample in group)
        part = next((part for part, left in wanted.items() if counts <= left), "train")
        if part != "train":
            wanted[part] -= counts
        part_of |= {sample.id: part for sample in group}
    return {part: [sample for sample in samples if part_of[sample.id] == part] for part in ("train", *fractions)}


def _groups(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples that share an image (by content) or a text (but for case and spaces), directly or through others."""
    parent = list(range(len(samples)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    images = {image for sample in samples for image in sample.images}
    digests = {image: hashlib.sha256(image.read_bytes()).digest() for image in images}
    owner: dict[Hashable, int] = {}
    for i, sample in enumerate(samples):
        text = " ".join(sample.text.casefold().split())
        for key in [*(digests[image] for image in sample.images), *([text] if text else [])]:
            parent[find(i)] = find(owner.setdefault(key, i))
    groups: dict[int, list[Sample]] = defaultdict(list)
    for i, sample in enumerate(samples):
        groups[find(i)].append(sample)
    return list(groups.values())


def _stratum(sample: Sample) -> str | int | None:
    return round(sample.label) if isinstance(sample.label, float) else sample.label


def _shuffled(identity: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed} {identity}".encode()).digest()
