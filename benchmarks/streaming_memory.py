"""Memory and rate of data that is not in memory, at 10 thousand, 100 thousand and 1 million rows.

    python benchmarks/streaming_memory.py [--rows 10000 100000 1000000] [--steps index ...] [--folder DIR]
        [--json FILE]

Writes shards of posts with recorded rationales (JSONL, 20,000 rows a shard) and gives each step a process of its own:

- index: reads and checks the shards and writes the index of the training posts;
- annotate: reads the posts from the index and writes `rationales.jsonl` from the recorded rationales;
- train: an epoch of the training's loader over `rationales.jsonl`, in batches of 32, without a model. Then the loader
  is stopped after half of its batches and a new one continues: the ids of both together must be those of the whole
  epoch, in the same order.

Prints the peak resident memory and the rows per second of each. The target is memory that does not depend on the number
of rows: at most 10% more at the largest number than at the smallest.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from measuring import memory_bytes

STEPS = ("index", "annotate", "train")
SHARD = 20_000
BATCH = 32


def write_shards(folder: Path, rows: int) -> None:
    """Posts of 100 to 400 characters with rationales of about 300."""
    from distill.task.rationale import FIELDS, Rationale, render

    names = ("negative", "neutral", "positive")
    folder.mkdir(parents=True)
    for shard, first in enumerate(range(0, rows, SHARD)):
        with (folder / f"train-{shard:05d}.jsonl").open("w") as file:
            for n in range(first, min(first + SHARD, rows)):
                label = names[n % 3]
                fields = tuple(f"Sentence {n} of the reasoning about the post." for _ in list(FIELDS)[1:])
                text = f"post {n}: " + "a few words " * (8 + n * 37 % 25)
                row = {"id": f"post-{n}", "text": text, "label": label}
                file.write(json.dumps(row | {"rationale": render(Rationale(fields, label))}) + "\n")
    for split in ("validation", "test"):
        row = {"id": split, "text": split, "label": "neutral"}
        (folder / f"{split}.jsonl").write_text(json.dumps(row) + "\n")


def corpus(folder: Path) -> Any:
    from distill.data.corpus import read_corpus
    from distill.data.source import DataSettings
    from distill.data.stream import StreamSettings
    from distill.task.labels import LabelSpace

    settings = DataSettings(
        source="stream", root=str(folder / "data"), train=["train-*.jsonl"], validation=["validation.jsonl"],
        test=["test.jsonl"], stream=StreamSettings(cache=str(folder / "cache")),
    )  # fmt: skip
    return read_corpus(settings, LabelSpace())


def annotate(folder: Path) -> int:
    from dataclasses import replace

    from distill.annotation.annotate import AnnotateSettings, AnnotationCounts, Kept
    from distill.annotation.annotate import annotate as run
    from distill.annotation.ledger import Ledger
    from distill.data import jsonl
    from distill.task.labels import LabelSpace
    from distill.task.rationale import render

    found = corpus(folder)
    with Ledger(folder / "ledger.jsonl") as ledger:
        settings = AnnotateSettings(recorded=True)
        results = run(found.train, LabelSpace(), None, settings, ledger, counts := AnnotationCounts())
        kept = (item for item in results if isinstance(item, Kept))
        rows = (jsonl.to_row(replace(k.sample, rationale=render(k.rationale)), found.root) for k in kept)
        jsonl.write_rows(folder / "rationales.jsonl", rows)
    return counts.n


def train(folder: Path) -> tuple[int, float]:
    from distill.annotation.reasoning_data import stored_rationales
    from distill.task.labels import LabelSpace
    from distill.training.datamodule import ReasoningDataModule

    labels = LabelSpace()
    paths = [path for path in [folder / "rationales.jsonl"] if path.exists()]
    paths = paths or sorted((folder / "data").glob("train-*.jsonl"))  # without the step annotate
    rows = stored_rationales(paths, folder / "data", labels)
    model: Any = SimpleNamespace(labels=labels, encoder=SimpleNamespace(media=SimpleNamespace(takes=lambda name: True)))
    data = ReasoningDataModule(model, rows, [], ["reason", "classify"], list, batch_size=BATCH)

    whole, parts = hashlib.sha256(), hashlib.sha256()
    began = time.perf_counter()
    for batch in data.train_dataloader():
        whole.update(" ".join(post.id for post in batch).encode())
    seconds = time.perf_counter() - began
    first = data.train_dataloader()
    batches = iter(first)
    for _ in range(len(first) // 2):
        parts.update(" ".join(post.id for post in next(batches)).encode())
    place = first.state_dict()
    second = data.train_dataloader()
    second.load_state_dict(place)
    for batch in second:
        parts.update(" ".join(post.id for post in batch).encode())
    assert whole.digest() == parts.digest(), "the resumed epoch is another one"
    return len(rows), seconds


def measure(step: str, folder: Path) -> dict[str, Any]:
    began = time.perf_counter()
    if step == "train":
        rows, seconds = train(folder)
    else:
        rows = len(corpus(folder).train) if step == "index" else annotate(folder)
        seconds = time.perf_counter() - began
    return {"rows": rows, "seconds": seconds, "peak_mb": memory_bytes("VmHWM") / 1e6}


def main() -> int:
    parser = argparse.ArgumentParser(description="Memory and rate of data that is not in memory.")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="for the data; default: a temporary folder")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=STEPS)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(measure(options.step, options.folder)))
        return 0
    results: list[dict[str, Any]] = []
    print(f"{'step':<10} {'rows':>9} {'peak MB':>8} {'rows/s':>8} {'seconds':>8}")
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            folder = Path(scratch)
            write_shards(folder / "data", rows)
            for step in options.steps:
                command = [sys.executable, __file__, "--step", step, "--folder", str(folder)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                results.append({"step": step, "of": rows} | found)
                rate = found["rows"] / found["seconds"]
                print(
                    f"{step:<10} {rows:>9,} {found['peak_mb']:>8.0f} {rate:>8,.0f} {found['seconds']:>8.1f}", flush=True
                )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))
    ratios = {}
    for step in options.steps:
        peaks = [row["peak_mb"] for row in results if row["step"] == step]
        ratios[step] = peaks[-1] / peaks[0]
        print(
            f"{step}: {ratios[step]:.2f} times the memory at {options.rows[-1]:,} rows of that at {options.rows[0]:,}"
        )
    return int(max(ratios.values()) > 1.1)


if __name__ == "__main__":
    sys.exit(main())
