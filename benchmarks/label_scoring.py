"""The README's figures of label scoring: one forward pass against `generate()` of the label and of the reasoning.

    python benchmarks/label_scoring.py                                   # a tiny model, trained here for a minute
    python benchmarks/label_scoring.py --batch-sizes 8 --repeats 9 --json label_scoring.json
    python benchmarks/label_scoring.py --config recipes/twitter15-cpu.yaml --data.root FOLDER  # the student of a run

Per batch size, with greedy generation and its key-value cache: the label from one pass, the label as the model writes
it (`"Prediction": positive`), the label as the last line of the whole reasoning, and label and reasoning together from
one reading of the prompt or from two. Medians over repeats in which all take turns. Below that, one pass in batches
against `generate()` for one post at a time, as it is usually called. The exit status is 1 where one pass and
generation give different labels on more than 1% of the posts, or one reading other answers than two.

At the same batch size the first ratio is 1 + (n - 1) · step / pass for a label of n tokens: below n, for a step that
reads one token from a cache costs no more than the pass that read the whole prompt. On tiny models, decoding pictures
and tokenising, which all sides do, take about half of the pass, and a step of `generate()` has an overhead of its own
that all posts of a batch share: it is nearly all of a step here, and the less the larger the batch.
"""

import argparse
import json
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

from distill.data.corpus import DataSettings, read_corpus
from distill.data.postcards import PostcardSettings
from distill.errors import SettingsError
from distill.evaluation.evaluate import read
from distill.models import tiny
from distill.models.backbone import Backbone, ModelSettings, create
from distill.models.local import Local
from distill.models.reasoner import Sampling
from distill.models.tiny import TinySettings
from distill.recipe import load, parser
from distill.stages.context import Context
from distill.task.labels import LabelSpace
from distill.task.prompts import CLASSIFY_PREFIX, render
from distill.task.sample import Sample
from distill.training.batches import encode

TARGETS = {"label, generated": 5.0, "reasoning, generated": 20.0}
AGREEMENT = 0.99
WRITTEN = Sampling(max_new_tokens=16)  # more than a label takes

Side = Callable[[], list[Any]]


