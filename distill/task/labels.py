"""A label space: the names a model chooses from, in a fixed order, the polarity of each, and the bins of a scale."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Scale:
    """A continuous scale cut into K bins, so that a classifier can learn it (U-ACS).

    The centres run evenly from `low` to `high`, so that both ends can be predicted; a bin holds what is nearest to its
    centre. Seven bins on [-3, 3] are the classes of Acc-7.

    Raises:
        ValueError: an empty scale, fewer than two bins, or a negative dead zone or spread.
    """

    low: float = -3.0
    """Lowest label."""
    high: float = 3.0
    """Highest label."""
    bins: int = 7
    """Number of bins, K."""
    dead_zone: float = 0.0
    """Values at most this far from zero have polarity 0."""
    spread: float = 0.75
    """Standard deviation of the training targets in bin widths, a Gaussian over the bins; 0: the nearest bin alone."""

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low is {self.low:g}; it takes a number below high, {self.high:g}")
        if self.bins < 2:
            raise ValueError(f"bins is {self.bins}; it takes 2 or more")
        for name in ("dead_zone", "spread"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name):g}; it takes 0 or more")

    @property
    def centres(self) -> np.ndarray:
        """[K], ascending."""
        return np.linspace(self.low, self.high, self.bins)

    def bin(self, value: float) -> int:
        """The bin whose centre is nearest to a value, the lower of two. Raises ValueError outside the scale."""
        if not self.low <= value <= self.high:
            raise ValueError(f"label {value:g} is outside the scale from {self.low:g} to {self.high:g}")
        return int(np.abs(self.centres - value).argmin())

    def targets(self, values: Sequence[float]) -> np.ndarray:
        """Training targets [B, K] of B values, rows sum to 1: a Gaussian over the bins, or one-hot (U-ACS)."""
        if self.spread == 0:
            return np.eye(self.bins)[[self.bin(value) for value in values]]
        width = (self.high - self.low) / (self.bins - 1)
        steps = (self.centres[None] - np.asarray(values, dtype=np.float64)[:, None]) / (self.spread * width)
        weights = np.exp(-0.5 * (steps**2 - (steps**2).min(1, keepdims=True)))
        return weights / weights.sum(1, keepdims=True)

    def expectation(self, probabilities: np.ndarray) -> np.ndarray:
        """Values [B] recovered from bin probabilities [B, K]: Σ p_k c_k (U-ACS)."""
        return np.asarray(probabilities) @ self.centres

    def polarity(self, values: np.ndarray) -> np.ndarray:
        """-1, 0 or 1 for each value: its sign outside the dead zone."""
        values = np.asarray(values)
        return (np.sign(values) * (np.abs(values) > self.dead_zone)).astype(int)


@dataclass(frozen=True)
class LabelSpace:
    """K label names with their polarity (-1, 0 or 1), and where the labels are numbers the scale that they cut.

    Raises:
        ValueError: fewer than two names, two that differ only in case or punctuation, an empty one, or a polarity list
            or bins of another length.
    """

    names: tuple[str, ...] = ("negative", "neutral", "positive")
    polarity: tuple[int, ...] = (-1, 0, 1)
    scale: Scale | None = None

    def __post_init__(self) -> None:
        if len(self.names) < 2:
            raise ValueError("task.labels needs at least two names")
        plain = {_plain(name) for name in self.names}
        if "" in plain or any("\n" in name for name in self.names):
            raise ValueError("task.labels needs names with a letter or digit, each on one line")
        if len(plain) < len(self.names):
            raise ValueError(f"task.labels names one label twice: {', '.join(self.names)}")
        if self.scale is not None and self.scale.bins != len(self.names):
            raise ValueError(f"task.labels needs one name for each of the {self.scale.bins} bins of task.scale")
        if len(self.polarity) != len(self.names) or not set(self.polarity) <= {-1, 0, 1}:
            raise ValueError("task.polarity needs one of -1, 0, 1 for each label")

    def __len__(self) -> int:
        return len(self.names)

    def index(self, label: object) -> int:
        """The position of a label name, or of the bin that a value on the scale falls into.

        Raises:
            ValueError: a name that is not in the space, or a value outside its scale.
        """
        if self.scale is not None and isinstance(label, float):
            return self.scale.bin(label)
        if label not in self.names:
            raise ValueError(f"unknown label {label!r}; the labels are {', '.join(self.names)}")
        return self.names.index(label)

    def name(self, label: object) -> str:
        """The name of a label, or of the bin that a value falls into. Raises ValueError as `index`."""
        return self.names[self.index(label)]

    def find(self, text: str) -> str | None:
        """The label that `text` is, but for case, quotes and punctuation; None if it is anything else."""
        return next((name for name in self.names if _plain(name) == _plain(text)), None)

    def polarities(self, probabilities: np.ndarray) -> np.ndarray:
        """Polarity [B] of the answers that probabilities [B, K] give: of the likeliest label, or of the value."""
        if self.scale is not None:
            return self.scale.polarity(self.scale.expectation(probabilities))
        return np.array(self.polarity)[np.asarray(probabilities).argmax(-1)]

    @classmethod
    def from_names(cls, names: Sequence[str], polarity: Sequence[int] | None = None) -> "LabelSpace":
        """A space over `names`; without `polarity` the names spread evenly from negative to positive."""
        middle = (len(names) - 1) / 2
        signs = polarity if polarity is not None else [(i > middle) - (i < middle) for i in range(len(names))]
        return cls(tuple(names), tuple(signs))

    @classmethod
    def from_scale(cls, scale: Scale, names: Sequence[str] | None = None) -> "LabelSpace":
        """The bins of a scale, named by their centres unless `names` are given."""
        found = tuple(names) if names is not None else tuple(f"{round(centre, 6):g}" for centre in scale.centres)
        return cls(found, tuple(int(sign) for sign in scale.polarity(scale.centres)), scale)


def _plain(text: str) -> str:
    return text.strip(" \t\n\"'`*_.,;:{}[]").casefold()
