"""The prompts: versioned templates, and one function that renders all of them.

`VERSION` is part of the ledger keys of cached answers (`annotation/ledger.py`): change it with any change of wording.
"""

from dataclasses import dataclass
from typing import Literal

from distill.task.labels import LabelSpace
from distill.task.sample import Sample

VERSION = "2"

Template = Literal["predict", "explain", "reason", "classify", "review"]

CLASSIFY_PREFIX = '"Prediction":'
"""Forced prefix of an answer to *classify* or *review*; label probabilities are read from the tokens that follow."""

SCORED: tuple[Template, ...] = ("classify", "review")
"""The templates whose answer is only a label."""


@dataclass(frozen=True)
class EarlierAnswers:
    """Predictions of student and teacher before a review: label names, and their probabilities in [0, 1]."""

    student: str
    student_confidence: float
    teacher: str
    teacher_confidence: float


_FIELDS = (
    '"Text_analysis": "<what the words say and how they sound>"',
    '"Image_analysis": "<what the image shows and the mood it sets>"',
    '"Conflict_resolution": "<whether they agree, and which prevails>"',
    '"Final_conclusion": "<what follows from both>"',
    '"Prediction": <{labels}>',
)

_FULL = "{definitions}{hint}Answer{language} with these five fields, one a line, and nothing else{kept}:\n{fields}"

_KEPT = "; keep the names of the fields and the label as they are"
"""Added where rationales are written in a given language."""

_HINT = "The {what} is {label}. Explain it from the post itself, as if found on your own.\n"

_TAILS: dict[str, str] = {
    "predict": _FULL,
    "explain": _FULL,
    "reason": "Reason in five fields{comma}{language}.",
    "classify": "Answer: {prefix} <label>",
    "review": "{earlier}Answer: {prefix} <label>",
}

_EARLIER = "A first reader said {} ({:.0%} sure), a second one {} ({:.0%} sure). Either may be wrong.\n"


def render(template: Template, sample: Sample, labels: LabelSpace, earlier: EarlierAnswers | None = None) -> str:
    """Render the prompt text for one post; the post's images come before it in the message.

    *predict* and *explain* request a rationale from the teacher (MulCoT-RD, reasoning data). *reason* and *classify*
    are the two tasks of assistant and student. *review* requests the teacher's second prediction (U-ACS, stage 3).
    Only *explain* contains the sample's label. Only *review* contains earlier answers, as label names and
    probabilities, never as free text.

    All prompts about one post begin with the question and the post, so that a model encodes them, and the images before
    them, only once.

    Args:
        labels: the label space, with the wording of the task.
        earlier: the predictions that *review* shows; ignored by the other templates.

    Raises:
        ValueError: *explain* for a sample without a label, or *review* without earlier answers or with a label that is
            not in the label space.
    """
    wording, hint, earlier_text = labels.wording, "", ""
    if template == "explain":
        what = "sentiment" if wording.asks_for_sentiment else "answer"
        hint = _HINT.format(what=what, label=labels.name(sample.label))
    if template == "review":
        if earlier is None:
            raise ValueError("a review needs the earlier answers")
        for name in (earlier.student, earlier.teacher):
            labels.index(name)
        confidences = earlier.student_confidence, earlier.teacher_confidence
        earlier_text = _EARLIER.format(earlier.student, confidences[0], earlier.teacher, confidences[1])
    names, definitions = ", ".join(labels.names[:-1]) + " or " + labels.names[-1], dict(wording.definitions)
    question = wording.ask(
        target="the post" if sample.aspect is None else f'the post towards "{_one_line(sample.aspect)}"',
        labels=names,
        scale=f" on a scale from {labels.names[0]} (negative) to {labels.names[-1]} (positive)" if labels.scale else "",
    )
    tail = _TAILS[template].format(
        definitions="".join(f"{name}: {definitions[name]}.\n" for name in labels.names if name in definitions),
        earlier=earlier_text,
        hint=hint,
        fields="\n".join(_FIELDS).format(labels=names),
        language=f" in {wording.language}" if wording.language else "",
        comma="," if wording.language else "",
        kept=_KEPT if wording.language else "",
        prefix=CLASSIFY_PREFIX,
    )
    return f'{question}\nPost: "{_one_line(sample.text)}"\n{tail}'


def _one_line(text: str) -> str:
    """The text on one line, so that no line of a post can be parsed as a field of an answer that quotes the post."""
    return " ".join(text.split())
