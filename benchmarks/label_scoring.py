"""Benchmark of label scoring: one forward pass against `generate()` of the label and of the reasoning.

    python benchmarks/label_scoring.py                                   # a tiny model, trained here for a minute
    python benchmarks/label_scoring.py --batch-sizes 8 --repeats 9 --json label_scoring.json
    python benchmarks/label_scoring.py --config recipes/twitter15-cpu.yaml --data.root FOLDER  # the student of a run

Methods, per batch size, with greedy decoding and a key-value cache: the label scored in one forward pass; the label
generated (`"Prediction": positive`); the label as the last line of the generated reasoning; label and reasoning
together, with the prompt processed once or twice. Results are medians over repeats in which the methods take turns.
A second comparison is one pass in batches against `generate()` for one post at a time, as it is usually called. The
exit status is 1 if one pass and generation give different labels on more than 1% of the posts, or if the answers with
one reading of the prompt differ from those with two.

At equal batch sizes the first ratio is 1 + (n - 1) · step / pass for a label of n tokens. It is below n, because a step
that reads one token from a cache costs no more than the pass over the whole prompt. On tiny models, image decoding and
tokenization, which all methods need, take about half of the pass. A step of `generate()` has a fixed overhead that all
posts of a batch share. On these models the overhead is most of a step; its cost per post falls with the batch size.
"""

import argparse
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import write_json

from distill.data.corpus import DataSettings, read_corpus
from distill.data.postcards import PostcardSettings
from distill.errors import SettingsError
from distill.evaluation.evaluate import parse_or_none
from distill.models import tiny
from distill.models.backbone import Backbone, ModelSettings, create
from distill.models.local import Local
from distill.models.reasoner import Sampling
from distill.models.tiny import TinySettings
from distill.recipe import load, parser
from distill.stages.context import Context
from distill.task.labels import LabelSpace
from distill.task.prompts import render
from distill.task.sample import Sample
from distill.training.batches import encode

PREFIX = '"Prediction":'

TARGETS = {"label, generated": 5.0, "reasoning, generated": 20.0}
AGREEMENT = 0.99
LABEL_SAMPLING = Sampling(max_new_tokens=16)  # more than a label takes

Method = Callable[[], list[Any]]


