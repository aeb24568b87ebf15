"""Benchmark of how the cost of a sample scales with the number of training rows and with the length of answers.

    python benchmarks/scaling.py                                   # 64 to 4,096 rows, answers 1 to 8 times as long
    python benchmarks/scaling.py --rows 64 1024 --repeats 5 --json scaling.json

Rows: the soft targets of all rows are written, then one epoch is trained on them with Lightning's loop, the chain's
datamodule and StudentModule, batches of 8, and answers a quarter as long as Twitter-2015's. Every measurement runs in a
fresh process; small row counts are repeated for several epochs. Memory is the maximum anonymous memory of the process
after any shard or step. Memory-mapped shards belong to the page cache and are counted as disk space. Targets: from the
fewest to the most rows, CPU seconds per sample and memory grow by a factor of at most 1.1.

Answers: as long as Twitter-2015's, and 2, 4 and 8 times as long. A step is loss and backward of StudentModule on 2
samples with written soft targets. The bare model is measured on the same rows of tokens as plain padded text without
branches: logits at as many positions, cross-entropy, and backward. Target: the ratio of step to bare model grows by a
factor of at most 1.1.

Posts are synthetic; the models are tiny, with 2,048 tokens. Time is CPU time, which depends less on other load than
wall-clock time. Takes about six minutes on an idle core. The exit status is 1 if a target is missed.
"""

import argparse
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
import workload
from measuring import memory_bytes, write_json
from processes import worker
from workload import TASKS

from distill.models import tiny
from distill.models.backbone import Backbone
from distill.task.sample import Sample
from distill.training import soft_target_cache
from distill.training.batches import Batch, encode
from distill.training.datamodule import ReasoningDataModule
from distill.training.soft_target_cache import CachedTargets
from distill.training.soft_targets import OnlineTargets
from distill.training.student import StudentModule, StudentSettings

VOCABULARY, IMAGE_SIZE, BATCH_SIZE = 2048, 56, 8
MIN_SAMPLES = 512
"""Minimum number of samples per time measurement: smaller row counts are repeated."""
MAX_GROWTH = 1.1


class Usage(L.Callback):
    """CPU seconds of training, and the maximum anonymous memory of the process in bytes."""

    seconds = 0.0
    memory = 0

    def sample_memory(self, *_: object) -> None:
        self.memory = max(self.memory, memory_bytes("RssAnon"))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds -= time.process_time()

    def on_train_batch_end(self, *_: object) -> None:
        self.sample_memory()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds += time.process_time()


def build_models(folder: Path, batch_size: int) -> tuple[Backbone, OnlineTargets]:
    """A student and the soft targets of an assistant; the tokenizer is read from `folder`."""
    tokenizer = tiny.load_tokenizer(folder / "tokenizer")
    options: dict[str, Any] = {"image_size": IMAGE_SIZE, "batch_size": batch_size, "vocabulary": VOCABULARY}
    student = workload.build_model("tiny-64", tokenizer, seed=1, **options)
    return student, OnlineTargets(workload.build_model("tiny-128", tokenizer, seed=2, **options), student)


def write_targets(
    folder: Path, samples: Sequence[Sample], student: Backbone, soft_targets: OnlineTargets, usage: Usage | None = None
) -> CachedTargets:
    key = soft_target_cache.key_function(student, list(TASKS), "random weights", 0, 2.0)
    soft_target_cache.write(
        folder, samples, key, lambda rows: encode(rows, student, TASKS, True), lambda: soft_targets,
        progress=usage.sample_memory if usage else None,
    )  # fmt: skip
    return CachedTargets(folder, key)


def train(samples: Sequence[Sample], student: Backbone, targets: CachedTargets, epochs: int, usage: Usage) -> None:
    module = StudentModule(student, StudentSettings(batch_size=BATCH_SIZE), targets)
    data = ReasoningDataModule(student, samples, samples[:1], TASKS, module.encode, batch_size=BATCH_SIZE)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, callbacks=[usage], logger=False, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, data)


