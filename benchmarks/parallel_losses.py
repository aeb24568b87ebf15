"""Losses of 20 training steps in two processes beside those of one process.

    python benchmarks/parallel_losses.py
    python benchmarks/parallel_losses.py --json parallel_losses.json

The posts are postcards; the models are tiny ones with random weights, of real classes, in float32. Both sides take 8
posts a step: one process 8, two processes 4 each. The two are started by torchrun and talk by gloo on the CPU, with
DDP and with FSDP2. All weights are trained, or LoRA on a frozen base; a student learns from an assistant that runs
along (online) or from its cached soft targets; "mixed" trains all weights on posts of which every other one has no
image, in two accumulated batches a step. "1 to 2" trains an epoch of 10 steps in one process and goes on from its
checkpoint in two, "2 to 1" the other way round; "2 to 2" goes on within an epoch, between two
accumulated batches.

Also printed: the largest difference from one process, and the values that each process holds of the weights and of the
optimizer state.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch

from distill.data.corpus import Corpus, DataSettings, read_corpus
from distill.data.postcards import PostcardSettings
from distill.files import read_json, write_json
from distill.models import tiny
from distill.models.backbone import Backbone, LoraSettings, ModelSettings, create
from distill.models.tiny import TinySettings
from distill.task.labels import LabelSpace
from distill.task.prompts import Template, render
from distill.training import processes, soft_target_cache
from distill.training.assistant import AssistantModule, TrainSettings
from distill.training.batches import encode
from distill.training.datamodule import ReasoningDataModule
from distill.training.fit import fit
from distill.training.soft_target_cache import CachedTargets
from distill.training.soft_targets import OnlineTargets
from distill.training.student import StudentModule, StudentSettings

LABELS = LabelSpace()
TASKS: dict[Template, float] = {"reason": 1.0, "classify": 1.0}
POSTS, EPOCHS, STEP = 80, 2, 8
"""Training posts, epochs, and posts of a step: 20 steps."""
WITHIN = " within an epoch"
"""Ends the name of a copy of the checkpoints as they were after BATCHES batches."""
BATCHES = 5


class Run(NamedTuple):
    """One training: its name, the strategy, what it trains, and how many epochs.

    Attributes:
        resumes: the name of the run that it goes on after, in the same folder.
    """

    name: str
    strategy: str
    kind: Literal["full", "lora", "online", "cached", "mixed"] = "full"
    epochs: int = EPOCHS
    resumes: str | None = None


KINDS: tuple[Any, ...] = ("full", "lora", "online", "cached", "mixed")
FIRST = [Run(f"one {kind}", "auto", kind) for kind in KINDS]
FIRST += [Run(f"one epoch in one {kind}", "auto", kind, 1) for kind in KINDS[:2]]
SECOND = [Run(f"{strategy} {kind}", strategy, kind) for strategy in ("ddp", "fsdp2") for kind in KINDS]
SECOND += [Run(f"1 to 2 {kind}", "fsdp2", kind, EPOCHS, f"one epoch in one {kind}") for kind in KINDS[:2]]
SECOND += [Run(f"one epoch in two {kind}", "fsdp2", kind, 1) for kind in KINDS[:2]]
SECOND += [Run(f"2 to 2 {name} mixed", name, "mixed", EPOCHS, f"{name} mixed{WITHIN}") for name in ("ddp", "fsdp2")]
THIRD = [Run(f"2 to 1 {kind}", "auto", kind, EPOCHS, f"one epoch in two {kind}") for kind in KINDS[:2]]
PARTS = {"first": (FIRST, 1), "second": (SECOND, 2), "third": (THIRD, 1)}
"""Runs that one command trains, one after the other, and its processes."""


def corpus(folder: Path) -> Corpus:
    cards = PostcardSettings(labelled=POSTS + 10, unlabelled=9, validation=18, test=9)
    return read_corpus(DataSettings(source="postcards", root=str(folder / "data"), postcards=cards), LABELS)


def settings(folder: Path, kind: str, processes: int) -> StudentSettings:
    lora = LoraSettings(r=4, dropout=0.0) if kind == "lora" else None
    model = ModelSettings(str(folder / "base"), lora=lora, image_size=56, batch_size=STEP)
    return StudentSettings(model, batch_size=STEP // processes // accumulated(kind), learning_rate=3e-3)


def accumulated(kind: str) -> int:
    """Batches of a step."""
    return 2 if kind == "mixed" else 1


def prepare(folder: Path) -> None:
    """Write the posts, a tokenizer, a base model, an assistant and its soft targets."""
    posts = corpus(folder)
    texts = [text for post in posts.train for text in (render("predict", post, LABELS), post.rationale) if text]
    tiny.train_tokenizer(texts, 768).save_pretrained(folder / "tokenizer")
    for seed, (name, hidden) in enumerate({"base": 64, "assistant": 128}.items()):
        L.seed_everything(seed, verbose=False)
        size = TinySettings(hidden=hidden, layers=2, vision_hidden=32, vision_depth=1)
        create(ModelSettings(tiny=size, image_size=56), LABELS, folder / "tokenizer").save(folder / name)
    student = _backbone(folder, settings(folder, "cached", 1).model)

    def rows(samples: Sequence[Any]) -> Any:
        return encode(samples, student, TASKS, True)

    soft_target_cache.write(
        folder / "soft", posts.train[:POSTS], _key(student), rows, lambda: _assistant(folder, student)
    )


def _backbone(folder: Path, model: ModelSettings) -> Backbone:
    return create(model, LABELS, folder / "tokenizer")


def _assistant(folder: Path, student: Backbone) -> OnlineTargets:
    model = ModelSettings(str(folder / "assistant"), image_size=56)
    return OnlineTargets(_backbone(folder, model), student)


def _key(student: Backbone) -> Any:
    return soft_target_cache.key_function(student, list(TASKS), "assistant", 0, 2.0)


def train(folder: Path, run: Run, processes: int) -> None:
    """Train and write `NAME.json`: the losses, and what this process holds; the main process saves the model, too."""
    L.seed_everything(0, verbose=False)
    options = settings(folder, run.kind, processes)
    backbone = _backbone(folder, options.model)
    module: Any
    if run.kind == "online":
        module = StudentModule(backbone, options, _assistant(folder, backbone))
    elif run.kind == "cached":
        module = StudentModule(backbone, options, CachedTargets(folder / "soft", _key(backbone)))
    else:
        plain = {name: getattr(options, name) for name in ("model", "batch_size", "learning_rate")}
        module = AssistantModule(backbone, TrainSettings(**plain))
    losses: list[float] = []  # of each batch
    held: dict[str, int] = {}
    place = folder / "runs" / (run.resumes or run.name)

    def after_step(*_: Any) -> None:
        losses.append(float(module.trainer.callback_metrics["train/loss"]))
        state = module.trainer.optimizers[0].state.values()
        if run.kind == "mixed" and len(losses) == BATCHES + 1 and module.trainer.is_global_zero:
            shutil.copytree(place / "checkpoints", place.with_name(run.name + WITHIN) / "checkpoints")
        held["weights"] = sum(map(_values, module.parameters()))
        held["optimizer state"] = sum(_values(value) for values in state for value in values.values())

    module.on_train_batch_end = after_step
    posts = corpus(folder)
    rows = posts.train[:POSTS]
    if run.kind == "mixed":
        rows = [replace(row, images=()) if n % 2 else row for n, row in enumerate(rows)]
    data = ReasoningDataModule(
        backbone, rows, posts.validation[:12], TASKS, module.encode, batch_size=options.batch_size
    )
    arguments = {
        "accelerator": "cpu", "devices": processes, "strategy": run.strategy, "max_epochs": run.epochs,
        "log_every_n_steps": 1, "enable_progress_bar": False, "gradient_clip_val": 1.0,
        "accumulate_grad_batches": accumulated(run.kind), "val_check_interval": BATCHES if run.kind == "mixed" else 1.0,
    }  # fmt: skip
    fit(module, data, place, arguments)
    backbone.save(folder / "saved" / run.name)
    write_json(folder / f"{run.name}.json", {"losses": losses, "held": held})


def _values(tensor: torch.Tensor) -> int:
    return getattr(tensor, "_local_tensor", tensor).numel()


def work(folder: Path, part: str) -> None:
    """Train the runs of a part, in each of its processes."""
    torch.set_num_threads(1)
    runs, count = PARTS[part]
    for run in runs:
        with suppress(processes.Trained):
            train(folder, run, count)


def start(folder: Path, part: str) -> None:
    """Train the runs of a part in its processes. Raises CalledProcessError."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PARTS[part][1])]
    command = [sys.executable, *(launcher if PARTS[part][1] > 1 else []), __file__, "--folder", str(folder), part]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(command, check=True, env=environment, capture_output=True, text=True)


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """What the runs wrote, by name; a run that went on after another has the losses of both."""
    found = {}
    for run in [*FIRST, *SECOND, *THIRD]:
        found[run.name] = read_json(folder / f"{run.name}.json")
        if run.resumes is not None:
            first = found[run.resumes.removesuffix(WITHIN)]["losses"]
            given = BATCHES if run.resumes.endswith(WITHIN) else len(first)
            found[run.name]["losses"] = first[:given] + found[run.name]["losses"]
    return found


def tables(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """For each kind, a table of the losses side by side, with the largest difference from one process."""
    for kind in KINDS:
        names = [name for name in found if name.endswith(f" {kind}") and not name.startswith("one epoch")]
        yield f"\n{kind}"
        yield "  ".join(["batch", *(f"{name.removesuffix(kind).strip():>12}" for name in names)])
        for step, losses in enumerate(zip(*(found[name]["losses"] for name in names), strict=True), 1):
            yield "  ".join([f"{step:>5}", *(f"{loss:>12.6f}" for loss in losses)])
        expected = found[names[0]]["losses"]
        largest = [max(abs(a - b) for a, b in zip(found[n]["losses"], expected, strict=True)) for n in names]
        yield "  ".join(["  max", *(f"{difference:>12.1e}" for difference in largest)])
        for what in ("weights", "optimizer state"):
            yield "  ".join([" held", *(f"{found[name]['held'][what]:>12,}" for name in names), what])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all losses to this file")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("part", nargs="?", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        work(options.folder, options.part)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for part in PARTS:
            start(Path(folder), part)
        found = results(Path(folder))
    print(*tables(found), sep="\n")
    if options.json:
        write_json(options.json, found)


if __name__ == "__main__":
    main()