def train_model(folder: Path, steps: int, count: int, device: str) -> tuple[Backbone, list[Sample], int]:
    """Train a tiny Qwen2.5-VL on labelled postcards for both tasks.

    Returns the model, test samples, and the token limit of a rationale.
    """
    labels = LabelSpace()
    cards = PostcardSettings(labelled=900, unlabelled=0, validation=9, test=-(-count // 9) * 9)
    corpus = read_corpus(DataSettings(source="postcards", root=str(folder / "cards"), postcards=cards), labels)
    texts = [render("predict", post, labels) for post in corpus.train]
    tokenizer = tiny.train_tokenizer(texts + [str(post.rationale) for post in corpus.train], 768)
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(1)
    size = TinySettings(hidden=64, layers=2, vision_hidden=32, vision_depth=1)
    backbone = create(ModelSettings(tiny=size, image_size=56), labels, folder / "tokenizer")
    model, generator = backbone.model.to(device), random.Random(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = encode(generator.sample(corpus.train, 16), backbone, {"reason": 1.0, "classify": 1.0}, packing=True)
        inputs = {name: value.to(device) for name, value in batch.inputs.items()}
        logits = backbone.hidden_states(inputs).flatten(0, 1)[batch.positions] @ backbone.head.T
        losses = torch.nn.functional.cross_entropy(logits, batch.tokens.to(device), reduction="none")
        optimizer.zero_grad()
        (losses * batch.loss_weights.to(device)).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return backbone, corpus.test[:count], 128


def load_student(flags: list[str], count: int) -> tuple[Backbone, list[Sample], int]:
    """Load the student of a finished run. Returns the same as `train_model`."""
    recipe, _ = load(parser("run"), flags)
    context = Context(recipe, {})
    limit = recipe.evaluate.max_new_tokens if recipe.evaluate else 512
    return context.load("student"), context.corpus.test[:count], limit


def methods(reasoner: Local, samples: list[Sample], limit: int) -> dict[str, Method]:
    """The timed methods; each returns its answers to all samples."""
    labels, sampling = reasoner.backbone.labels, Sampling(max_new_tokens=limit)

    def two_readings() -> list[Any]:
        scores = reasoner.classify(samples)
        return [(index, scores.row(index), answer) for index, answer in reasoner.reason(samples, "reason", sampling)]

    return {
        "label, one pass": lambda: list(reasoner.classify(samples).probabilities),
        "label, generated": lambda: [
            *reasoner.chat([(render("classify", sample, labels), sample.media) for sample in samples], LABEL_SAMPLING)
        ],
        "reasoning, generated": lambda: [answer for _, answer in reasoner.reason(samples, "reason", sampling)],
        "both, two readings": two_readings,
        "both, one reading": lambda: list(reasoner.classify_and_reason(samples, "reason", sampling)),
    }


def measure(reasoner: Local, samples: list[Sample], limit: int, repeats: int) -> list[dict[str, Any]]:
    """Median wall-clock and CPU seconds per post of each method at one batch size; the methods take turns."""
    timed = methods(reasoner, samples, limit)
    answers = {name: method() for name, method in timed.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in timed}
    for _ in range(repeats):
        for name, method in timed.items():
            begin, cpu = time.perf_counter(), time.process_time()
            method()
            times[name].append((time.perf_counter() - begin, time.process_time() - cpu))
    rows = []
    for name, method_times in times.items():
        seconds, cpu = (statistics.median(column) / len(samples) for column in zip(*method_times, strict=True))
        counts = [answer.completion_tokens for answer in answers[name] if hasattr(answer, "completion_tokens")]
        tokens = float(np.mean(counts)) if counts else None
        row = {"method": name, "posts": len(samples), "seconds": seconds, "cpu_seconds": cpu, "tokens": tokens}
        rows.append(row | {"all_seconds": [wall for wall, _ in method_times]})
    return rows


def agreement(answers: dict[str, list[Any]], labels: LabelSpace) -> dict[str, float]:
    """Fractions of the samples on which methods agree, and the largest difference of a probability."""
    one_pass = [labels.names[int(row.argmax())] for row in answers["label, one pass"]]
    generated = [answer.text.removeprefix(PREFIX).strip() for answer in answers["label, generated"]]
    rationales = [
        parse_or_none(answer.text, labels, finished=answer.finished) for answer in answers["reasoning, generated"]
    ]
    reasoned = [rationale.prediction if rationale else None for rationale in rationales]
    one, two = answers["both, one reading"], answers["both, two readings"]
    probabilities = [np.concatenate([scores.probabilities for _, scores, _ in rows]) for rows in (one, two)]

    def equal(first: list[Any], second: list[Any]) -> float:
        return float(np.mean([a == b for a, b in zip(first, second, strict=True)]))

    return {
        "generated_label": equal(one_pass, generated),
        "reasoned_label": equal(one_pass, reasoned),
        "same_rationale": equal([answer.text for *_, answer in one], [answer.text for *_, answer in two]),
        "probability_difference": float(abs(probabilities[0] - probabilities[1]).max()),
    }


def show(size: int, rows: list[dict[str, Any]]) -> None:
    """Print one batch size. Ratios are relative to one pass, or to one reading for the methods that do both tasks."""
    by_method = {row["method"]: row for row in rows}
    for row in rows:
        name, target = row["method"], TARGETS.get(row["method"])
        base = by_method["both, one reading" if "both" in name else "label, one pass"]
        ratio, cpu = (row[kind] / base[kind] for kind in ("seconds", "cpu_seconds"))
        verdict = "" if target is None else f"{target:>5.0f}x {'yes' if ratio >= target else 'no'}"
        tokens = "-" if row["tokens"] is None else f"{row['tokens']:.1f}"
        print(f"{size:>5}  {name:<21}{1e3 * row['seconds']:>9.2f}{1 / row['seconds']:>9.1f}{tokens:>8}", end="")
        print(f"{ratio:>7.2f}x{cpu:>7.2f}x{verdict}", flush=True)


def one_at_a_time(cases: list[dict[str, Any]]) -> dict[str, float]:
    """Speedup of one pass at the fastest batch size over `generate()` for one post at a time."""
    by_size = {case["batch_size"]: {row["method"]: row["seconds"] for row in case["rows"]} for case in cases}
    fastest = min(seconds["label, one pass"] for seconds in by_size.values())
    return {name: by_size[1][name] / fastest for name in TARGETS} if 1 in by_size else {}


def main() -> int:
    options = argparse.ArgumentParser(description="Label scoring against generation of the label and the reasoning.")
    options.add_argument("--config", help="recipe of a finished run, optionally with overrides; uses its student")
    options.add_argument("--steps", type=int, default=300, help="training steps of the tiny model (default: 300)")
    options.add_argument("--samples", type=int, default=198, help="posts for the comparison of answers (default: 198)")
    options.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 64], help="(default: 1 8 64)")
    options.add_argument("--repeats", type=int, default=5, help="timed runs after the first (default: 5)")
    options.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device (default: cpu)")
    options.add_argument("--json", type=Path, help="file for all results")
    chosen, flags = options.parse_known_args()
    if flags and not chosen.config:
        options.error(f"{flags[0]} requires --config")
    torch.set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = (
                load_student(["--config", chosen.config, *flags], chosen.samples)
                if chosen.config
                else train_model(Path(folder), chosen.steps, chosen.samples, chosen.device)
            )
        except SettingsError as error:
            print(error, file=sys.stderr)
            return 2
        return report(*model, chosen)


def report(backbone: Backbone, samples: list[Sample], limit: int, chosen: argparse.Namespace) -> int:
    """Print all tables. A batch size is timed on a few batches; answers are compared on all samples."""
    cuda = chosen.device == "cuda"
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()} with {chosen.threads} thread(s)"
    source = chosen.config or "postcards"
    print(f"{device}; torch {torch.__version__}; {source}")
    print("batch  method                 ms/post  posts/s  tokens   ratio  by CPU  target", flush=True)
    reasoner, cases = Local(backbone, "student", chosen.device), []
    for size in chosen.batch_sizes:
        backbone.settings.batch_size = size
        rows = measure(reasoner, samples[: max(16, 4 * size)], limit, chosen.repeats)
        show(size, rows)
        cases.append({"batch_size": size, "rows": rows})
    alone = one_at_a_time(cases)
    for name, ratio in alone.items():
        target = TARGETS[name]
        verdict = "reached" if ratio >= target else "missed"
        print(f"one pass in batches against {name} one post at a time: {ratio:.1f}x; target: {target:.0f}x, {verdict}")
    found = agreement({name: method() for name, method in methods(reasoner, samples, limit).items()}, backbone.labels)
    generated, reasoned = found["generated_label"], found["reasoned_label"]
    print(f"{len(samples)} posts: one pass agrees with the generated label on {generated:.1%} ", end="")
    print(f"(target: at least {AGREEMENT:.0%}), and with the label of the reasoning on {reasoned:.1%};")
    print(f"one reading and two readings give the same rationale on {found['same_rationale']:.1%} ", end="")
    print(f"and probabilities that differ by at most {found['probability_difference']:.0e}")
    results = {"device": device, "torch": torch.__version__, "source": source, "agreement": found}
    write_json(chosen.json, results | {"cases": cases, "one_at_a_time": alone})
    return int(min(found["generated_label"], found["same_rationale"]) < AGREEMENT)


if __name__ == "__main__":
    sys.exit(main())
