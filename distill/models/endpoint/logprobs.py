"""Label probabilities from what a server answers to *classify*: its log-probabilities, or several answers."""

import math
import re
from collections.abc import Sequence

import numpy as np

from distill.models.endpoint.http import Tokens
from distill.task.labels import LabelSpace

_PREDICTION = re.compile(r"(?:^|[{,])[ \t\"'*#>\u0120\u2581-]*prediction[\"'*]*[ \t]*:", re.IGNORECASE | re.MULTILINE)
_QUOTES = " \t\r\n\"'`*_.,;:{}[]\u0120\u2581"  # and the two signs by which tokenizers write a space
_FLOOR = 1e-12  # no label is impossible


def label_probabilities(tokens: Tokens, labels: LabelSpace) -> tuple[np.ndarray, float]:
    """Label probabilities [K] from the tokens of an answer to *classify* or *review*, and the label mass.

    They are read where the label begins: after the last `"Prediction":` that opens a line or a JSON field, otherwise
    at the answer's first token. A likely token counts for the label that it begins. Where it begins several, as "-"
    does with numbers, what was generated is followed to the next token. How an answer would have gone on after a token
    that was not generated nobody knows: its probability is shared equally among the labels it begins, and so is that
    of a space. A label that no likely token begins has at most the probability of the least likely of them, and at most
    what they leave; it is given that bound. The mass is the sum before normalising, 1 at most.
    """
    begin = _label_begins("".join(token for token, _ in tokens), labels)
    names = [_letters(name) for name in labels.names]
    mass = np.zeros(len(names))
    said, reached, left = "", 1.0, list(range(len(names)))  # of the label so far: text, probability, what it may become
    end = 0
    for token, likely in tokens:
        start, end = end, end + len(token)
        header = start < begin and not token[max(0, begin - start) :].strip(_QUOTES)
        if header or not token:  # a server may write its end token as nothing
            continue
        shares = {other: math.exp(min(logprob, 0.0)) for other, logprob in likely.items()}
        shares.setdefault(token, max(0.0, 1 - sum(shares.values())))
        following = _begun(said, token, left, names)
        unseen = set(left)
        for other, share in shares.items():
            begun = following if other == token else _begun(said, other, left, names)
            if other == token and len(begun) > 1:
                unseen -= set(begun)
            elif begun and (said.strip(_QUOTES) or not _quotes(other)):  # an opening quote that was not taken is a form
                unseen -= set(begun)
                mass[begun] += reached * share / len(begun)
        mass[list(unseen)] += reached * max(min(*shares.values(), 1 - sum(shares.values())), _FLOOR)
        said, reached, left = said + token, reached * shares[token], following
        if len(left) <= 1:
            break
    if len(left) > 1 and said.strip(_QUOTES):  # the answer ends while it may be several: it is the shortest of them
        named = [k for k in left if names[k] == _letters(said)] or left
        mass[named] += reached / len(named)
    if not mass.any():
        return np.full(len(labels), 1 / len(labels)), 0.0
    return mass / mass.sum(), min(float(mass.sum()), 1.0)


def agreement(answers: Sequence[str], labels: LabelSpace) -> np.ndarray:
    """Label probabilities [K] from k answers to *classify*: their shares, smoothed by one more answer for all alike.

    p_j = (n_j + (1 + r) / K) / (k + 1), where r of the k answers name no label.
    """
    found = [labels.find(_first_line(answer[_label_begins(answer, labels) :])) for answer in answers]
    counts = np.array([found.count(name) for name in labels.names], dtype=float)
    return (counts + (1 + found.count(None)) / len(labels)) / (len(answers) + 1)


def _begun(said: str, token: str, left: Sequence[int], names: Sequence[str]) -> list[int]:
    """Which of the labels that are left the text `said` and then `token` begin, or are; all of them for mere quotes."""
    inside = bool(said.strip(_QUOTES))
    over = not token or (inside and "\n" in token)
    begun = [k for k in left if not over and names[k].startswith(_letters(said + token, open_ended=True))]
    ended = inside and not token[:1].isalnum()
    whole = {_letters(said + token), _letters(said)} if ended else {_letters(said + token)}
    return begun or [k for k in left if names[k] in whole]


def _letters(text: str, open_ended: bool = False) -> str:
    """A text without case, spaces and the quotes around it; `open_ended` keeps those that it ends with."""
    plain = "".join(text.replace("\u0120", " ").replace("\u2581", " ").split()).casefold().lstrip(_QUOTES)
    return plain if open_ended else plain.rstrip(_QUOTES)


def _quotes(token: str) -> bool:
    """Whether a token is quotes or brackets alone; spaces alone are none."""
    return bool(token.strip(" \u0120\u2581")) and not token.strip(_QUOTES)


def _label_begins(text: str, labels: LabelSpace) -> int:
    """Where an answer to *classify* begins to name its label; an answer that is the bare label names it at once."""
    headers = list(_PREDICTION.finditer(text))
    return headers[-1].end() if headers and labels.find(_first_line(text)) is None else 0


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip(_QUOTES)), "")
