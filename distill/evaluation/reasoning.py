"""Metrics of rationales: overlap with reference rationales, diversity, and agreement with the labels.

The libraries of the overlap metrics are in the extra `metrics`. A metric whose library, corpus or model is missing is
left out with a warning; there are no approximations.
"""

import logging
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.util import find_spec

import numpy as np

from distill.evaluation import resources, rouge
from distill.evaluation.resources import SIMILARITY_MODEL, MissingResource
from distill.task.labels import LabelSpace
from distill.task.rationale import Rationale, render

_log = logging.getLogger(__name__)

_LIBRARIES = {
    "bleu4": "sacrebleu", "meteor": "nltk", "rouge_l": "rouge_score", "similarity": "sentence_transformers",
}  # fmt: skip

Pairs = Sequence[tuple[str, str]]
"""Texts with their references."""

_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
"""Scripts that put no spaces between words, as the names of their characters begin."""


def reasoning_metrics(
    predictions: Sequence[Rationale | None],
    references: Sequence[Rationale | None],
    gold: Sequence[str],
    classified: Sequence[str],
    labels: LabelSpace,
    similarity_model: str = SIMILARITY_MODEL,
) -> dict[str, float]:
    """Metrics of one role's rationales on B samples, all in [0, 1] (similarity in [-1, 1]).

    Args:
        predictions: B generated rationales, None if the answer did not parse.
        references: B rationales of the teacher, None if there is none.
        gold: B gold labels.
        classified: B labels from label scoring.
        similarity_model: name or folder of a sentence-transformers model.

    Returns:
        `parse_rate`; `reasoned_accuracy` of the rationale's prediction, where an answer that does not parse is wrong;
        `consistency`, share of parsed predictions that equal the classified label; `distinct1` and `distinct2` of the
        predictions (Li et al., arXiv 1510.03055: distinct n-grams / all n-grams, over all texts together); and the
        means, over samples with both texts, of `bleu4` (sentence BLEU), `meteor`, `rouge_l` (F1) and `similarity`
        (cosine of sentence embeddings). They compare the contents of the fields without the fields' names; all but the
        similarity compare `words`. Metrics that cannot be computed are absent.

    Raises:
        ValueError: no samples, sequences of different lengths, or an unknown label.
    """
    if not predictions or len({len(predictions), len(references), len(gold), len(classified)}) > 1:
        raise ValueError("predictions, references, gold and classified need one entry for each sample")
    for name in (*gold, *classified):
        labels.index(name)
    parsed = [(p, c) for p, c in zip(predictions, classified, strict=True) if p is not None]
    correct = [p is not None and p.prediction == g for p, g in zip(predictions, gold, strict=True)]
    metrics = {"parse_rate": len(parsed) / len(predictions), "reasoned_accuracy": float(np.mean(correct))}
    if not parsed:
        return metrics
    texts = [render(p) for p, _ in parsed]
    metrics["consistency"] = float(np.mean([p.prediction == c for p, c in parsed]))
    metrics["distinct1"], metrics["distinct2"] = distinct(texts, 1), distinct(texts, 2)
    pairs = [(_contents(p), _contents(r)) for p, r in zip(predictions, references, strict=True) if p is not None and r]
    similarity = partial(_similarity, model=similarity_model)
    return metrics | _means(pairs, {"bleu4": _bleu4, "meteor": _meteor, "rouge_l": _rouge_l, "similarity": similarity})


def grounding(rationale: Rationale | None, attributes: Mapping[str, str]) -> list[bool]:
    """For each gold attribute of a post, whether the text or image analysis of its rationale names it as a word.

    Args:
        rationale: None for an answer that did not parse, which names nothing.
    """
    if rationale is None:
        return [False] * len(attributes)
    words_named = re.findall(r"\w+", " ".join(rationale.texts[:2]))  # the two analyses
    return [value in words_named for value in attributes.values()]


