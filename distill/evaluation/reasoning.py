"""Metrics of rationales: overlap with reference rationales, diversity, and agreement with the labels.

The libraries of the overlap metrics are in the extra `metrics`. A metric whose library, corpus or model is missing is
left out with a warning; there are no approximations.
"""

import logging
import os
import re
from collections.abc import Sequence
from functools import cache

import numpy as np

from distill.connections import hub_reachable
from distill.task.labels import LabelSpace
from distill.task.rationale import Rationale, render

SIMILARITY_MODEL = "sentence-transformers/all-MiniLM-L6-v2"

_log = logging.getLogger(__name__)


class _MissingResource(Exception):
    """A corpus or model that a metric needs is missing; the message says how to get it."""


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
        means, over samples with both texts, of `bleu4` (sentence BLEU, 13a), `meteor`, `rouge_l` (F1) and
        `similarity` (cosine of sentence embeddings). The compared texts are in canonical form with field names, as in
        the published evaluation. Metrics that cannot be computed are absent.

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
    pairs = [(render(p), render(r)) for p, r in zip(predictions, references, strict=True) if p is not None and r]
    if not pairs:
        return metrics
    for name, scores in (
        ("bleu4", _bleu4),
        ("meteor", _meteor),
        ("rouge_l", _rouge_l),
        ("similarity", lambda pairs: _similarity(pairs, similarity_model)),
    ):
        try:
            metrics[name] = float(np.mean(scores(pairs)))
        except ImportError as error:
            _warn_once(f"{name} is left out: {error.name} is not installed (pip install 'distill[metrics]')")
        except _MissingResource as error:
            _warn_once(f"{name} is left out: {error}")
    return metrics


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams / all n-grams, over the words and punctuation marks of all texts; 0 if there are no n-grams."""
    words = [re.findall(r"\w+|[^\w\s]", text.lower()) for text in texts]
    grams = [tuple(text[i : i + n]) for text in words for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _bleu4(pairs: Sequence[tuple[str, str]]) -> list[float]:
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(tokenize="13a", effective_order=True)
    return [bleu.sentence_score(text, [reference]).score / 100 for text, reference in pairs]


def _meteor(pairs: Sequence[tuple[str, str]]) -> list[float]:
    from nltk.corpus import wordnet
    from nltk.tokenize import TreebankWordTokenizer
    from nltk.translate.meteor_score import single_meteor_score

    try:
        wordnet.ensure_loaded()
    except LookupError:
        raise _MissingResource("nltk's wordnet corpus is missing (python -m nltk.downloader wordnet)") from None
    words = TreebankWordTokenizer().tokenize
    return [single_meteor_score(words(reference), words(text), wordnet=wordnet) for text, reference in pairs]


def _rouge_l(pairs: Sequence[tuple[str, str]]) -> list[float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return [scorer.score(reference, text)["rougeL"].fmeasure for text, reference in pairs]


def _similarity(pairs: Sequence[tuple[str, str]], model: str) -> list[float]:
    from sentence_transformers import SentenceTransformer

    from distill.models.backbone import hide_progress_bars

    if not model:
        raise _MissingResource("similarity_model is empty")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    try:
        with hide_progress_bars():
            encoder = SentenceTransformer(model, local_files_only=offline or not hub_reachable())
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        remedy = "download it once with a connection, or set the folder of a copy"
        raise _MissingResource(f"the model {model!r} cannot be loaded ({remedy}): {reason}") from error
    texts, references = zip(*pairs, strict=True)
    embedded = [
        encoder.encode(list(column), normalize_embeddings=True, show_progress_bar=False)
        for column in (texts, references)
    ]
    return [float(one @ other) for one, other in zip(*embedded, strict=True)]


@cache
def _warn_once(message: str) -> None:
    """Log a warning once per process; several roles lack the same resource."""
    _log.warning(message)
