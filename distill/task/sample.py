"""One post: what the models see, and what is known about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """A post with its annotations.

    `label` is a name of the label space, a value on a continuous scale, or None where nobody labelled the post.
    `rationale` is text as a teacher wrote it, parsed by `task/rationale.py`. `attributes` say what a post of the
    built-in corpus really shows, and no model ever sees them.
    """

    id: str
    text: str
    images: tuple[Path, ...] = ()
    aspect: str | None = None
    label: str | float | None = None
    rationale: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