def published_metrics(
    texts: Sequence[str | None], references: Sequence[str | None], similarity_model: str = SIMILARITY_MODEL
) -> dict[str, float]:
    """Metrics of B generated texts as the published MulCoT-RD code (arXiv 2508.05234) defines them.

    They are computed on raw texts, field names included, whether or not they parse. Distinct-n is computed on the
    generated texts; the published script passes the references instead.

    Args:
        texts: B generated answers, None if there is no answer.
        references: B rationales of the teacher as generated, None if there is none.

    Returns:
        `published_distinct1` and `published_distinct2`, the means of each text's distinct n-grams / all n-grams; and
        the means, over samples with both texts, of `published_bleu4` (unsmoothed sentence BLEU, 13a),
        `published_meteor`, `published_rouge_l` (`rouge.rouge_l`) and `published_similarity`.
    """
    answers = [text for text in texts if text is not None]
    pairs = [(text, other) for text, other in zip(texts, references, strict=True) if text is not None and other]
    metrics = _means(
        pairs,
        {
            "bleu4": _published_bleu4,
            "meteor": _published_meteor,
            "rouge_l": lambda pairs: [rouge.rouge_l(text, reference) for text, reference in pairs],
            "similarity": partial(_similarity, model=similarity_model),
        },
        "published_",
    )
    try:
        from nltk.tokenize import TreebankWordTokenizer
    except ImportError:  # METEOR has warned
        return metrics
    tokenize = TreebankWordTokenizer().tokenize
    for n in (1, 2) if answers else ():
        grams = [_ngrams(tokenize(text.lower()), n) for text in answers]
        metrics[f"published_distinct{n}"] = float(np.mean([len(set(g)) / len(g) if g else 0.0 for g in grams]))
    return metrics


def _means(pairs: Pairs, scores: dict[str, Callable[[Pairs], Sequence[float]]], prefix: str = "") -> dict[str, float]:
    """Mean scores of the pairs by name; metrics that cannot be computed are left out with a warning."""
    metrics: dict[str, float] = {}
    for name, score in scores.items() if pairs else ():
        try:
            metrics[prefix + name] = float(np.mean(score(pairs)))
        except ImportError as error:
            _warn_once(f"{name} is left out: {error.name} is not installed (pip install 'distill[metrics]')")
        except MissingResource as error:
            _warn_once(f"{name} is left out: {error}")
    return metrics


def left_out(similarity_model: str) -> list[str]:
    """The overlap metrics that cannot be computed on this machine, each with what it needs. No library is loaded."""
    messages = []
    for name, library in _LIBRARIES.items():
        if find_spec(library) is None:
            messages.append(f"{name} is left out: {library} is not installed (pip install 'distill[metrics]')")
        elif name == "similarity" and (reason := resources.missing_encoder(similarity_model)):
            messages.append(f"{name} is left out: {reason}")
    return messages


def words(text: str) -> list[str]:
    """Lower-case words of a text in any script; in scripts without spaces, such as Chinese or Thai, its characters.

    A word is a run of letters, digits and the marks on them.
    """
    spaced = "".join(
        f" {c} " if _is_unspaced(c) else c if unicodedata.category(c)[0] in "LMN" else " "
        for c in unicodedata.normalize("NFKC", text).lower()
    )
    return spaced.split()


@cache
def _is_unspaced(character: str) -> bool:
    return unicodedata.name(character, "").startswith(_UNSPACED)


def _contents(rationale: Rationale) -> str:
    """The contents of the fields, without their names."""
    return "\n".join((*rationale.texts, rationale.prediction))


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams / all n-grams, over the words and punctuation marks of all texts; 0 if there are no n-grams."""
    grams = [gram for text in texts for gram in _ngrams(re.findall(r"\w+|[^\w\s]", text.lower()), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _bleu4(pairs: Pairs) -> list[float]:
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(tokenize="none", effective_order=True)
    return [bleu.sentence_score(" ".join(words(t)), [" ".join(words(r))]).score / 100 for t, r in pairs]


def _published_bleu4(pairs: Pairs) -> list[float]:
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(tokenize="13a", smooth_method="none")
    return [bleu.corpus_score([text], [[reference]]).score / 100 for text, reference in pairs]


def _meteor(pairs: Pairs) -> list[float]:
    from nltk.translate.meteor_score import single_meteor_score

    wordnet = resources.wordnet()
    return [single_meteor_score(words(reference), words(text), wordnet=wordnet) for text, reference in pairs]


def _published_meteor(pairs: Pairs) -> list[float]:
    from nltk.tokenize import TreebankWordTokenizer
    from nltk.translate.meteor_score import single_meteor_score

    wordnet, tokenize = resources.wordnet(), TreebankWordTokenizer().tokenize
    return [
        single_meteor_score(tokenize(reference.lower()), tokenize(text.lower()), wordnet=wordnet)
        for text, reference in pairs
    ]


class _Words:
    """`words` as the tokenizer of rouge-score, whose own drops all but ASCII letters and digits."""

    tokenize = staticmethod(words)


def _rouge_l(pairs: Pairs) -> list[float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return [scorer.score(reference, text)["rougeL"].fmeasure for text, reference in pairs]


def _similarity(pairs: Pairs, model: str) -> list[float]:
    texts, references = zip(*pairs, strict=True)
    embedded = zip(resources.embed(texts, model), resources.embed(references, model), strict=True)
    return [float(one @ other) for one, other in embedded]


@cache
def _warn_once(message: str) -> None:
    """Log a warning once per process; several roles lack the same resource."""
    _log.warning(message)
