"""Cleaning of a model's answer: thoughts, tags, code fences, invisible characters and the punctuation around a label.

Parser of rationales and readers of labels use these functions, so that both accept the same formats.
"""

import re
import unicodedata
from collections.abc import Callable
from functools import cache

QUOTES = "\"'`“”„‟‘’‚«»‹›「」『』＂＇"
INVISIBLE = "\u00ad\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff"
"""Characters without width: soft hyphens, spaces of width zero, marks of direction and of byte order."""
MARKUP = " \t\r\n\u00a0\u3000*_.,;:!|${}[]()<>。．，、；：！（）【】《》〈〉…" + QUOTES + INVISIBLE
"""Characters around a label that are not part of it. A sign is (labels may be numbers), and so is a question mark."""

LEAD = rf"[ \t\u00a0\u3000{QUOTES}{INVISIBLE}*_#>|(\[（【)\]）】•·–—.、\d①-⑩一二三四五\u0120\u2581-]"
"""A character that may be before the name of a field: a quote, a bullet, a number or other markup."""


_NAMES = r"(?:seed:)?(?:think(?:ing)?|thoughts?|reasoning)"
_TURN = r"(?:<\|start\|>assistant)?<\|channel\|>"
_OPEN = rf"(?:<{_NAMES}>|\[think\]|◁think▷|{_TURN}analysis<\|message\|>)"
_CLOSE = rf"(?:</{_NAMES}>|\[/think\]|◁/think▷|{_TURN}final<\|message\|>)"
_THOUGHT = re.compile(f"{_OPEN}.*?{_CLOSE}", re.IGNORECASE | re.DOTALL)
_THOUGHT_END = re.compile(_CLOSE, re.IGNORECASE)
_UNCLOSED = re.compile(rf"^[ \t]*{_OPEN}.*", re.IGNORECASE | re.DOTALL | re.MULTILINE)
_STARTS_OPEN = re.compile(rf"\s*{_OPEN}", re.IGNORECASE)

_ANSWER = re.compile(r"(?:\A[^\n]*|^[ \t]*)<answer>(?P<inside>.*?)(?:</answer>|\Z)", re.I | re.DOTALL | re.MULTILINE)
_TAG = re.compile(
    r"</?answer>|<[|｜][\w▁]+[|｜]>|</?s>|<(?:[be]os|pad|(?:start|end)_of_(?:turn|utterance))>"
    r"|</?(?:b|i|u|em|strong|code|p|li|ul|ol|div|span|h[1-6])>",
    re.IGNORECASE,
)
_LINE_END = re.compile(r"\r\n?|<br[ ]?/?>", re.IGNORECASE)
_BOXED = re.compile(r"\\(?:boxed|textbf)\{(?:\\text\{)?([^{}]*)\}{1,2}")
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)\w*[ \t]*$", re.MULTILINE)
_CONFIDENCE = re.compile(r"(?<=[^\W\d_])[*\"'”’]*[ \t]*[(（\[](?:0?\.\d+|1\.0+|\d+(?:\.\d+)?[ ]?%)[)）\]]\W*$")
_JSON_VALUE = re.compile(r"[ \t\n]*\"([^\"\n]*)\"\s*,\s*\"[^\"\n]*\"\s*:")

_REMOVED = dict.fromkeys(map(ord, INVISIBLE))


@cache
def _headers(field: str) -> list[re.Pattern[str]]:
    """What comes before a label: the name of the prediction's field, or else a usual one."""
    names = rf"(?:final |the )?(?:{spellings(field)})", r"(?:final |the |my )?(?:prediction|answer|label|sentiment)"
    return [
        re.compile(rf"(?:^|[{{,]){LEAD}*{name}[{QUOTES}*]*[ \t]*[:：]", re.IGNORECASE | re.MULTILINE) for name in names
    ]


def letters_of(field: str) -> str:
    """The letters of a field's name, without case and the markup or number before it."""
    return "".join(filter(str.isalpha, re.sub(f"^{LEAD}+", "", field).casefold()))


def spellings(field: str) -> str:
    """Pattern of a field's name: also with a space, a hyphen or nothing in place of "_"."""
    return r"(?:\\?_|[ -])?".join(map(re.escape, re.split("[_ -]+", field)))


def final_text(reply: str | None) -> str:
    """The answer in a reply: without thoughts, tags, special tokens, invisible characters and code fences.

    A thought may be closed, closed without having been opened (the chat template opened it), or not closed. In the last
    case there is no answer after it.
    """
    text = reply or ""
    if _THOUGHT_END.search(text):
        text = _THOUGHT.sub("", text)
        if ends := list(_THOUGHT_END.finditer(text)):
            text = text[ends[-1].end() :]
    text = _UNCLOSED.sub("", text)
    if answers := list(_ANSWER.finditer(text)):
        text = answers[-1]["inside"]
    text = _LINE_END.sub("\n", text).translate(_REMOVED)
    return _FENCE.sub("", _BOXED.sub(r"\1", _TAG.sub("", text)))


def answer_start(reply: str) -> int:
    """Offset in a reply where the thought ends; 0 without a thought, the length of a reply that is only a thought."""
    ends = list(_THOUGHT_END.finditer(reply))
    if ends:
        return ends[-1].end()
    return len(reply) if _STARTS_OPEN.match(reply) else 0


def label_start(text: str, is_label: Callable[[str], bool], field: str) -> int:
    """Offset in an answer without thought where the label begins.

    It is after the last name of the prediction's field, such as `"Prediction":` (or `Answer:`, `Label:`, `Sentiment:`),
    that opens a line or a JSON field; 0 if the first line is a bare label, or there is no such name.
    """
    if is_label(first_line(text)):
        return 0
    for header in _headers(field):
        if found := list(header.finditer(text)):
            return found[-1].end()
    return 0


def first_line(text: str) -> str:
    """The first line that is more than punctuation; empty if there is none."""
    return next((line for line in text.splitlines() if line.strip(MARKUP)), "")


def label_value(text: str) -> str:
    """The line of a label, or its value in a JSON object with further fields; without a confidence after a word."""
    value = _JSON_VALUE.match(text)
    return _CONFIDENCE.sub("", value[1] if value else first_line(text))


def bare(text: str) -> str:
    """A label without case, width and surrounding punctuation; a bullet before a word is punctuation, a sign is not."""
    text = unicodedata.normalize("NFKC", text)
    return re.sub(r"^[-–—•>#]+\s+(?=[^\W\d])", "", text.strip(MARKUP)).strip(MARKUP).casefold()
