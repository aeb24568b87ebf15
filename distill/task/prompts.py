"""The questions put to the models: versioned templates, one function for every one of them.

`VERSION` is part of the key under which a paid answer is kept (`annotation/ledger.py`): change it with any wording.
"""

from typing import Literal

from distill.task.labels import LabelSpace
from distill.task.rationale import FIELDS
from distill.task.sample import Sample

VERSION = "1"

Template = Literal["predict", "explain", "reason", "classify"]

CLASSIFY_PREFIX = '"Prediction":'
"""The forced beginning of an answer to *classify*; label scoring reads the next token after it."""

_DEFINITIONS = {
    "negative": "disapproval, sadness, anger or mockery",
    "neutral": "facts or mixed signals without a clear feeling",
    "positive": "approval, joy, admiration or affection",
}

_STEPS = (
    "what the words say and how they sound",
    "what the image shows and the mood it sets",
    "whether the two agree, and which of them prevails if not",
    "the sentiment that follows from both",
)

_FORMAT = "\n".join(
    [f'"{name}": "<{step}>"' for name, step in zip(FIELDS[:4], _STEPS, strict=True)] + ['"Prediction": <{names}>']
)

_FULL = """Judge the sentiment of {target}.
{definitions}
{post}
{hint}Answer with five fields, one per line, and nothing else:
{format}"""

_HINT = "The sentiment is known to be {label}. Explain it from the post itself, as if you had found it on your own.\n"

_SHORT = {"reason": "Reason step by step about the sentiment of {target}.", "classify": "Classify the sentiment of {target}."}


def render(template: Template, sample: Sample, labels: LabelSpace) -> str:
    """The text of one question about one post; its images go before it in the message.

    *predict* and *explain* are the teacher's questions (MulCoT-RD, reasoning data), *reason* and *classify* the two
    tasks of assistant and student. Only *explain* contains the sample's label.

    Raises:
        ValueError: *explain* for a sample without a label.
    """
    target = "the post" if sample.aspect is None else f'the post towards "{_line(sample.aspect)}"'
    post = f'Post: "{_line(sample.text)}"'
    if template in _SHORT:
        return f"{_SHORT[template].format(target=target)}\n{post}"
    if template == "explain":
        labels.index(sample.label)
    names = ", ".join(labels.names[:-1]) + " or " + labels.names[-1]
    return _FULL.format(
        target=target,
        definitions="\n".join(f"{name}: {_DEFINITIONS[name]}" for name in labels.names if name in _DEFINITIONS),
        post=post,
        hint=_HINT.format(label=sample.label) if template == "explain" else "",
        format=_FORMAT.format(names=names),
    )


def _line(text: str) -> str:
    """A post on one line, so that nothing in it can pass for a field of an answer that quotes it."""
    return " ".join(text.split())
