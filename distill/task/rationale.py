"""The five-field reasoning chain of MulCoT-RD (arXiv 2508.05234): parse, render, check.

Teachers write the chain in several looks: quoted lines, Markdown headings, JSON, fenced or not. A field begins where
its name opens a line, never in the middle of one, so an answer may quote a post that contains such names.
"""

import json
import re
from dataclasses import astuple, dataclass
from typing import Any, Literal

from distill.task.labels import LabelSpace

FIELDS = ("Text_analysis", "Image_analysis", "Conflict_resolution", "Final_conclusion", "Prediction")

Reason = Literal["malformed", "contradicts", "unfinished", "leaks"]

_HEADER = re.compile(
    r"^[ \t>#*\-{\"'`]*\b(" + "|".join(name.replace("_", "[_ ]") for name in FIELDS) + r")\b[\"'`* \t]*(?::|$)",
    re.IGNORECASE | re.MULTILINE,
)
_FENCE = re.compile(r"^[ \t]*```\w*[ \t]*$", re.MULTILINE)
_LEAKS = ("is labeled as", "is labelled as", "the given label", "the provided label", "the gold label", "is known to be")


class InvalidRationale(ValueError):
    """A teacher's answer that must not be learned from; `reason` says which rule it breaks."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason


@dataclass(frozen=True)
class Rationale:
    """The five fields, each on one line; `prediction` is a name of the label space."""

    text_analysis: str
    image_analysis: str
    conflict_resolution: str
    final_conclusion: str
    prediction: str


def parse(answer: str, labels: LabelSpace) -> Rationale:
    """Read the five fields from an answer in any of the looks above.

    Raises:
        InvalidRationale: a field is missing or empty, the prediction is not a label, or two predictions disagree.
    """
    fields = _from_json(answer) or _from_lines(answer)
    for name in FIELDS:
        if not fields.get(name):
            raise InvalidRationale("malformed", f"{name} is missing")
    predictions = {labels.find(value) for value in fields["Prediction"]}
    prediction = predictions.pop()
    if predictions or prediction is None:
        raise InvalidRationale("malformed", f"Prediction is {' and '.join(fields['Prediction'])[:80]!r}, not one label")
    texts = [" ".join(fields[name][0].split()) for name in FIELDS[:4]]
    return Rationale(texts[0], texts[1], texts[2], texts[3], prediction)


def render(rationale: Rationale) -> str:
    """The canonical look, one quoted field a line and the prediction unquoted; `parse` reads it back unchanged."""
    *texts, prediction = astuple(rationale)
    lines = [f'"{name}": "{" ".join(text.split())}"' for name, text in zip(FIELDS, texts, strict=False)]
    return "\n".join([*lines, f'"Prediction": {prediction}'])


def check(answer: str, labels: LabelSpace, expected: object = None, *, finished: bool = True) -> Rationale:
    """Parse an answer and hold it against the rules of DESIGN section 4.

    Args:
        expected: the label that the prediction must be; None where nobody knows it.
        finished: whether generation ended by itself rather than by the token limit.

    Raises:
        InvalidRationale: the answer is unfinished or malformed, predicts another label, or leaks the prompt.
    """
    if not finished:
        raise InvalidRationale("unfinished", "the token limit cut the answer")
    rationale = parse(answer, labels)
    if expected is not None and rationale.prediction != expected:
        raise InvalidRationale("contradicts", f"predicts {rationale.prediction}, the label is {expected}")
    leak = next((phrase for phrase in _LEAKS if phrase in answer.lower()), None)
    if leak is not None:
        raise InvalidRationale("leaks", f"says {leak!r}")
    return rationale


def _from_json(answer: str) -> dict[str, list[str]] | None:
    """The fields of an answer that is one JSON object, fenced or not; each name with all the values it was given."""
    body = _FENCE.sub("", answer).strip()
    fields: dict[str, list[str]] = {}

    def collect(pairs: list[tuple[str, Any]]) -> None:
        for name, value in pairs:
            fields.setdefault(name.strip().replace(" ", "_").capitalize(), []).append(str(value))

    try:
        json.loads(body, object_pairs_hook=collect, strict=False)
    except ValueError:
        return None
    return fields or None


def _from_lines(answer: str) -> dict[str, list[str]]:
    """The fields of an answer whose names open lines, in the order of the chain; text between belongs to the field."""
    body = _FENCE.sub("", answer)
    headers = list(_HEADER.finditer(body))
    fields: dict[str, list[str]] = {}
    begin = -1
    chosen: list[tuple[str, re.Match[str]]] = []
    for name in FIELDS[:4]:
        header = next((h for h in headers if h.start() > begin and _name(h) == name), None)
        if header is None:
            return fields
        begin = header.start()
        chosen.append((name, header))
    chosen += [("Prediction", h) for h in headers if h.start() > begin and _name(h) == "Prediction"]
    ends = [header.start() for _, header in chosen[1:]] + [len(body)]
    for (name, header), end in zip(chosen, ends, strict=True):
        value = body[header.end() : end].strip()
        if name == "Prediction":  # what follows the line of the label is not part of it
            value = next((line for line in value.splitlines() if line.strip(" \t*_\"'`")), "")
        elif end < len(body):
            value = value.rstrip("# \t\n-,{*")
        value = value.strip().strip(",").removeprefix("**").strip()
        if len(value) > 1 and value[0] == value[-1] == '"':
            value = value[1:-1]
        if value:
            fields.setdefault(name, []).append(value)
    return fields


def _name(header: re.Match[str]) -> str:
    return header.group(1).replace(" ", "_").capitalize()
