"""Benchmark of training on clips: how much of a step is the decoding of videos and sounds.

    python benchmarks/clip_step.py
    python benchmarks/clip_step.py --steps 4 --rounds 2 --workers 0 --json clip_step.json

Two cases, both with random weights of Qwen2.5-Omni's thinker and batches of 8 posts:

- small: the built-in clips, 2 s of 56 x 56 pixels, 4 frames of 56 pixels; the teacher of recipes/clips.yaml;
- real size: 4 s of 640 x 360 pixels at 25 frames a second, 8 frames of 224 pixels, 4 layers of 256.
  A model in use is 1000 times as large, so that its share is smaller.

A step is what training does: the next batch of the loader, whose worker processes decode, make spectrograms and encode
the text; then loss, backward and AdamW. Rounds over the same batches take turns: in "files" all clips are decoded, in
"cache" none. The share of decoding is the time that "files" takes longer, divided by its time: by the clock, and by the
CPU time of all processes. Also shown: the share of a step in which training waits for its batch (median), clips a
second, and the resident memory of all processes.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from clip_decoding import write_clip
from measuring import write_json

from distill.data.clips import ClipReader, VideoSettings
from distill.data.clips_corpus import ClipsSettings, corpus
from distill.models import tiny
from distill.models.backbone import create
from distill.models.pretrained import ModelSettings
from distill.models.tiny import TinySettings
from distill.task.labels import LabelSpace, Scale
from distill.task.sample import Sample
from distill.training.assistant import AssistantModule, TrainSettings
from distill.training.datamodule import ReasoningDataModule

BATCH = 8
SMALL = TinySettings(hidden=128, layers=2, vision_hidden=64, vision_depth=1, audio_hidden=64, audio_depth=1)
REAL = TinySettings(hidden=256, layers=4, vision_hidden=128, vision_depth=2, audio_hidden=128, audio_depth=2)
CASES = {"small": (SMALL, 56, 4), "real size": (REAL, 224, 8)}
"""Model, side of a frame in pixels, frames of a video."""


class Step(NamedTuple):
    """One training step: seconds, of these the seconds until its batch was there, and CPU seconds of all processes."""

    seconds: float
    waiting: float
    cpu_seconds: float
    resident_bytes: int


def posts(case: str, folder: Path, count: int) -> list[Sample]:
    """Labelled posts of a case whose clips lie in the folder."""
    if case == "small":
        corpus(ClipsSettings(labelled=count, unlabelled=0, validation=27, test=27)).generate(folder / "built-in")
        paths = sorted((folder / "built-in" / "clips").glob("train-*.mp4"))
    else:
        paths = [folder / f"{number}.mp4" for number in range(count)]
        for number, path in enumerate(paths):
            write_clip(path, 640, 360, 4, number)
    return [
        Sample(str(number), "It was fine.", label=f"{number % 7 - 3}", video=path, audio=path)
        for number, path in enumerate(paths)
    ]


class Training:
    """A model in training on posts, with the clips of `reader`."""

    def __init__(self, case: str, samples: Sequence[Sample], reader: ClipReader, tokenizer: Path, workers: int) -> None:
        size, pixels, _ = CASES[case]
        torch.manual_seed(0)
        labels = LabelSpace.from_scale(Scale())
        model = create(ModelSettings(tiny=size, image_size=pixels), labels, tokenizer, train=True, clips=reader)
        settings = TrainSettings(tasks={"classify": 1.0}, batch_size=BATCH)
        self.module = AssistantModule(model, settings)
        self.optimizer = torch.optim.AdamW(model.model.parameters(), lr=1e-4)
        self.data = ReasoningDataModule(
            model, samples, [], ("classify",), self.module.encode, batch_size=BATCH, workers=workers
        )

    def epoch(self) -> list[Step]:
        """Train on all posts. The first step also waits for the workers to start."""
        steps = []
        batches = iter(self.data.train_dataloader())
        cpu, begin = _cpu_seconds(), time.perf_counter()
        for batch in batches:
            waited = time.perf_counter() - begin
            self.module.loss(batch).total.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            now = _cpu_seconds()
            steps.append(Step(time.perf_counter() - begin, waited, now - cpu, _resident_bytes()))
            cpu, begin = _cpu_seconds(), time.perf_counter()
        return steps


def _processes() -> list[psutil.Process]:
    here = psutil.Process()
    return [here, *here.children(recursive=True)]


def _cpu_seconds() -> float:
    return sum(sum(process.cpu_times()[:2]) for process in _processes())


def _resident_bytes() -> int:
    return sum(process.memory_info().rss for process in _processes())


def measure(case: str, steps: int, rounds: int, workers: int) -> dict[str, list[list[Step]]]:
    """The steps of each round, by where the clips come from."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder, "tokenizer")
        words = [f"It was fine. {value}" for value in range(-3, 4)]
        tiny.train_tokenizer(words, 400, audio=True).save_pretrained(tokenizer)
        samples = posts(case, Path(folder), BATCH * steps)
        sampling = {"frames": CASES[case][2]}
        readers = {
            "files": ClipReader(VideoSettings(**sampling, cache_mb=0)),
            "cache": ClipReader(VideoSettings(**sampling, cache_mb=8000)),
        }
        for sample in samples:  # the workers are forks, which have the cache of this process
            readers["cache"].frames(sample.video)  # type: ignore[arg-type]
            readers["cache"].sound(sample.audio)  # type: ignore[arg-type]
        runs = {name: Training(case, samples, reader, tokenizer, workers) for name, reader in readers.items()}
        for run in runs.values():
            run.epoch()
        found: dict[str, list[list[Step]]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                found[name].append(run.epoch())
        return found


def share(found: dict[str, list[list[Step]]], field: str) -> float:
    """Median over the rounds of what "files" takes more than "cache", of what it takes."""
    pairs = zip(found["files"], found["cache"], strict=True)
    sums = [[sum(getattr(step, field) for step in steps) for steps in pair] for pair in pairs]
    return statistics.median((files - cache) / files for files, cache in sums)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=16, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="processes that prepare batches")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print("| case | s a step, files | s a step, cache | share of decoding | of CPU time | waiting | clips/s | MB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    results: dict[str, Any] = {}
    for case in args.cases:
        found = measure(case, args.steps, args.rounds, args.workers)
        files = [step for steps in found["files"] for step in steps]
        seconds = {
            name: statistics.median(step.seconds for steps in rounds for step in steps)
            for name, rounds in found.items()
        }
        waiting = statistics.median(step.waiting / step.seconds for step in files)
        rate = BATCH * len(files) / sum(step.seconds for step in files)
        memory = max(step.resident_bytes for step in files) / 1e6
        cells = [f"{seconds['files']:.3g}", f"{seconds['cache']:.3g}", f"{share(found, 'seconds'):.1%}"]
        cells += [f"{share(found, 'cpu_seconds'):.1%}", f"{waiting:.1%}", f"{rate:.3g}", f"{memory:,.0f}"]
        print(f"| {case} | {' | '.join(cells)} |", flush=True)
        results[case] = {
            name: [[step._asdict() for step in steps] for steps in rounds] for name, rounds in found.items()
        }
    write_json(args.json, results)


if __name__ == "__main__":
    main()
