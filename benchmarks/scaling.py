"""How the cost of a sample grows: with the rows of the training data, which it should not, and with longer answers.

    python benchmarks/scaling.py                                   # 64 to 4,096 rows, answers 1 to 8 times as long
    python benchmarks/scaling.py --rows 64 1024 --repeats 5 --json scaling.json

Rows: the soft targets of all rows are written, then an epoch is trained on them: Lightning's loop with the datamodule
and the StudentModule of the chain, batches of 8, answers a quarter as long as Twitter-2015's. Every measurement has a
process of its own; few rows are gone over several times. Memory is the most that the process held for itself after any
shard or step; the shards that it maps are the page cache's, and counted on the disk. To reach: a sample of the most
rows takes at most 1.1 times the seconds of one of the fewest, and the process at most 1.1 times the memory.

Answers: as long as Twitter-2015's, then 2, 4 and 8 times as long. A step is loss and backward of the StudentModule on 2
samples with written soft targets. The model's own is the same rows of tokens as plain text without branches, padded as
ever, the logits of as many positions, their cross-entropy, and backward. To reach: step over model grows at most 1.1
times.

Posts are drawn, models tiny with 2,048 tokens. Seconds are the processor's, which other work on the machine disturbs
less than a clock's. About six minutes on an idle core. The exit status is 1 where a target is missed.
"""

import argparse
import json
import logging
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
import workload
from sides import memory
from workload import TASKS

from distill.models import tiny
from distill.models.backbone import Backbone
from distill.task.sample import Sample
from distill.training import soft_target_cache
from distill.training.batches import Batch, encode
from distill.training.datamodule import ReasoningDataModule
from distill.training.soft_target_cache import CachedTargets
from distill.training.soft_targets import SoftTargets
from distill.training.student import StudentModule, StudentSettings

VOCABULARY, IMAGE_SIZE, BATCH_SIZE = 2048, 56, 8
LEAST = 512
"""Samples over which a time is taken: fewer rows are gone over again."""
ALLOWED = 1.1


class Watch(L.Callback):
    """The seconds of training, and the most memory that the process held for itself."""

    seconds = 0.0
    held_bytes = 0

    def look(self, *_: object) -> None:
        self.held_bytes = max(self.held_bytes, memory("RssAnon"))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds -= time.process_time()

    def on_train_batch_end(self, *_: object) -> None:
        self.look()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds += time.process_time()


def models(folder: Path, batch_size: int) -> tuple[Backbone, SoftTargets]:
    """A student, and an assistant to ask."""
    words = tiny.load_tokenizer(folder / "tokenizer")
    options: dict[str, Any] = {"image_size": IMAGE_SIZE, "batch_size": batch_size, "vocabulary": VOCABULARY}
    student = workload.build("tiny-64", words, seed=1, **options)
    return student, SoftTargets(workload.build("tiny-128", words, seed=2, **options), student)


def write(
    folder: Path, samples: Sequence[Sample], student: Backbone, asked: SoftTargets, watch: Watch | None = None
) -> CachedTargets:
    key = soft_target_cache.keys(student, list(TASKS), "random weights", 0, 2.0)
    look = watch.look if watch else None
    soft_target_cache.write(
        folder, samples, key, lambda rows: encode(rows, student, TASKS, True), lambda: asked, progress=look
    )
    return CachedTargets(folder, key)


def train(samples: Sequence[Sample], student: Backbone, targets: CachedTargets, epochs: int, watch: Watch) -> None:
    module = StudentModule(student, StudentSettings(batch_size=BATCH_SIZE), targets)
    data = ReasoningDataModule(student, samples, samples[:1], TASKS, module.encode, batch_size=BATCH_SIZE)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, callbacks=[watch], logger=False, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, data)


def of_rows(shared: Path, rows: int, threads: int) -> dict[str, float]:
    """What one sample of so many takes; in a process of its own."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    student, asked = models(shared, BATCH_SIZE)
    times, watch = max(1, LEAST // rows), Watch()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few = workload.make_rows(folder, 16, student.processor.tokenizer, IMAGE_SIZE, 0.25)
        train(few, student, write(folder / "few", few, student, asked), 2, Watch())  # a warm-up
        samples = workload.make_rows(folder, rows, student.processor.tokenizer, IMAGE_SIZE, 0.25)
        begin = time.process_time()
        for turn in range(times):
            targets = write(folder / str(turn), samples, student, asked, watch)
        writing = time.process_time() - begin
        train(samples, student, targets, times, watch)
        return {
            "writing": writing / rows / times,
            "training": watch.seconds / rows / times,
            "held_bytes": watch.held_bytes,
            "disk_bytes": sum(path.stat().st_size for path in (folder / "0").iterdir()) / rows,
        }


def of_answers(shared: Path, lengths: Sequence[int], repeats: int, threads: int) -> list[dict[str, Any]]:
    """A row for each length: medians of the step and of the model's own, which take turns."""
    torch.set_num_threads(threads)
    student, asked = models(shared, 2)
    sides: list[tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]] = []
    found = []
    for length in lengths:
        folder = shared / f"answers-{length}"
        folder.mkdir()
        samples = workload.make_rows(folder, 2, student.processor.tokenizer, IMAGE_SIZE, length)
        module = StudentModule(student, StudentSettings(), write(folder / "targets", samples, student, asked))
        batch: Batch = module.encode(samples)
        sides.append((lambda m=module, b=batch: m.loss(b).total, lambda b=batch: own(student, b)))  # type: ignore[misc]
        found.append({"length": length, "tokens": batch.inputs["input_ids"].numel(), "answers": len(batch.tokens)})
    seconds: list[list[list[float]]] = [[[], []] for _ in lengths]
    for repeat in range(repeats + 1):
        for pair, taken in zip(sides, seconds, strict=True):
            for loss, into in zip(pair, taken, strict=True):
                student.model.zero_grad()
                begin = time.process_time()
                loss().backward()
                if repeat:
                    into.append(time.process_time() - begin)
    return [
        row | {"step": statistics.median(step), "model": statistics.median(model)}
        for row, (step, model) in zip(found, seconds, strict=True)
    ]


