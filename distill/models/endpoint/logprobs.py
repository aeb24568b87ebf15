"""Label probabilities from answers to *classify*: from log-probabilities, or from the agreement of samples."""

import math
from collections.abc import Sequence

import numpy as np

from distill.models.endpoint.replies import Tokens
from distill.task import reply
from distill.task.labels import LabelSpace

_MARKUP = reply.MARKUP + "\u0120\u2581"  # the spaces of byte-level BPE and SentencePiece
_MIN_PROBABILITY = 1e-12  # no label gets a probability of 0
_OUT_OF_RANGE = -9999.0  # what servers return for a generated token that is not among the top-k tokens, or -inf


def label_probabilities(tokens: Tokens, labels: LabelSpace) -> tuple[np.ndarray, float]:
    """Label probabilities from the tokens of an answer to *classify* or *review*.

    Probabilities are read where the label begins: after a thought, and after the last `"Prediction":` that opens a line
    or a JSON field, otherwise at the first token. The probability of a top-k token is assigned to the label that it is
    a prefix of:

    - A generated token that is a prefix of a label (such as "-" if labels are numbers, or some bytes of a character) is
      followed to the end of the label, whose probability is the product over its tokens.
    - The continuation of a token that was not generated is unknown. If it is a prefix of several labels, its
      probability is split equally among them; a space is a prefix of all labels.
    - A generated token without a log-probability (-9999 or less) has the probability that the top-k tokens leave.
    - The probability of a label without a top-k token is at most that of the least likely top-k token, and at most
      the probability that the top-k tokens leave. The label gets the smaller of the two bounds. If the server returns
      no alternatives at all, the labels share what the generated token leaves.

    Returns:
        Probabilities [K], and the label mass: the sum of the probabilities before they were normalised, at most 1.
    """
    begin = _label_offset("".join(token for token, _ in tokens), labels)
    labelled = False  # whether the generated label has ended
    names = [_normalized(name) for name in labels.names]
    mass = np.zeros(len(names))
    # The generated part of the label, its probability, and the labels that it may still become.
    prefix, prefix_probability, candidates = "", 1.0, list(range(len(names)))
    end = 0
    for token, top_logprobs in tokens:
        start, end = end, end + len(token)
        in_header = start < begin and not token[max(0, begin - start) :].strip(_MARKUP)
        if in_header or not token:  # some servers return the end-of-sequence token as an empty string
            continue
        known = {name: value for name, value in top_logprobs.items() if name != token or value > _OUT_OF_RANGE}
        probabilities = {other: math.exp(min(logprob, 0.0)) for other, logprob in known.items()}
        probabilities.setdefault(token, max(0.0, 1 - sum(probabilities.values())))
        continued = _matching_labels(prefix, token, candidates, names)
        unseen = set(candidates)
        for other, probability in probabilities.items():
            matching = continued if other == token else _matching_labels(prefix, other, candidates, names)
            if other == token and matching and not _is_complete(prefix + token, matching, names):
                unseen -= set(matching)
            elif matching and (prefix.strip(_MARKUP) or not _is_punctuation(other)):
                # An opening quote that was not generated is another format of the answer, not a label.
                unseen -= set(matching)
                mass[matching] += prefix_probability * probability / len(matching)
        left = 1 - sum(probabilities.values())
        bound = min(*probabilities.values(), left) if top_logprobs.keys() - {token} else left / max(len(unseen), 1)
        mass[list(unseen)] += prefix_probability * max(bound, _MIN_PROBABILITY)
        prefix, prefix_probability, candidates = prefix + token, prefix_probability * probabilities[token], continued
        labelled = _is_complete(prefix, candidates, names)
        if labelled or not candidates:
            break
    if candidates and not labelled and prefix.strip(_MARKUP):
        # the answer ended; it may name a label that is a prefix of others, or be cut within one
        named = [k for k in candidates if names[k] == _normalized(prefix)] or candidates
        mass[named] += prefix_probability / len(named)
    if not mass.any():
        return np.full(len(labels), 1 / len(labels)), 0.0
    return mass / mass.sum(), min(float(mass.sum()), 1.0)


