"""The five-field rationale of MulCoT-RD (arXiv 2508.05234): parsing, rendering and validation.

Teachers write the fields in several formats: quoted lines, Markdown headings or tables, XML or JSON, fenced or not. A
field starts only where its name is at the start of a line and has the same markup as the first field. An answer may
therefore quote a post that contains field names. If it is ambiguous which prediction belongs to the answer, the answer
is malformed.
"""

import json
import re
from dataclasses import astuple, dataclass
from typing import Any, Literal

from distill.task.labels import LabelSpace
from distill.task.reply import LEAD, QUOTES, final_text

FIELDS = ("Text_analysis", "Image_analysis", "Conflict_resolution", "Final_conclusion", "Prediction")

Reason = Literal["malformed", "contradicts", "unfinished", "leaks"]

_NAME = {name: name.replace("_", r"(?:\\?_|[ -])?") for name in FIELDS}  # also "Text analysis" and "Text\\_analysis"
_END = rf"(?:>|[{QUOTES}*_\])）】 \t\u00a0\u3000]*[:：|])"  # `>` of an XML tag, `|` of a table's cell
_HEADER = re.compile(
    rf"^((?:{LEAD}|[{{<])*)({'|'.join(_NAME.values())})(?:{_END}|\b[{QUOTES}*_ \t]*$)", re.IGNORECASE | re.MULTILINE
)
_BLOCK = re.compile(r"[>|][+-]?[ \t]*\n")  # YAML's marks of a text on the next lines
_CLOSING = re.compile(r"\s*(?:</\w+>|(?<=\s)\|)\s*$")
_PLAIN_QUOTES = str.maketrans("“”„‟＂‘’‚＇", '"""""\'\'\'\'')
_QUOTATION = re.compile(r"[\"“‘'「]([^\"“”‘’「」\n]+)[\"”’'」]")
_LEAKS = (
    "is labeled as", "is labelled as", "the given label", "the provided label", "the gold label", "is known to be",
)  # fmt: skip


