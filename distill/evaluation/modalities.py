"""Posts without one of their modalities, for the evaluation of what a student takes from each."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from distill.task.sample import Sample

MODALITIES: dict[str, dict[str, Any]] = {
    "text": {"text": ""},
    "images": {"images": ()},
    "video": {"video": None},
    "audio": {"audio": None},
}
"""The fields of a post without each modality."""


def without_each(samples: Sequence[Sample]) -> Iterator[tuple[str, list[Sample]]]:
    """The posts without each modality that any of them has; nothing if they have only one.

    A post without video keeps its sound.
    """
    found = {name: fields for name, fields in MODALITIES.items() if any(getattr(sample, name) for sample in samples)}
    if len(found) > 1:
        for name, fields in found.items():
            yield name, [replace(sample, **fields) for sample in samples]