def continued_probabilities(tokens: Tokens, labels: LabelSpace) -> tuple[np.ndarray, float] | None:
    """Label probabilities from the token that follows the forced prefix, as a local model is scored.

    The probability of a label is that of its first token: a space and the beginning of the label. The longest such
    token counts. A token without the space is another one, even if it is a label.

    Returns:
        Probabilities [K] and the label mass, as `label_probabilities`; None if the first tokens of the labels are not
        all known, or two labels have the same one.
    """
    if not tokens:
        return None
    top = {token.replace("\u0120", " ").replace("\u2581", " "): logprob for token, logprob in tokens[0][1].items()}
    firsts = [
        max((token for token in top if token.strip() and f" {name}".startswith(token)), key=len, default="")
        for name in labels.names
    ]
    if "" in firsts or len(set(firsts)) < len(firsts):
        return None
    mass = np.maximum(np.exp([min(top[first], 0.0) for first in firsts]), _MIN_PROBABILITY)
    return mass / mass.sum(), min(float(mass.sum()), 1.0)


def agreement(answers: Sequence[str], labels: LabelSpace) -> np.ndarray:
    """Label probabilities [K] from k sampled answers to *classify*: smoothed frequencies.

    p_j = (n_j + (1 + r) / K) / (k + 1), where n_j answers name label j and r answers name no label.
    """
    found = [labels.find(answer) for answer in answers]
    counts = np.array([found.count(name) for name in labels.names], dtype=float)
    return (counts + (1 + found.count(None)) / len(labels)) / (len(answers) + 1)


def _is_complete(text: str, matching: Sequence[int], names: Sequence[str]) -> bool:
    """Whether a generated text is the whole of the only label that it matches, not only its beginning."""
    if len(matching) != 1:
        return False
    name, part = names[matching[0]].encode(), _bytes(_normalized(text, keep_end=True))
    return part == name or not name.startswith(part)


def _matching_labels(prefix: str, token: str, candidates: Sequence[int], names: Sequence[str]) -> list[int]:
    """The candidates that `prefix + token` is a prefix of or names; all candidates if it is punctuation alone."""
    has_text = bool(prefix.strip(_MARKUP))
    ended = not token or (has_text and "\n" in token)
    text = _normalized(prefix + token, keep_end=True)
    begun = [k for k in candidates if not ended and names[k].encode().startswith(_bytes(text))]
    complete = {_normalized(prefix + token)}
    if has_text and not token[:1].isalnum():  # the token ends the label
        complete.add(_normalized(prefix))
    return begun or [k for k in candidates if names[k] in complete]


def _normalized(text: str, keep_end: bool = False) -> str:
    """Text without case, spaces and surrounding punctuation; `keep_end` keeps the punctuation at the end."""
    text = _bytes(text).decode("utf-8", "surrogateescape")  # joins the bytes of a character
    plain = "".join(text.replace("\u0120", " ").replace("\u2581", " ").split()).casefold().lstrip(_MARKUP)
    return plain if keep_end else plain.rstrip(_MARKUP)


def _is_punctuation(token: str) -> bool:
    """Whether a token is quotes, brackets or other punctuation alone; a token of spaces alone is not."""
    return bool(token.strip(" \u0120\u2581")) and not token.strip(_MARKUP)


def _bytes(text: str) -> bytes:
    """UTF-8, where lone surrogates stand for the bytes of a part of a character."""
    return text.encode("utf-8", "surrogateescape")


def _label_offset(text: str, labels: LabelSpace) -> int:
    """Offset in an answer to *classify* where the label begins."""
    begin = reply.answer_start(text)
    return begin + labels.start_of(text[begin:])
