"""Label spaces: ordered label names with their polarity, and the bins of a continuous scale."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml

from distill.errors import SettingsError
from distill.settings import Natural, NonNegative, Range, Settings, check_limits
from distill.task import reply
from distill.task.sample import Sample
from distill.task.wording import DEFINITIONS, FIELDS, QUESTION, Wording


@dataclass(frozen=True)
class Scale:
    """A continuous scale that is divided into K bins, so that a classifier can predict it (U-ACS).

    The bin centres are evenly spaced from `low` to `high`, including both ends. A value belongs to the bin with the
    nearest centre. Seven bins on [-3, 3] are the classes of Acc-7.

    Raises:
        SettingsError: a number is out of its range, or `low` is not below `high`.
    """

    low: Annotated[float, Range(-1e6, 1e6)] = -3.0
    """Lowest label."""
    high: Annotated[float, Range(-1e6, 1e6)] = 3.0
    """Highest label."""
    bins: Annotated[int, Range(2, 100)] = 7
    """Number of bins, K."""
    dead_zone: NonNegative = 0.0
    """Values with an absolute value of at most this have polarity 0."""
    spread: Annotated[float, Range(0, 1000)] = 0.75
    """Standard deviation, in bin widths, of the Gaussian over the bins that is the training target; 0: one-hot target
    of the nearest bin."""

    def __post_init__(self) -> None:
        check_limits(self)
        if not self.low < self.high:
            raise SettingsError(f"low is {self.low:g}; it takes a number below high, {self.high:g}")

    @property
    def centres(self) -> np.ndarray:
        """Bin centres [K], ascending."""
        return np.linspace(self.low, self.high, self.bins)

    def bin(self, value: float) -> int:
        """Index of the bin with the nearest centre; the lower one on a tie. Raises ValueError outside the scale."""
        if not self.low <= value <= self.high:
            shown = repr(float(value)).removesuffix(".0")  # all digits, so that a value next to an end differs from it
            raise ValueError(f"label {shown} is outside the scale from {self.low:g} to {self.high:g}")
        return int(np.abs(self.centres - value).argmin())

    def targets(self, values: Sequence[float]) -> np.ndarray:
        """Training targets [B, K] for B values: a Gaussian over the bins, or one-hot (U-ACS). Rows sum to 1."""
        if self.spread == 0:
            return np.eye(self.bins)[[self.bin(value) for value in values]]
        width = (self.high - self.low) / (self.bins - 1)
        steps = (self.centres[None] - np.asarray(values, dtype=np.float64)[:, None]) / (self.spread * width)
        weights = np.exp(-0.5 * (steps**2 - (steps**2).min(1, keepdims=True)))
        return weights / weights.sum(1, keepdims=True)

    def expectation(self, probabilities: np.ndarray) -> np.ndarray:
        """Expected values [B] under bin probabilities [B, K]: Σ p_k c_k (U-ACS)."""
        return np.asarray(probabilities) @ self.centres

    def polarity(self, values: np.ndarray) -> np.ndarray:
        """Polarity (-1, 0 or 1) of each value: its sign, or 0 inside the dead zone."""
        values = np.asarray(values)
        return (np.sign(values) * (np.abs(values) > self.dead_zone)).astype(int)


@dataclass(frozen=True)
class LabelSpace:
    """K label names with their polarities (-1, 0 or 1), the scale if the labels are numbers, and the task's wording.

    Attributes:
        examples: labelled posts that the prompts of the teacher show.

    Raises:
        ValueError: there are fewer than two names, a name is empty, two names differ only in case or punctuation, or
            the number of polarities or bins is not K.
    """

    names: tuple[str, ...] = ("negative", "neutral", "positive")
    polarity: tuple[int, ...] = (-1, 0, 1)
    scale: Scale | None = None
    wording: Wording = field(default_factory=Wording)
    examples: tuple[Sample, ...] = ()

    def __post_init__(self) -> None:
        if len(self.names) < 2:
            raise ValueError("task.labels needs at least two names")
        normalized = {reply.bare(name) for name in self.names}
        if "" in normalized or any("\n" in name for name in self.names):
            raise ValueError("task.labels: every name needs a letter or digit, and no line break")
        if len(normalized) < len(self.names):
            raise ValueError(f"task.labels has a label twice: {', '.join(self.names)}")
        if self.scale is not None and self.scale.bins != len(self.names):
            raise ValueError(f"task.labels needs one name for each of the {self.scale.bins} bins of task.scale")
        if len(self.polarity) != len(self.names) or not set(self.polarity) <= {-1, 0, 1}:
            raise ValueError("task.polarity needs one of -1, 0 and 1 for each label")

    def __len__(self) -> int:
        return len(self.names)

    def index(self, label: object) -> int:
        """Index of a label name, or of the bin of a value (a float) on the scale.

        Raises:
            ValueError: the name is not in the space, or the value is outside the scale.
        """
        if self.scale is not None and isinstance(label, float):
            return self.scale.bin(label)
        if label not in self.names:
            raise ValueError(f"unknown label {label!r}; the labels are {', '.join(self.names)}")
        return self.names.index(label)

    def from_data(self, label: object) -> object:
        """A label as found in data: a whole number becomes text (2 and 2.0 are the label '2') unless there is a scale.

        Raises:
            ValueError: the label is true or false.
        """
        if isinstance(label, bool):
            raise ValueError(f"label must be text, not {str(label).lower()}")
        if self.scale is None and isinstance(label, int | float) and label % 1 == 0:
            return str(int(label))
        return label

    def name(self, label: object) -> str:
        """Name of a label, or of the bin of a value. Raises ValueError as `index` does."""
        return self.names[self.index(label)]

    def decide(self, probabilities: np.ndarray) -> tuple[str, float | None]:
        """The label of probabilities [K]; on a scale the bin of the expected value, and the value."""
        if self.scale is None:
            return self.names[int(np.argmax(probabilities))], None
        value = float(self.scale.expectation(probabilities))
        value = float(min(max(value, self.scale.low), self.scale.high))  # rounding may exceed the scale
        return self.name(value), value

    def find(self, answer: str | None) -> str | None:
        """The one label that an answer names, as its first line or after `"Prediction":`; None if there is none.

        `Prediction` stands for the last field of the task's rationales.

        Thoughts, tags, code fences, case, surrounding punctuation and a confidence in parentheses are ignored. Anything
        else beside the label, such as "not" or a second label, makes it no label.
        """
        text = reply.final_text(answer)
        return self._named(reply.label_value(text[self.start_of(text) :]))

    def start_of(self, answer: str) -> int:
        """Offset in an answer without thought where the label begins (`reply.label_start`)."""
        return reply.label_start(answer, self.is_label, self.wording.names[-1])

    def is_label(self, text: str) -> bool:
        """Whether a text is a label up to case and surrounding punctuation."""
        return self._named(text) is not None

    def _named(self, text: str) -> str | None:
        return next((name for name in self.names if reply.bare(name) == reply.bare(text)), None)

    def polarities(self, probabilities: np.ndarray) -> np.ndarray:
        """Polarity [B] of the predictions of probabilities [B, K]: of the most likely label or the expected value."""
        if self.scale is not None:
            return self.scale.polarity(self.scale.expectation(probabilities))
        return np.array(self.polarity)[np.asarray(probabilities).argmax(-1)]

    @classmethod
    def from_names(cls, names: Sequence[str], polarity: Sequence[int] | None = None) -> "LabelSpace":
        """A label space of `names`. By default the first half is negative, the second half positive."""
        middle = (len(names) - 1) / 2
        signs = polarity if polarity is not None else [(i > middle) - (i < middle) for i in range(len(names))]
        return cls(tuple(names), tuple(signs))

    @classmethod
    def from_scale(cls, scale: Scale, names: Sequence[str] | None = None) -> "LabelSpace":
        """A label space of the bins of a scale, named after their centres unless `names` are given."""
        names = names if names is not None else [f"{round(centre, 6):g}" for centre in scale.centres]
        return cls(tuple(names), tuple(int(sign) for sign in scale.polarity(scale.centres)), scale)


@dataclass
class TaskSettings(Settings):
    """The prediction task: label names or a continuous scale."""

    labels: list[str] | None = None
    """Label names, from the most negative to the most positive; null: negative, neutral and positive, or the bin
    centres of task.scale."""
    polarity: list[int] | None = None
    """Polarity of each label (-1, 0 or 1); null: -1 for the first half of the labels, 1 for the second half and 0 for a
    label in the middle. Ignored with task.scale."""
    scale: Scale | None = None
    """Scale of continuous labels and its division into bins; null: labels are names."""
    question: str = QUESTION
    """The question about a post. {target} stands for the post, or the post towards its aspect, {labels} for the label
    names; {scale}, which may be left out, for the ends of a scale."""
    definitions: dict[str, str] | None = None
    """What labels mean, by label name, for the teacher; null: those of negative, neutral and positive."""
    language: str = ""
    """Language in which rationales are written, such as Chinese; empty: the prompts name none."""
    fields: dict[str, str | None] | None = None
    """The fields of a rationale and what belongs in each, in order; the last is the prediction, whose text may be
    left out. null: analysis of text and image, resolution of conflicts, conclusion and prediction."""
    examples: Natural = 0
    """Number of labelled training posts that the prompts of the annotating teacher show with their answers, the labels
    in turn; posts with a rationale come first. Their images are not shown."""
    templates: str | dict[str, str] | None = None
    """Whole prompts by template (predict, explain, reason, classify, review), with places such as {text} and {labels};
    or the path of a YAML file with them. null: those that the other fields make."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.templates, str):
            self.templates = _read_templates(self.templates)

    @property
    def label_space(self) -> LabelSpace:
        """The label space. Raises ValueError for labels or a wording that do not form one."""
        if self.scale is not None:
            space = LabelSpace.from_scale(self.scale, self.labels)
        else:
            space = LabelSpace.from_names(LabelSpace().names if self.labels is None else self.labels, self.polarity)
        for name in self.definitions or ():
            if name not in space.names:
                raise ValueError(f"task.definitions has {name!r}; the labels are {', '.join(space.names)}")
        wording: Any = {
            "definitions": DEFINITIONS if self.definitions is None else self.definitions,
            "fields": FIELDS if self.fields is None else self.fields,
            "templates": self.templates or {},
        }
        pairs = {part: tuple((name, text or "") for name, text in texts.items()) for part, texts in wording.items()}
        return replace(space, wording=Wording(question=self.question, language=self.language, **pairs))


def _read_templates(path: str) -> dict[str, str]:
    """The templates in a YAML file. Raises SettingsError for a file that is not a mapping of texts."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"templates: cannot read {path}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise SettingsError(f"templates: {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not all(isinstance(text, str) for pair in content.items() for text in pair):
        raise SettingsError(f"templates: {path} takes a text for each template, such as classify: ...")
    return content