def own(student: Backbone, batch: Batch) -> torch.Tensor:
    """The model's own loss: plain text in place of branches, and the cross-entropy of as many positions."""
    plain = {name: value for name, value in batch.inputs.items() if name not in ("ends", "position_ids")}
    plain["attention_mask"] = (plain["input_ids"] != student.processor.tokenizer.pad_token_id).long()
    hidden = student.hidden_states(plain).flatten(0, 1)[batch.columns]
    return F.cross_entropy(hidden @ student.head.T, batch.tokens)


def measure_rows(shared: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of rows, medians of all but the bytes on the disk, which are always the same."""
    runs: dict[int, list[dict[str, float]]] = {rows: [] for rows in options.rows}
    for _ in range(options.repeats):
        for rows in options.rows:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                runs[rows].append(pool.submit(of_rows, shared, rows, options.threads).result())
    return [
        {"rows": rows} | {name: statistics.median(run[name] for run in made) for name in made[0]}
        for rows, made in runs.items()
    ]


def show_rows(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The table of the rows; how much seconds and memory grow from the first to the last."""
    first, last = rows[0], rows[-1]
    print("  rows  writing ms  training ms   ratio   held MB   ratio  disk KB a row")
    for row in rows:
        row["seconds"] = row["writing"] + row["training"]
        ratios = [row[name] / first[name] for name in ("seconds", "held_bytes")]
        print(f"{row['rows']:>6}{1e3 * row['writing']:>12.2f}{1e3 * row['training']:>13.2f}{ratios[0]:>8.2f}", end="")
        print(f"{row['held_bytes'] / 1e6:>10.0f}{ratios[1]:>8.2f}{row['disk_bytes'] / 1e3:>15.1f}")
    more = (last["held_bytes"] - first["held_bytes"]) / max(1, last["rows"] - first["rows"])
    print(f"memory: {more / 1e3:.1f} KB a row")
    return {"seconds a sample": ratios[0], "memory": ratios[1]}


def show_answers(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The table of the answers; how much step over model grows from the first to the last."""
    first = rows[0]
    print("\n length  tokens  answers  step ms  grown  model ms  grown  step / model")
    for row in rows:
        grown = [row[name] / first[name] for name in ("step", "model")]
        row["ratio"] = row["step"] / row["model"]
        print(
            f"{row['length']:>7}{row['tokens']:>8}{row['answers']:>9}{1e3 * row['step']:>9.1f}{grown[0]:>7.2f}", end=""
        )
        print(f"{1e3 * row['model']:>10.1f}{grown[1]:>7.2f}{row['ratio']:>14.2f}")
    return {"step over model": rows[-1]["ratio"] / first["ratio"]}


def main() -> int:
    parser = argparse.ArgumentParser(description="How the cost of a sample grows with rows and with longer answers.")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 512, 4096], help="(default: 64 512 4096)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 4, 8], help="of answers (default: 1 2 4 8)")
    parser.add_argument("--repeats", type=int, default=3, help="of every measurement (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="(default: 1)")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    begin, load = time.perf_counter(), os.getloadavg()[0]
    print(f"{platform.machine()}, {options.threads} thread(s), load {load:.1f}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as name:
        shared = Path(name)
        workload.train_tokenizer(VOCABULARY).save_pretrained(shared / "tokenizer")
        rows = measure_rows(shared, options)
        growth = show_rows(rows)
        answers = of_answers(shared, options.lengths, 3 * options.repeats, options.threads)
        growth |= show_answers(answers)
    for what, value in growth.items():
        reached = "reached" if value <= ALLOWED else "missed"
        print(f"{what}: grown {value:.2f} times; to reach: at most {ALLOWED}, {reached}")
    print(f"{time.perf_counter() - begin:.0f} s in all, load {os.getloadavg()[0]:.1f} at the end")
    if options.json:
        made = {"torch": torch.__version__, "load": load, "rows": rows, "answers": answers, "growth": growth}
        options.json.write_text(json.dumps(made, indent=2) + "\n")
    return int(max(growth.values()) > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
