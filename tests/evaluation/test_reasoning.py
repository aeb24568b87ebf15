"""Reasoning metrics compared with the libraries and hand-computed values, and with missing resources."""

import builtins
import logging
import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

from distill import connections
from distill.evaluation import reasoning, resources
from distill.evaluation.reasoning import distinct, reasoning_metrics, words
from distill.task.labels import LabelSpace
from distill.task.rationale import Rationale

LABELS = LabelSpace()
MISSING = "/nowhere/all-MiniLM-L6-v2"


def rationale(words: str, prediction: str = "positive") -> Rationale:
    texts = f"The words {words} today.", "The image shows a smile.", "Both agree.", f"So it is {words}."
    return Rationale(texts, prediction)


def contents(rationale: Rationale) -> str:
    return "\n".join((*rationale.texts, rationale.prediction))


PREDICTIONS = [
    rationale("cheer loudly"),
    rationale("mock the view", "negative"),
    None,
    rationale("report a fact", "neutral"),
]
REFERENCES = [rationale("cheer"), rationale("mock the sad view", "negative"), rationale("cheer"), None]
GOLD = ["positive", "positive", "positive", "neutral"]
CLASSIFIED = ["positive", "negative", "positive", "positive"]
PAIRS = [(contents(p), contents(r)) for p, r in zip(PREDICTIONS, REFERENCES, strict=True) if p and r]


@pytest.fixture(autouse=True)
def reset_warnings() -> None:
    for cached in (reasoning._warn_once, resources.wordnet, resources._encoder, connections.hub_reachable):
        cached.cache_clear()


class Wordnet:
    """The part of nltk's corpus that METEOR uses, with one pair of synonyms."""

    def ensure_loaded(self) -> None:
        pass

    def synsets(self, word: str) -> list[SimpleNamespace]:
        lemmas = [SimpleNamespace(name=lambda name=name: name) for name in ("cheer", "applaud")]
        return [SimpleNamespace(lemmas=lambda: lemmas)] if word in ("cheer", "applaud") else []


def measure(predictions: Any = PREDICTIONS, references: Any = REFERENCES, model: str = MISSING) -> dict[str, float]:
    return reasoning_metrics(predictions, references, GOLD, CLASSIFIED, LABELS, model)


def test_rates_by_hand() -> None:
    measured = measure()
    assert measured["parse_rate"] == 3 / 4
    assert measured["reasoned_accuracy"] == 2 / 4  # correct, wrong, unparsed, correct
    assert measured["consistency"] == 2 / 3  # of the three that parsed


def test_bleu_and_rouge_equal_the_libraries() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    rouge = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    measured = measure()
    plain = [tuple(" ".join(re.findall(r"[a-z]+", text.lower())) for text in pair) for pair in PAIRS]
    bleu = [sacrebleu.sentence_bleu(p, [r], tokenize="none", use_effective_order=True).score / 100 for p, r in plain]
    assert len(PAIRS) == 2
    assert measured["bleu4"] == pytest.approx(np.mean(bleu))
    assert measured["rouge_l"] == pytest.approx(np.mean([rouge.score(r, p)["rougeL"].fmeasure for p, r in PAIRS]))
    assert 0 < measured["bleu4"] < 1
    same = measure(references=PREDICTIONS)
    assert same["bleu4"] == pytest.approx(1)
    assert same["rouge_l"] == pytest.approx(1)


