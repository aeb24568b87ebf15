"""Cleaning of a model's answer: thoughts, tags, code fences and the punctuation around a label.

Parser of rationales and readers of labels use these functions, so that both accept the same formats.
"""

import re
from collections.abc import Callable

QUOTES = "\"'`“”„‟‘’‚«»‹›「」『』＂＇"
MARKUP = " \t\r\n\u00a0\u3000*_.,;:!{}[]()<>。．，、；：！（）【】《》〈〉…" + QUOTES
"""Characters around a label that are not part of it. A sign is (labels may be numbers), and so is a question mark."""

_NAMES = r"(?:seed:)?(?:think(?:ing)?|thoughts?|reasoning)"
_OPEN = rf"(?:<{_NAMES}>|\[think\]|◁think▷|<\|channel\|>analysis<\|message\|>)"
_CLOSE = rf"(?:</{_NAMES}>|\[/think\]|◁/think▷|<\|channel\|>final<\|message\|>)"
_THOUGHT = re.compile(f"{_OPEN}.*?{_CLOSE}", re.IGNORECASE | re.DOTALL)
_THOUGHT_END = re.compile(_CLOSE, re.IGNORECASE)
_UNCLOSED = re.compile(rf"^[ \t]*{_OPEN}.*", re.IGNORECASE | re.DOTALL | re.MULTILINE)
_STARTS_OPEN = re.compile(rf"\s*{_OPEN}", re.IGNORECASE)

_ANSWER = re.compile(r"(?:\A[^\n]*|^[ \t]*)<answer>(?P<inside>.*?)(?:</answer>|\Z)", re.I | re.DOTALL | re.MULTILINE)
_TAG = re.compile(r"</?answer>|<\|\w+\|>", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\{(?:\\text\{)?([^{}]*)\}{1,2}")
_FENCE = re.compile(r"^[ \t]*```\w*[ \t]*$", re.MULTILINE)

_LEAD = r"(?:^|[{,])[ \t\"'“”‘’*#>(\d.)\u0120\u2581-]*"
_HEADERS = [
    re.compile(rf"{_LEAD}{name}[\"'“”‘’*]*[ \t]*[:：]", re.IGNORECASE | re.MULTILINE)
    for name in (r"(?:final |the )?prediction", r"(?:final |the |my )?(?:answer|label|sentiment)")
]


def final_text(reply: str | None) -> str:
    """The answer in a reply: without thoughts, `<answer>` tags, special tokens and code fences.

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
    return _FENCE.sub("", _BOXED.sub(r"\1", _TAG.sub("", text)))


def answer_start(reply: str) -> int:
    """Offset in a reply where the thought ends; 0 without a thought, the length of a reply that is only a thought."""
    ends = list(_THOUGHT_END.finditer(reply))
    if ends:
        return ends[-1].end()
    return len(reply) if _STARTS_OPEN.match(reply) else 0


def label_start(text: str, is_label: Callable[[str], bool]) -> int:
    """Offset in an answer without thought where the label begins.

    It is after the last `"Prediction":` (or `Answer:`, `Label:`, `Sentiment:`) that opens a line or a JSON field; 0 if
    the first line is a bare label, or there is no such name.
    """
    if is_label(first_line(text)):
        return 0
    for header in _HEADERS:
        if found := list(header.finditer(text)):
            return found[-1].end()
    return 0


def first_line(text: str) -> str:
    """The first line that is more than punctuation; empty if there is none."""
    return next((line for line in text.splitlines() if line.strip(MARKUP)), "")


def bare(text: str) -> str:
    """A label without case and surrounding punctuation; a bullet before a word is punctuation, a sign is not."""
    return re.sub(r"^[-–—•>#]+\s+(?=[^\W\d])", "", text.strip(MARKUP)).strip(MARKUP).casefold()
