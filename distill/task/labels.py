"""A label space: the names a model chooses from, in a fixed order, and the polarity of each."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LabelSpace:
    """K label names with their polarity (-1, 0 or 1).

    Raises:
        ValueError: fewer than two names, two that differ only in case or punctuation, an empty one, or a polarity list
            of another length.
    """

    names: tuple[str, ...] = ("negative", "neutral", "positive")
    polarity: tuple[int, ...] = (-1, 0, 1)

    def __post_init__(self) -> None:
        if len(self.names) < 2:
            raise ValueError("task.labels needs at least two names")
        plain = {_plain(name) for name in self.names}
        if "" in plain or any("\n" in name for name in self.names):
            raise ValueError("task.labels needs names with a letter or digit, each on one line")
        if len(plain) < len(self.names):
            raise ValueError(f"task.labels names one label twice: {', '.join(self.names)}")
        if len(self.polarity) != len(self.names) or not set(self.polarity) <= {-1, 0, 1}:
            raise ValueError("task.polarity needs one of -1, 0, 1 for each label")

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: object) -> int:
        """The position of a label. Raises ValueError for a name that is not in the space."""
        if name not in self.names:
            raise ValueError(f"unknown label {name!r}; the labels are {', '.join(self.names)}")
        return self.names.index(name)

    def find(self, text: str) -> str | None:
        """The label that `text` is, but for case, quotes and punctuation; None if it is anything else."""
        return next((name for name in self.names if _plain(name) == _plain(text)), None)

    @classmethod
    def from_names(cls, names: Sequence[str], polarity: Sequence[int] | None = None) -> "LabelSpace":
        """A space over `names`; without `polarity` the names spread evenly from negative to positive."""
        middle = (len(names) - 1) / 2
        signs = polarity if polarity is not None else [(i > middle) - (i < middle) for i in range(len(names))]
        return cls(tuple(names), tuple(signs))


def _plain(text: str) -> str:
    return text.strip(" \t\n\"'`*_.,;:{}[]").casefold()
