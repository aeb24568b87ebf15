"""The prompts: versioned templates, and one function that renders all of them.

`VERSION` is part of the ledger keys of cached answers (`annotation/ledger.py`): change it with any change of wording.
"""

from dataclasses import dataclass
from typing import Literal

from distill.task.labels import LabelSpace
from distill.task.sample import Sample
from distill.task.wording import Wording, fill

VERSION = "2"

Template = Literal["predict", "explain", "reason", "classify", "review"]

SCORED: tuple[Template, ...] = ("classify", "review")
"""The templates whose answer is only a label."""


@dataclass(frozen=True)
class EarlierAnswers:
    """Predictions of student and teacher before a review: label names, and their probabilities in [0, 1]."""

    student: str
    student_confidence: float
    teacher: str
    teacher_confidence: float


_FULL = (
    "{definitions}{hint}Answer{in_language} with these {number} fields, one a line, and nothing else{kept}:\n{fields}"
)
_KEPT = "; keep the names of the fields and the label as they are"
"""Added where rationales are written in a given language."""

_HINT = "The {what} is {label}. Explain it from the post itself, as if found on your own.\n"

_TAILS: dict[Template, str] = {
    "predict": _FULL,
    "explain": _FULL,
    "reason": "Reason in {number} fields{comma}{in_language}.",
    "classify": "Answer: {prefix} <label>",
    "review": "A first reader said {student} ({student_confidence} sure), a second one {teacher} "
    "({teacher_confidence} sure). Either may be wrong.\nAnswer: {prefix} <label>",
}

_EXAMPLES = "Examples of other posts and their answers:\n\n{examples}\n\nThe post to answer:\n"

_NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def render(template: Template, sample: Sample, labels: LabelSpace, earlier: EarlierAnswers | None = None) -> str:
    """Render the prompt text for one post; the post's images come before it in the message.

    *predict* and *explain* request a rationale from the teacher (MulCoT-RD, reasoning data). *reason* and *classify*
    are the two tasks of assistant and student. *review* requests the teacher's second prediction (U-ACS, stage 3).
    Only *explain* contains the sample's label. Only *review* contains earlier answers, as label names and
    probabilities, never as free text. Only *predict* and *explain* contain the examples of the label space, without the
    one that is the sample.

    Without examples and templates of one's own, all prompts about one post begin with the question and the post, so
    that a model encodes them, and the images before them, only once.

    Args:
        labels: the label space, with the wording of the task.
        earlier: the predictions that *review* shows; ignored by the other templates.

    Raises:
        ValueError: *explain* for a sample without a label, or *review* without earlier answers or with a label that is
            not in the label space.
    """
    wording, definitions = labels.wording, dict(labels.wording.definitions)
    names = ", ".join(labels.names[:-1]) + " or " + labels.names[-1]
    parts = {
        "text": _one_line(sample.text),
        "aspect": _one_line(sample.aspect or ""),
        "target": "the post" if sample.aspect is None else f'the post towards "{_one_line(sample.aspect)}"',
        "labels": names,
        "scale": f" on a scale from {labels.names[0]} (negative) to {labels.names[-1]} (positive)"
        if labels.scale
        else "",
        "definitions": "".join(f"{name}: {definitions[name]}.\n" for name in labels.names if name in definitions),
        "fields": _fields(wording, names),
        "prefix": wording.prefix,
        "language": wording.language,
        "examples": _examples(sample, labels) if template in ("predict", "explain") else "",
    }
    if template == "explain":
        parts["label"] = labels.name(sample.label)
    if template == "review":
        if earlier is None:
            raise ValueError("a review needs the earlier answers")
        for name in (earlier.student, earlier.teacher):
            labels.index(name)
        parts |= {"student": earlier.student, "student_confidence": f"{earlier.student_confidence:.0%}"}
        parts |= {"teacher": earlier.teacher, "teacher_confidence": f"{earlier.teacher_confidence:.0%}"}
    if (own := wording.template(template)) is not None:
        return fill(own, parts)
    what = "sentiment" if wording.asks_for_sentiment else "answer"
    count = len(wording.fields)
    parts |= {
        "question": wording.ask(**{name: parts[name] for name in ("target", "labels", "scale")}),
        "examples": fill(_EXAMPLES, parts) if parts["examples"] else "",
        "hint": fill(_HINT, parts | {"what": what}) if template == "explain" else "",
        "number": _NUMBERS[count - 2] if count <= len(_NUMBERS) + 1 else str(count),
        "in_language": f" in {wording.language}" if wording.language else "",
        "comma": "," if wording.language else "",
        "kept": _KEPT if wording.language else "",
    }
    return fill('{question}\n{examples}Post: "{text}"\n' + _TAILS[template], parts)


def _fields(wording: Wording, labels: str) -> str:
    """One line for each field of a rationale, with what belongs in it."""
    *reasoning, (prediction, meaning) = wording.fields
    lines = [f'"{name}": "<{text}>"' for name, text in reasoning]
    return "\n".join([*lines, f'"{prediction}": <{meaning and meaning + ": "}{labels}>'])


def _examples(sample: Sample, labels: LabelSpace) -> str:
    """The examples with their answers: the whole rationale of those that have one, otherwise the label."""
    shown = []
    for example in labels.examples:
        if example.id != sample.id:
            towards = "" if example.aspect is None else f' towards "{_one_line(example.aspect)}"'
            answer = example.rationale or f"{labels.wording.prefix} {labels.name(example.label)}"
            shown.append(f'Post{towards}: "{_one_line(example.text)}"\n{answer}')
    return "\n\n".join(shown)


def _one_line(text: str) -> str:
    """The text on one line, so that no line of a post can be parsed as a field of an answer that quotes the post."""
    return " ".join(text.split())