def learner(folder: Path, steps: int, count: int, device: str) -> tuple[Backbone, list[Sample], int]:
    """A tiny Qwen2.5-VL that has learned both tasks from labelled postcards, postcards to ask it about, and how many
    tokens a rationale may have."""
    labels = LabelSpace()
    cards = PostcardSettings(labelled=900, unlabelled=0, validation=9, test=-(-count // 9) * 9)
    corpus = read_corpus(DataSettings(source="postcards", root=str(folder / "cards"), postcards=cards), labels)
    texts = [render("predict", post, labels) for post in corpus.train]
    words = tiny.train_tokenizer(texts + [str(post.rationale) for post in corpus.train], 768)
    words.save_pretrained(folder / "tokenizer")
    torch.manual_seed(1)
    size = TinySettings(hidden=64, layers=2, vision_hidden=32, vision_depth=1)
    backbone = create(ModelSettings(tiny=size, image_size=56), labels, folder / "tokenizer")
    model, draw = backbone.model.to(device), random.Random(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = encode(draw.sample(corpus.train, 16), backbone, {"reason": 1.0, "classify": 1.0}, packing=True)
        inputs = {name: value.to(device) for name, value in batch.inputs.items()}
        logits = backbone.hidden_states(inputs).flatten(0, 1)[batch.columns] @ backbone.head.T
        losses = torch.nn.functional.cross_entropy(logits, batch.tokens.to(device), reduction="none")
        optimizer.zero_grad()
        (losses * batch.shares.to(device)).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return backbone, corpus.test[:count], 128


def student(flags: list[str], count: int) -> tuple[Backbone, list[Sample], int]:
    """The same of a finished run: its student, and the test posts of its data."""
    recipe, _ = load(parser("run"), flags)
    context = Context(recipe, {})
    limit = recipe.evaluate.max_new_tokens if recipe.evaluate else 512
    return context.load("student"), context.corpus.test[:count], limit


def sides(reasoner: Local, samples: list[Sample], limit: int) -> dict[str, Side]:
    """What is timed, each a way of answering all samples."""
    labels, sampling = reasoner.backbone.labels, Sampling(max_new_tokens=limit)

    def two_readings() -> list[Any]:
        scores = reasoner.classify(samples)
        return [(index, scores.row(index), answer) for index, answer in reasoner.reason(samples, "reason", sampling)]

    return {
        "label, one pass": lambda: list(reasoner.classify(samples).probabilities),
        "label, generated": lambda: [
            *reasoner.chat([(render("classify", sample, labels), sample.images) for sample in samples], WRITTEN)
        ],
        "reasoning, generated": lambda: [answer for _, answer in reasoner.reason(samples, "reason", sampling)],
        "both, two readings": two_readings,
        "both, one reading": lambda: list(reasoner.classify_and_reason(samples, "reason", sampling)),
    }


def measure(reasoner: Local, samples: list[Sample], limit: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds a post of each side at one batch size, in turns: medians of the clock's and of the processor's."""
    chosen = sides(reasoner, samples, limit)
    answers = {name: side() for name, side in chosen.items()}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    for _ in range(repeats):
        for name, side in chosen.items():
            begin, spent = time.perf_counter(), time.process_time()
            side()
            taken[name].append((time.perf_counter() - begin, time.process_time() - spent))
    rows = []
    for name, times in taken.items():
        seconds, cpu = (statistics.median(column) / len(samples) for column in zip(*times, strict=True))
        written = [answer.completion_tokens for answer in answers[name] if hasattr(answer, "completion_tokens")]
        tokens = float(np.mean(written)) if written else None
        row = {"side": name, "posts": len(samples), "seconds": seconds, "cpu_seconds": cpu, "tokens": tokens}
        rows.append(row | {"all_seconds": [clock for clock, _ in times]})
    return rows


def compared(answers: dict[str, list[Any]], labels: LabelSpace) -> dict[str, float]:
    """How often the sides say the same: shares of the samples, and the largest difference of a probability."""
    one_pass = [labels.names[int(row.argmax())] for row in answers["label, one pass"]]
    written = [answer.text.removeprefix(CLASSIFY_PREFIX).strip() for answer in answers["label, generated"]]
    found = [read(answer.text, labels, finished=answer.finished) for answer in answers["reasoning, generated"]]
    reasoned = [rationale.prediction if rationale else None for rationale in found]
    one, two = answers["both, one reading"], answers["both, two readings"]
    together, apart = (np.concatenate([scores.probabilities for _, scores, _ in rows]) for rows in (one, two))

    def share(first: list[Any], second: list[Any]) -> float:
        return float(np.mean([a == b for a, b in zip(first, second, strict=True)]))

    return {
        "generated_label": share(one_pass, written),
        "reasoned_label": share(one_pass, reasoned),
        "same_rationale": share([answer.text for *_, answer in one], [answer.text for *_, answer in two]),
        "probability_difference": float(abs(together - apart).max()),
    }


def show(size: int, rows: list[dict[str, Any]]) -> None:
    """One batch size; ratios (of the clock, of the processor) are against one pass, of both questions to each other."""
    taken = {row["side"]: row for row in rows}
    for row in rows:
        name, target = row["side"], TARGETS.get(row["side"])
        base = taken["both, one reading" if "both" in name else "label, one pass"]
        ratio, cpu = (row[kind] / base[kind] for kind in ("seconds", "cpu_seconds"))
        judged = "" if target is None else f"{target:>5.0f}x {'yes' if ratio >= target else 'no'}"
        tokens = "-" if row["tokens"] is None else f"{row['tokens']:.1f}"
        print(f"{size:>5}  {name:<21}{1e3 * row['seconds']:>9.2f}{1 / row['seconds']:>9.1f}{tokens:>8}", end="")
        print(f"{ratio:>7.2f}x{cpu:>7.2f}x{judged}", flush=True)


def one_at_a_time(cases: list[dict[str, Any]]) -> dict[str, float]:
    """How much more one pass in the best of the batch sizes answers than `generate()` for one post at a time."""
    by_size = {case["batch_size"]: {row["side"]: row["seconds"] for row in case["rows"]} for case in cases}
    fastest = min(taken["label, one pass"] for taken in by_size.values())
    return {name: by_size[1][name] / fastest for name in TARGETS} if 1 in by_size else {}


def main() -> int:
    options = argparse.ArgumentParser(description="Label scoring against generation of the label and the reasoning.")
    options.add_argument("--config", help="recipe of a finished run, with flags of it: its student answers")
    options.add_argument("--steps", type=int, default=300, help="training steps of the model made here (default: 300)")
    options.add_argument(
        "--samples", type=int, default=198, help="posts to hold the answers together on (default: 198)"
    )
    options.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 64], help="(default: 1 8 64)")
    options.add_argument("--repeats", type=int, default=5, help="timed turns after the first (default: 5)")
    options.add_argument("--threads", type=int, default=1, help="torch's threads on a CPU (default: 1)")
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where (default: cpu)")
    options.add_argument("--json", type=Path, help="file for all figures")
    chosen, flags = options.parse_known_args()
    if flags and not chosen.config:
        options.error(f"without a recipe there is no {flags[0]}")
    torch.set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory() as folder:
        try:
            asked = (
                student(["--config", chosen.config, *flags], chosen.samples)
                if chosen.config
                else learner(Path(folder), chosen.steps, chosen.samples, chosen.device)
            )
        except SettingsError as error:
            print(error, file=sys.stderr)
            return 2
        return report(*asked, chosen)


def report(backbone: Backbone, samples: list[Sample], limit: int, chosen: argparse.Namespace) -> int:
    """All tables; a batch size is timed on a few batches, what is answered is compared on all samples."""
    cuda = chosen.device == "cuda"
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()} with {chosen.threads} thread(s)"
    source = chosen.config or "postcards"
    print(f"{device}; torch {torch.__version__}; {source}")
    print("batch  side                   ms/post  posts/s  tokens   ratio  by CPU  to reach", flush=True)
    reasoner, cases = Local(backbone, "student", chosen.device), []
    for size in chosen.batch_sizes:
        backbone.settings.batch_size = size
        rows = measure(reasoner, samples[: max(16, 4 * size)], limit, chosen.repeats)
        show(size, rows)
        cases.append({"batch_size": size, "rows": rows})
    alone = one_at_a_time(cases)
    for name, ratio in alone.items():
        target = TARGETS[name]
        print(f"{name} for one post at a time, against one pass in batches: {ratio:.1f}x, ", end="")
        print(f"{target:.0f}x {'yes' if ratio >= target else 'no'}")
    found = compared({name: side() for name, side in sides(reasoner, samples, limit).items()}, backbone.labels)
    written, reasoned = found["generated_label"], found["reasoned_label"]
    print(f"on {len(samples)} posts one pass gives the label that the model writes on {written:.1%} ", end="")
    print(f"(at least {AGREEMENT:.0%}), that it reasons to on {reasoned:.1%};")
    print(f"one reading and two give the same rationale on {found['same_rationale']:.1%}, ", end="")
    print(f"and probabilities within {found['probability_difference']:.0e}")
    if chosen.json:
        made = {"device": device, "torch": torch.__version__, "source": source, "agreement": found}
        chosen.json.write_text(json.dumps(made | {"cases": cases, "one_at_a_time": alone}, indent=2) + "\n")
    return int(min(found["generated_label"], found["same_rationale"]) < AGREEMENT)


if __name__ == "__main__":
    sys.exit(main())
