"""The questions put to the models: versioned templates, one function for every one of them.

`VERSION` is part of the key under which a paid answer is kept (`annotation/ledger.py`): change it with any wording.
"""

from dataclasses import dataclass
from typing import Literal

from distill.task.labels import LabelSpace
from distill.task.sample import Sample

VERSION = "2"

Template = Literal["predict", "explain", "reason", "classify", "review"]

CLASSIFY_PREFIX = '"Prediction":'
"""The forced beginning of an answer to *classify* or *review*; label scoring reads the next token after it."""

SCORED: tuple[Template, ...] = ("classify", "review")
"""The questions whose answer is a label alone."""


@dataclass(frozen=True)
class EarlierAnswers:
    """What student and teacher said before a review: label names, and their probabilities in [0, 1]."""

    student: str
    student_confidence: float
    teacher: str
    teacher_confidence: float


_DEFINITIONS = {
    "negative": "disapproval, sadness or mockery",
    "neutral": "facts, or signals that cancel out",
    "positive": "approval, joy or affection",
}

_FIELDS = (
    '"Text_analysis": "<what the words say and how they sound>"',
    '"Image_analysis": "<what the image shows and the mood it sets>"',
    '"Conflict_resolution": "<whether they agree, and which prevails>"',
    '"Final_conclusion": "<what follows from both>"',
    '"Prediction": <{names}>',
)

_HEAD = "Judge the sentiment of {target}{scale}: {names}.\n{post}\n"
"""What all questions about one post begin with, so that a model reads it (and the picture before it) once for all."""

_FULL = "{definitions}{hint}Answer with these five fields, one a line, and nothing else:\n{fields}"

_HINT = "The sentiment is {label}. Explain it from the post itself, as if found on your own.\n"

_TAILS: dict[str, str] = {
    "predict": _FULL,
    "explain": _FULL,
    "reason": "Reason in five fields.",
    "classify": "Answer: {prefix} <label>",
    "review": "{earlier}Answer: {prefix} <label>",
}

_EARLIER = "A first reader said {} ({:.0%} sure), a second one {} ({:.0%} sure). Either may be wrong.\n"


def render(template: Template, sample: Sample, labels: LabelSpace, earlier: EarlierAnswers | None = None) -> str:
    """The text of one question about one post; its images go before it in the message.

    *predict* and *explain* are the teacher's questions (MulCoT-RD, reasoning data), *reason* and *classify* the two
    tasks of assistant and student, *review* the teacher's second look (U-ACS, stage 3). Only *explain* contains the
    sample's label, and only *review* what was answered before: label names and numbers, never free text.

    Raises:
        ValueError: *explain* for a sample without a label, *review* without earlier answers or with a label that is
            not in the space.
    """
    if template == "explain":
        labels.index(sample.label)
    said = ""
    if template == "review":
        if earlier is None:
            raise ValueError("a review needs the earlier answers")
        for name in (earlier.student, earlier.teacher):
            labels.index(name)
        said = _EARLIER.format(earlier.student, earlier.student_confidence, earlier.teacher, earlier.teacher_confidence)
    named = [name for name in labels.names if name in _DEFINITIONS]
    names = ", ".join(labels.names[:-1]) + " or " + labels.names[-1]
    return (_HEAD + _TAILS[template]).format(
        target="the post" if sample.aspect is None else f'the post towards "{_line(sample.aspect)}"',
        names=names,
        scale=f" on a scale from {labels.names[0]} (negative) to {labels.names[-1]} (positive)" if labels.scale else "",
        definitions="".join(f"{name}: {_DEFINITIONS[name]}.\n" for name in named),
        earlier=said,
        post=f'Post: "{_line(sample.text)}"',
        hint=_HINT.format(label=labels.name(sample.label)) if template == "explain" else "",
        fields="\n".join(_FIELDS).format(names=names),
        prefix=CLASSIFY_PREFIX,
    )


def _line(text: str) -> str:
    """A post on one line, so that nothing in it can pass for a field of an answer that quotes it."""
    return " ".join(text.split())