class InvalidRationale(ValueError):
    """A teacher's answer that is not used for training: the rule that it violates, and what is wrong."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Rationale:
    """The five fields, each on one line; `prediction` is a label name."""

    text_analysis: str
    image_analysis: str
    conflict_resolution: str
    final_conclusion: str
    prediction: str


def parse(answer: str, labels: LabelSpace) -> Rationale:
    """Parse the five fields of an answer in any of the formats above.

    Raises:
        InvalidRationale: a field is missing, empty, unterminated, duplicated or out of order, the prediction is not a
            label, or two predictions differ.
    """
    answer = final_text(answer)
    for name in FIELDS[:4]:
        if len(re.findall(rf"(?<!/){_NAME[name]}\\*{_END}", answer, re.IGNORECASE)) > 1:
            raise InvalidRationale("malformed", f"{name} is given twice")  # one is a quotation; ambiguous
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
    """The canonical format: one quoted field per line, the prediction unquoted. `parse` returns the same rationale."""
    *texts, prediction = astuple(rationale)
    lines = [f'"{name}": "{" ".join(text.split())}"' for name, text in zip(FIELDS, texts, strict=False)]
    return "\n".join([*lines, f'"Prediction": {prediction}'])


def check(
    answer: str, labels: LabelSpace, expected: object = None, *, finished: bool = True, post: str = ""
) -> Rationale:
    """Parse and validate an answer.

    Args:
        expected: the label that the answer must predict; None if the sample is unlabelled.
        finished: False if the token limit truncated the answer.
        post: text of the post; words that the answer quotes from it do not leak the label.

    Raises:
        InvalidRationale: the answer is unfinished or malformed, predicts another label, or mentions that the label was
            given in the prompt.
    """
    if not finished:
        raise InvalidRationale("unfinished", "the token limit cut the answer")
    rationale = parse(answer, labels)
    if expected is not None and rationale.prediction != expected:
        raise InvalidRationale("contradicts", f"predicts {rationale.prediction}, the label is {expected}")
    leak = next((phrase for phrase in _LEAKS if _leaks(phrase, final_text(answer), post)), None)
    if leak is not None:
        raise InvalidRationale("leaks", f"says {leak!r}")
    return rationale


def _leaks(phrase: str, answer: str, post: str) -> bool:
    """Whether the answer has the phrase other than quoted from the post, which has the word before or after it, too."""

    def words(text: str) -> str:
        return " " + " ".join(re.findall(r"\w+", text.lower())) + " "

    post = words(post)
    text = _QUOTATION.sub(lambda quotation: " " if words(quotation[1]) in post else quotation[0], answer)
    for found in re.finditer(rf"(?: (\w+))? {phrase}(?= (\w*))", words(text)):
        before, after = words(f"{found[1] or ''} {phrase}"), words(f"{phrase} {found[2]}")
        if before not in post and after not in post:
            return True
    return False


def _from_json(answer: str) -> dict[str, list[str]] | None:
    """All values of each field of an answer that contains one JSON object; None if it contains none."""
    fields: dict[str, list[str]] = {}

    def collect(pairs: list[tuple[str, Any]]) -> str:
        named = [(_canonical(name), str(value)) for name, value in pairs]
        if FIELDS[0] in dict(named):  # may be nested in another object
            for name, value in named:
                fields.setdefault(name, []).extend([value] if value.strip() else [])
        return "an object"

    try:
        json.JSONDecoder(object_pairs_hook=collect, strict=False).raw_decode(answer[max(answer.find("{"), 0) :])
    except (ValueError, RecursionError):
        return None
    return fields or None


def _from_lines(body: str) -> dict[str, list[str]]:
    """All values of each field of an answer whose field names start lines, in order; a field ends at the next name."""
    headers = list(_HEADER.finditer(body))
    first = next((header for header in headers if _field_name(header) == FIELDS[0]), None)
    if first is None:
        return {}
    headers = [header for header in headers[headers.index(first) :] if _markup(header) == _markup(first)]
    names = [_field_name(header) for header in headers]
    conclusion = names.index(FIELDS[3]) if FIELDS[3] in names else len(names)
    headers = [header for at, header in enumerate(headers) if names[at] != "Prediction" or at > conclusion]
    order = [FIELDS.index(_field_name(header)) for header in headers]
    if order != sorted(order) or any(order.count(field) > 1 for field in range(4)):
        raise InvalidRationale("malformed", "a field is given twice or out of order")
    ends = [header.start() for header in headers[1:]] + [len(body)]
    fields: dict[str, list[str]] = {}
    for header, end in zip(headers, ends, strict=True):
        name, value = _field_name(header), body[header.end() : end].strip()
        if block := _BLOCK.match(value):
            value = value[block.end() :]
        value = _CLOSING.sub("", value)
        if name == "Prediction":  # only the line of the label; the rest is commentary
            value = next((line for line in value.splitlines() if line.strip(" \t*_\"'`")), "")
        elif end < len(body):
            value = value.rstrip("# \t\n-,{*")
        value = value.strip().strip(",").removeprefix("**").strip()
        if len(value) > 1 and value[0] + value[-1] == "“”":
            value = value[1:-1]
        if len(value) > 1 and value[0] == value[-1] == '"':
            value = value[1:-1]
        elif value.startswith('"') and '"' in _markup(first):  # a quoted post broke the line
            raise InvalidRationale("malformed", f"{name} is not closed")
        if value.strip():
            fields.setdefault(name, []).append(value)
    return fields


def _field_name(header: re.Match[str]) -> str:
    return _canonical(header.group(2))


def _canonical(name: str) -> str:
    """The field that a name is a spelling of, also with a number before it; the name itself if there is none."""
    letters = "".join(re.findall(r"[a-z]", name.lower()))
    return next((field for field in FIELDS if field.replace("_", "").lower() == letters), name)


def _markup(header: re.Match[str]) -> set[str]:
    """The markup of a field's name: quotes, heading or bold characters."""
    return set(header.group(1).translate(_PLAIN_QUOTES)) & set("\"'`#*|<[【_")
