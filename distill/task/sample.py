"""One post: the model's inputs and their annotations."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """A post with its annotations.

    Attributes:
        aspect: the target of an aspect-level sentiment; None for the sentiment of the whole post.
        label: a name of the label space, a value on a continuous scale, or None if the post is unlabelled.
        rationale: a teacher's text in any format that `task/rationale.py` parses.
        attributes: ground truth about a post of the built-in corpus, for evaluation and the reward `grounded`; never
            shown to a model.
    """

    id: str
    text: str
    images: tuple[Path, ...] = ()
    aspect: str | None = None
    label: str | float | None = None
    rationale: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
