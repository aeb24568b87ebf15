"""The rationale, by default of the five fields of MulCoT-RD (arXiv 2508.05234): parsing, rendering and validation.

Teachers write the fields in several formats: quoted lines, Markdown headings or tables, XML or JSON, fenced or not. A
field starts only where its name is at the start of a line and has the same markup as the first field. An answer may
therefore quote a post that contains field names. If it is ambiguous which prediction belongs to the answer, the answer
is malformed.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

from distill.task.labels import LabelSpace
from distill.task.reply import LEAD, QUOTES, final_text, letters_of, spellings
from distill.task.wording import FIELDS

Reason = Literal["malformed", "contradicts", "unfinished", "leaks"]

_END = rf"(?:>|[{QUOTES}*_\])）】 \t\u00a0\u3000]*[:：|])"  # `>` of an XML tag, `|` of a table's cell
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
    """The fields of an answer.

    Attributes:
        texts: of the fields before the prediction, each on one line.
        prediction: a label name.
        names: of all fields, the prediction's last.
    """

    texts: tuple[str, ...]
    prediction: str
    names: tuple[str, ...] = tuple(FIELDS)

    def as_dict(self) -> dict[str, str]:
        """The texts and the prediction by field."""
        return dict(zip(self.names, (*self.texts, self.prediction), strict=True))


class _Format(NamedTuple):
    """What a parser looks for: the names of the fields, and patterns.

    Attributes:
        header: the name of any field at the start of a line, with the markup before it.
        given: each field's name, with what ends it.
    """

    names: tuple[str, ...]
    header: re.Pattern[str]
    given: tuple[re.Pattern[str], ...]

    def canonical(self, name: str) -> str:
        """The field that a name is a spelling of, also with a number before it; the name itself if there is none."""
        letters = letters_of(name)
        return next((field for field in self.names if letters_of(field) == letters), name)

    def field(self, header: re.Match[str]) -> str:
        """The field of a header."""
        return self.canonical(header.group(2))


@cache
def _format(names: tuple[str, ...]) -> _Format:
    longest_first = sorted(map(spellings, names), key=len, reverse=True)
    header = rf"^((?:{LEAD}|[{{<])*)({'|'.join(longest_first)})(?:{_END}|\b[{QUOTES}*_ \t]*$)"
    # a name of one word is also a word of a text: it counts where a line or a quotation begins
    before = {name: "(?<!/)" if re.search("[_ -]", name) else rf"(?:^|[{QUOTES}{{<*#|,])[ \t]*" for name in names}
    given = [rf"{before[name]}{spellings(name)}\\*{_END}" for name in names]
    flags = re.IGNORECASE | re.MULTILINE
    return _Format(names, re.compile(header, flags), tuple(re.compile(pattern, flags) for pattern in given))


def parse(answer: str, labels: LabelSpace) -> Rationale:
    """Parse the task's fields of an answer in any of the formats above.

    Raises:
        InvalidRationale: a field is missing, empty, unterminated, duplicated or out of order, the prediction is not a
            label, or two predictions differ.
    """
    form, answer = _format(labels.wording.names), final_text(answer)
    *reasoning, last = form.names
    for name, pattern in zip(reasoning, form.given, strict=False):
        if len(pattern.findall(answer)) > 1:
            raise InvalidRationale("malformed", f"{name} is given twice")  # one is a quotation; ambiguous
    fields = _from_json(answer, form) or _from_lines(answer, form)
    for name in form.names:
        if not fields.get(name):
            raise InvalidRationale("malformed", f"{name} is missing")
    predictions = {labels.find(value) for value in fields[last]}
    prediction = predictions.pop()
    if predictions or prediction is None:
        raise InvalidRationale("malformed", f"{last} is {' and '.join(fields[last])[:80]!r}, not one label")
    return Rationale(tuple(" ".join(fields[name][0].split()) for name in reasoning), prediction, form.names)


def render(rationale: Rationale) -> str:
    """The canonical format: one quoted field per line, the prediction unquoted. `parse` returns the same rationale."""
    *reasoning, last = rationale.names
    lines = [f'"{name}": "{" ".join(text.split())}"' for name, text in zip(reasoning, rationale.texts, strict=True)]
    return "\n".join([*lines, f'"{last}": {rationale.prediction}'])


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


def _from_json(answer: str, form: _Format) -> dict[str, list[str]] | None:
    """All values of each field of an answer that contains one JSON object; None if it contains none."""
    fields: dict[str, list[str]] = {}

    def collect(pairs: list[tuple[str, Any]]) -> str:
        named = [(form.canonical(name), str(value)) for name, value in pairs]
        if form.names[0] in dict(named):  # may be nested in another object
            for name, value in named:
                fields.setdefault(name, []).extend([value] if value.strip() else [])
        return "an object"

    try:
        json.JSONDecoder(object_pairs_hook=collect, strict=False).raw_decode(answer[max(answer.find("{"), 0) :])
    except (ValueError, RecursionError):
        return None
    return fields or None


def _from_lines(body: str, form: _Format) -> dict[str, list[str]]:
    """All values of each field of an answer whose field names start lines, in order; a field ends at the next name."""
    headers = list(form.header.finditer(body))
    first = next((header for header in headers if form.field(header) == form.names[0]), None)
    if first is None:
        return {}
    headers = [header for header in headers[headers.index(first) :] if _markup(header) == _markup(first)]
    names, (*reasoning, last) = [form.field(header) for header in headers], form.names
    for name in reasoning:
        if name not in names:
            raise InvalidRationale("malformed", f"{name} is missing")
    end_of_reasoning = names.index(reasoning[-1])
    headers = [header for at, header in enumerate(headers) if names[at] != last or at > end_of_reasoning]
    order = [form.names.index(form.field(header)) for header in headers]
    if order != sorted(order) or any(order.count(field) > 1 for field in range(len(form.names) - 1)):
        raise InvalidRationale("malformed", "a field is given twice or out of order")
    ends = [header.start() for header in headers[1:]] + [len(body)]
    fields: dict[str, list[str]] = {}
    for header, end in zip(headers, ends, strict=True):
        name, value = form.field(header), body[header.end() : end].strip()
        if block := _BLOCK.match(value):
            value = value[block.end() :]
        value = _CLOSING.sub("", value)
        if name == last:  # only the line of the label; the rest is commentary
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


def _markup(header: re.Match[str]) -> set[str]:
    """The markup of a field's name: quotes, heading or bold characters."""
    return set(header.group(1).translate(_PLAIN_QUOTES)) & set("\"'`#*|<[【_")