def test_meteor_equals_nltk(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = pytest.importorskip("nltk.corpus")
    from nltk.translate.meteor_score import meteor_score

    monkeypatch.setattr(corpus, "wordnet", Wordnet())
    expected = [meteor_score([words(r)], words(p), wordnet=Wordnet()) for p, r in PAIRS]
    assert measure()["meteor"] == pytest.approx(np.mean(expected))
    applauds = [rationale("applaud"), *PREDICTIONS[1:]]
    unrelated = [rationale("whistle"), *PREDICTIONS[1:]]
    assert measure(applauds)["meteor"] > measure(unrelated)["meteor"]  # the synonym counts


def test_meteor_without_its_corpus_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = pytest.importorskip("nltk.corpus")

    class Absent:
        def ensure_loaded(self) -> None:
            raise LookupError("Resource wordnet not found")

    monkeypatch.setattr(corpus, "wordnet", Absent())
    monkeypatch.setattr(resources, "DEBIAN_WORDNET", Path("/nowhere"))
    with caplog.at_level(logging.WARNING):
        first, second = measure(), measure()
    assert "meteor" not in first and "meteor" not in second
    warnings = [record.message for record in caplog.records if "meteor" in record.message]
    assert warnings == [
        "meteor is left out: WordNet is missing (apt install wordnet-base wordnet-sense-index, or python -m "
        "nltk.downloader wordnet)"
    ]


def test_similarity_of_a_tiny_model(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    model = tiny_sentence_model(tmp_path)
    ours = measure(model=str(model))["similarity"]
    encoder = library.SentenceTransformer(str(model), local_files_only=True)
    a, b = (encoder.encode(list(side)) for side in zip(*PAIRS, strict=True))
    cosine = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)]
    assert ours == pytest.approx(np.mean(cosine), abs=1e-5)
    assert measure(references=PREDICTIONS, model=str(model))["similarity"] == pytest.approx(1, abs=1e-5)
    assert ours < 0.9999


def tiny_sentence_model(folder: Path) -> Path:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = sorted({word for pair in PAIRS for text in pair for word in text.lower().split()})
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)))
    bert, sentence = folder / "bert", folder / "sentence"
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=1.0,
    )
    BertModel(config).save_pretrained(bert)
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(bert)
    transformer = Transformer(str(bert))
    SentenceTransformer(modules=[transformer, Pooling(16)]).save_pretrained(str(sentence))
    return sentence


@pytest.mark.parametrize("model", [MISSING, "sentence-transformers/all-MiniLM-L6-v2-does-not-exist"])
def test_similarity_without_its_model_is_left_out(
    model: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("sentence_transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import socket

    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    measured = measure(model=model)
    assert "similarity" not in measured
    warning = next(record.message for record in caplog.records if "similarity" in record.message)
    assert model in warning and "download it once" in warning


def test_metrics_of_libraries_that_are_not_installed_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = builtins.__import__

    def without_the_extra(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] in {"sacrebleu", "nltk", "rouge_score", "sentence_transformers"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_the_extra)
    measured = measure()
    assert set(measured) == {"parse_rate", "reasoned_accuracy", "consistency", "distinct1", "distinct2"}
    warnings = [record.message for record in caplog.records if "distill[metrics]" in record.message]
    assert [warning.split()[0] for warning in warnings] == ["bleu4", "meteor", "rouge_l", "similarity"]


def test_distinct_by_hand() -> None:
    assert distinct(["a b a", "a b"], 1) == 2 / 5
    assert distinct(["a b a", "a b"], 2) == 2 / 3  # ab, ba, ab: n-grams do not span two texts
    assert distinct(["Yes! yes?"], 1) == 3 / 4
    assert distinct(["word"], 2) == 0


def test_distinct_is_computed_on_the_predictions() -> None:
    monotone = [rationale("cheer")] * 4
    varied = [rationale(words) for words in ("cheer", "mock an old view", "mention three things", "sing")]
    assert measure(monotone, varied)["distinct2"] < measure(varied, monotone)["distinct2"]


def test_without_parsed_answers_or_references_metrics_are_left_out() -> None:
    assert measure([None] * 4) == {"parse_rate": 0, "reasoned_accuracy": 0}
    assert not {"bleu4", "rouge_l", "meteor", "similarity"} & set(measure(references=[None] * 4))


def test_sequences_of_different_lengths_and_unknown_labels_are_rejected() -> None:
    with pytest.raises(ValueError, match="one entry for each sample"):
        reasoning_metrics(PREDICTIONS, REFERENCES[:2], GOLD, CLASSIFIED, LABELS)
    with pytest.raises(ValueError, match="angry"):
        reasoning_metrics(PREDICTIONS, REFERENCES, ["angry"] * 4, CLASSIFIED, LABELS)


def test_an_unreachable_hub_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # closed below: no server listens on this port
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    connections.hub_reachable.cache_clear()
    for _ in range(2):
        with pytest.raises(resources.MissingResource, match="cannot be loaded"):
            reasoning._similarity([("a", "b")], "no/such-model")
    assert connections.hub_reachable.cache_info().misses == 1
    assert not connections.hub_reachable()
    connections.hub_reachable.cache_clear()