def measure_row_count(shared: Path, rows: int, threads: int) -> dict[str, float]:
    """Cost per sample with this number of rows; called in a fresh process."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    student, soft_targets = build_models(shared, BATCH_SIZE)
    epochs, usage = max(1, MIN_SAMPLES // rows), Usage()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        warm_up = workload.synthetic_posts(folder, 16, student.processor.tokenizer, IMAGE_SIZE, 0.25)
        train(warm_up, student, write_targets(folder / "warm-up", warm_up, student, soft_targets), 2, Usage())
        samples = workload.synthetic_posts(folder, rows, student.processor.tokenizer, IMAGE_SIZE, 0.25)
        begin = time.process_time()
        for epoch in range(epochs):
            targets = write_targets(folder / str(epoch), samples, student, soft_targets, usage)
        writing = time.process_time() - begin
        train(samples, student, targets, epochs, usage)
        return {
            "writing": writing / rows / epochs,
            "training": usage.seconds / rows / epochs,
            "held_bytes": usage.memory,
            "disk_bytes": sum(path.stat().st_size for path in (folder / "0").iterdir()) / rows,
        }


def measure_answers(shared: Path, lengths: Sequence[int], repeats: int, threads: int) -> list[dict[str, Any]]:
    """One row per answer length: median CPU seconds of the step and of the bare model, measured in turns."""
    torch.set_num_threads(threads)
    student, soft_targets = build_models(shared, 2)
    losses: list[tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]] = []
    rows = []
    for length in lengths:
        folder = shared / f"answers-{length}"
        folder.mkdir()
        samples = workload.synthetic_posts(folder, 2, student.processor.tokenizer, IMAGE_SIZE, length)
        targets = write_targets(folder / "targets", samples, student, soft_targets)
        module = StudentModule(student, StudentSettings(), targets)
        batch: Batch = module.encode(samples)
        losses.append((lambda m=module, b=batch: m.loss(b).total, lambda b=batch: bare_loss(student, b)))  # type: ignore[misc]
        rows.append({"length": length, "tokens": batch.inputs["input_ids"].numel(), "answers": len(batch.tokens)})
    seconds: list[list[list[float]]] = [[[], []] for _ in lengths]
    for repeat in range(repeats + 1):
        for row_losses, row_seconds in zip(losses, seconds, strict=True):
            for loss, loss_seconds in zip(row_losses, row_seconds, strict=True):
                student.model.zero_grad()
                begin = time.process_time()
                loss().backward()
                if repeat:
                    loss_seconds.append(time.process_time() - begin)
    return [
        row | {"step": statistics.median(step), "model": statistics.median(model)}
        for row, (step, model) in zip(rows, seconds, strict=True)
    ]


def bare_loss(student: Backbone, batch: Batch) -> torch.Tensor:
    """The model's own loss on plain text without branches: cross-entropy at as many positions as the step's."""
    plain = {name: value for name, value in batch.inputs.items() if name not in ("ends", "position_ids")}
    plain["attention_mask"] = (plain["input_ids"] != student.processor.tokenizer.pad_token_id).long()
    hidden = student.hidden_states(plain).flatten(0, 1)[batch.positions]
    return F.cross_entropy(hidden @ student.head.T, batch.tokens)


def measure_rows(shared: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per row count, with medians over the repeats."""
    runs: dict[int, list[dict[str, float]]] = {rows: [] for rows in options.rows}
    for _ in range(options.repeats):
        for rows in options.rows:
            with worker() as process:
                runs[rows].append(process.submit(measure_row_count, shared, rows, options.threads).result())
    return [
        {"rows": rows} | {name: statistics.median(run[name] for run in measured) for name in measured[0]}
        for rows, measured in runs.items()
    ]


def show_rows(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Print the table of row counts. Returns the growth of seconds and memory from the first to the last row."""
    first, last = rows[0], rows[-1]
    print("  rows  writing ms  training ms   ratio  memory MB   ratio  disk KB per row")
    for row in rows:
        row["seconds"] = row["writing"] + row["training"]
        ratios = [row[name] / first[name] for name in ("seconds", "held_bytes")]
        print(f"{row['rows']:>6}{1e3 * row['writing']:>12.2f}{1e3 * row['training']:>13.2f}{ratios[0]:>8.2f}", end="")
        print(f"{row['held_bytes'] / 1e6:>11.0f}{ratios[1]:>8.2f}{row['disk_bytes'] / 1e3:>17.1f}")
    slope = (last["held_bytes"] - first["held_bytes"]) / max(1, last["rows"] - first["rows"])
    print(f"memory: {slope / 1e3:.1f} KB per row")
    return {"seconds per sample": ratios[0], "memory": ratios[1]}


def show_answers(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Print the table of answer lengths. Returns the growth of step / model from the first to the last row."""
    first = rows[0]
    print("\n length  tokens  answers  step ms  ratio  model ms  ratio  step / model")
    for row in rows:
        growth = [row[name] / first[name] for name in ("step", "model")]
        row["ratio"] = row["step"] / row["model"]
        print(f"{row['length']:>7}{row['tokens']:>8}{row['answers']:>9}", end="")
        print(f"{1e3 * row['step']:>9.1f}{growth[0]:>7.2f}{1e3 * row['model']:>10.1f}{growth[1]:>7.2f}", end="")
        print(f"{row['ratio']:>14.2f}")
    return {"step / model": rows[-1]["ratio"] / first["ratio"]}


def main() -> int:
    parser = argparse.ArgumentParser(description="Cost per sample by number of rows and by answer length.")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 512, 4096], help="(default: 64 512 4096)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 4, 8], help="of answers (default: 1 2 4 8)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of every measurement (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--json", type=Path, help="file for all results")
    options = parser.parse_args()
    begin, load = time.perf_counter(), os.getloadavg()[0]
    print(f"{platform.machine()}, {options.threads} thread(s), load {load:.1f}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as name:
        shared = Path(name)
        workload.train_tokenizer(VOCABULARY).save_pretrained(shared / "tokenizer")
        rows = measure_rows(shared, options)
        growth = show_rows(rows)
        answers = measure_answers(shared, options.lengths, 3 * options.repeats, options.threads)
        growth |= show_answers(answers)
    for name, value in growth.items():
        verdict = "reached" if value <= MAX_GROWTH else "missed"
        print(f"growth of {name}: {value:.2f} times; target: at most {MAX_GROWTH}, {verdict}")
    print(f"total: {time.perf_counter() - begin:.0f} s, load {os.getloadavg()[0]:.1f} at the end")
    results = {"torch": torch.__version__, "load": load, "rows": rows, "answers": answers, "growth": growth}
    write_json(options.json, results)
    return int(max(growth.values()) > MAX_GROWTH)


if __name__ == "__main__":
    sys.exit(main())
