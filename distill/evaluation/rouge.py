"""ROUGE-L as the package `rouge` 1.0.1 computes it, which the published evaluation of MulCoT-RD uses on raw texts.

It differs from Lin (2004) and from `rouge-score`: sentences end at full stops, words are split at white space and keep
case and punctuation, and every word counts once.
"""

from collections.abc import Sequence

_EPSILON = 1e-8  # part of the definition: it keeps the F1 of a text with itself just below 1


def rouge_l(text: str, reference: str) -> float:
    """F1 of the words in the union of the longest common subsequences of all pairs of sentences.

    Precision and recall divide by the number of distinct words. A text without words gives 0, as in the published
    evaluation.
    """
    sentences, others = _sentences(text), _sentences(reference)
    if not sentences or not others or not text.strip() or not reference.strip():
        return 0.0
    common: set[str] = set()
    for other in others:
        for sentence in sentences:
            common |= _common_words(other, sentence)
    precision, recall = (len(common) / len({word for words in side for word in words}) for side in (sentences, others))
    return 2 * precision * recall / (precision + recall + _EPSILON)


def _sentences(text: str) -> list[list[str]]:
    """Words of each sentence; white space between two full stops is a sentence of one empty word."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common_words(left: Sequence[str], right: Sequence[str]) -> set[str]:
    """Words of one longest common subsequence; of several, the one that drops words of `right` first."""
    known = set(left)
    if not (right := [word for word in right if word in known]):  # the others are dropped first in any case
        return set()
    lengths = [[0] * (len(right) + 1)]
    for word in left:
        above, row = lengths[-1], [0]
        for column, other in enumerate(right):
            row.append(above[column] + 1 if word == other else max(above[column + 1], row[column]))
        lengths.append(row)
    words, i, j = set(), len(left), len(right)
    while i and j:
        if left[i - 1] == right[j - 1]:
            words.add(left[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words
