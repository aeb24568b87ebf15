"""The README's figures of a student step: the published procedure against ours, on the same posts and models.

    python benchmarks/student_step.py                                   # tiny models, Qwen's vocabularies, on a CPU
    python benchmarks/student_step.py --repeats 9 --json student_step.json
    python benchmarks/student_step.py --device cuda --batch-size 2 8    # 3B and 7B with random weights in bfloat16

Sides: `published` (published.py: two padded sequences a sample, each through student and assistant, logits and KL at
every position), and the StudentModule on packed sequences: `online` asks the assistant in every step, `cached` reads
what it said before. A step is loss, backward and AdamW. A CPU's sides take turns; a GPU's follow each other, each
alone. Nothing is timed before the values agree: packed with unpacked sequences, cross-entropy and KL and the gradient
of each with the plain formula's, targets read from disk with those of an assistant asked, the baseline's terms with
those of `positions: all`; otherwise the exit status is 1. A baseline without room to be checked is not timed.

Posts are Twitter-2015's where they lie beside the project, else drawn ones of the same lengths. Preparing a batch is
counted where it says so, and for our sides alone: the published code prepares all of them before it trains. Memory is
the peak above the models, resident memory on a CPU, what torch allocates on a GPU. FLOP are those that a side needs
(models/flops.py); utilisation is their rate over the GPU's dense bfloat16 peak.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import psutil
import published
import torch
import transformers
import workload
from sides import SIDES, SIZES, Case, Run, check_baseline, check_ours, measure, write_targets
from workload import TASKS

from distill.errors import SettingsError

SHARED = Path(__file__).resolve().parents[2] / "shared"
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense bfloat16 FLOP a second by what a device's name holds; that of another is measured."""
TOLERANCES = {"cpu": 1e-4, "cuda": 1e-3}
HALF = 5e-2  # of gradients that go through bfloat16: cached hidden states everywhere, on a GPU all
NEEDED = 6
"""Tensors [N, V] in float32 that the published side holds at its peak, roughly: tried only where they fit."""
EPOCHS = 20  # over which what is written once is shared out


def pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def ask(process: ProcessPoolExecutor, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in another process; a sentence where memory does not suffice."""
    try:
        return process.submit(function, *arguments).result()
    except BrokenProcessPool:
        return "its process was killed"
    except (torch.OutOfMemoryError, MemoryError):
        return "out of memory"
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        return "out of memory"


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    with pool() as process:
        return ask(process, function, *arguments)


def compare(case: Case, repeats: int, failed: dict[str, str]) -> list[dict[str, Any]]:
    """A row for each side: medians over the steps after the first ones, or why there are none (`failed` so far)."""
    logits = case.batch_size * sum(case.widths.values())
    need = NEEDED * 4 * logits * workload.MODELS[SIZES[case.size][0]]["text"]["vocab_size"]
    if case.device == "cpu" and need > psutil.virtual_memory().available:
        failed["published"] = f"would need about {need / 1e9:.0f} GB"
    warm_up = len(case.samples) // case.batch_size - repeats
    steps = [(side, step) for step in range(warm_up + repeats) for side in SIDES]
    if case.device == "cuda":
        steps.sort(key=lambda pair: SIDES.index(pair[0]))
    pools = {side: pool() for side in SIDES}  # processes start when first used
    runs: dict[str, list[Run]] = {side: [] for side in SIDES}
    weights = {}
    for side, step in steps:
        if side in failed:
            continue
        found = ask(pools[side], measure, case, side, step)
        if isinstance(found, str):
            failed[side] = found
        else:
            run, weights[side] = found
            runs[side].append(run)
        if side in failed or step == warm_up + repeats - 1:
            pools[side].shutdown()
    return [row(case, side, runs[side][warm_up:], weights.get(side), failed.get(side)) for side in SIDES]


def row(case: Case, side: str, runs: list[Run], weights_bytes: int | None, failure: str | None) -> dict[str, Any]:
    made: dict[str, Any] = {"side": side, "batch_size": case.batch_size, "failure": failure}
    if failure:
        return made
    for name in ("seconds", "processor_seconds", "preparing", "extra_bytes"):
        made[name] = statistics.median(getattr(run, name) for run in runs)
    samples = case.batch_size * len(runs)
    made |= {f"{name}_a_sample": sum(getattr(run, name) for run in runs) / samples for name in ("tokens", "logits")}
    made["flop_a_sample"] = sum(run.flop for run in runs) / samples
    made["rate"] = case.batch_size / made["seconds"]
    both = statistics.median(run.seconds + run.preparing for run in runs)
    made["rate_prepared"] = made["rate"] if side == "published" else case.batch_size / both
    made["flop_rate"] = statistics.median(run.flop / run.seconds for run in runs)
    return made | {"weights_bytes": weights_bytes, "steps": [asdict(run) for run in runs]}


def show(rows: list[dict[str, Any]], peak: float | None) -> None:
    """The table of one batch size; ratios are to the published side."""
    print(
        "side         seconds  samples/s   ratio  prepared too   ratio  extra MB   ratio  models MB  TFLOP/sample  used"
    )
    for row in rows:
        if row["failure"]:
            print(f"{row['side']:<10}  {row['failure']}")
            continue
        ratio = {name: row[name] / rows[0].get(name, float("nan")) for name in RATIOS}
        print(f"{row['side']:<10}{row['seconds']:>10.3f}{row['rate']:>11.2f}{ratio['rate']:>8.2f}", end="")
        print(f"{row['rate_prepared']:>14.2f}{ratio['rate_prepared']:>8.2f}{row['extra_bytes'] / 1e6:>10.0f}", end="")
        print(f"{ratio['extra_bytes']:>8.3f}{row['weights_bytes'] / 1e6:>11.0f}", end="")
        print(f"{row['flop_a_sample'] / 1e12:>14.4f}", f"{row['flop_rate'] / peak:>6.1%}" if peak else f"{'-':>6}")
    for row in rows:
        if not row["failure"]:
            print(
                f"{row['side']}: {row['tokens_a_sample']:.0f} tokens a sample, {row['logits_a_sample']:.0f} with logits"
            )


RATIOS = ("rate", "rate_prepared", "extra_bytes")


def judge(rows: list[dict[str, Any]], written: float, device: str, peak: float | None) -> dict[str, Any]:
    """What the cached side comes to, and whether that reaches the targets, as far as the sides ran."""
    sides = {row["side"]: row for row in rows if not row["failure"]}
    if "cached" not in sides:
        return {}
    cached, found = sides["cached"], {}
    if "published" in sides:
        plain = sides["published"]
        speedup, memory = (cached[name] / plain[name] for name in ("rate", "extra_bytes"))
        found["times the samples a second"] = (speedup, "at least", 5 if device == "cpu" else 4)
        whole = 1 / (1 / cached["rate"] + written / EPOCHS) / plain["rate"]
        found[f"times, with what writing the targets takes over {EPOCHS} epochs"] = (whole, "", None)
        if device == "cpu":
            busy = plain["processor_seconds"] / cached["processor_seconds"]
            found["times, by the processor's own clock"] = (busy, "", None)
            found["of the extra memory"] = (memory, "at most", 0.25)
    if peak:
        found["of the device's peak"] = (cached["flop_rate"] / peak, "at least", 0.45)
    for name, (value, bound, target) in found.items():
        reached = target is None or (value <= target if bound == "at most" else value >= target)
        aim = "" if target is None else f"; to reach: {bound} {target:g}, {'reached' if reached else 'missed'}"
        print(f"cached: {value:.3g} {name}{aim}")
    return {name: {"value": value, "bound": bound, "target": target} for name, (value, bound, target) in found.items()}


def bf16_peak() -> float:
    """Dense bfloat16 FLOP a second of this GPU, from its name or a large product."""
    name = torch.cuda.get_device_name()
    for known, peak in PEAKS.items():
        if known in name:
            return peak
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
    return 2 * 8192**3 / min(seconds)


def workplace(options: argparse.Namespace, folder: Path) -> tuple[list[Any], dict[Any, int], str]:
    """Posts in an order of their own, the widths of the data set, and what they are; a tokenizer in `folder`."""
    if options.tokenizer.exists():
        tokenizer, words = workload.read_tokenizer(options.tokenizer), "Qwen2's tokenizer"
    else:
        tokenizer, words = workload.train_tokenizer(), "a tokenizer of the postcards' words (no --tokenizer)"
    tokenizer.save_pretrained(folder / "tokenizer")
    if (options.data / "dev.jsonl").exists():
        samples, source = workload.read_rows(options.data), f"rows of {options.data.name}/dev.jsonl"
    else:
        samples, source = workload.make_rows(folder, 128, tokenizer, options.image_size), "drawn posts (no --data)"
    student = workload.build("tiny-64", tokenizer, "meta", image_size=options.image_size)
    widths = published.longest(samples, student, list(TASKS))
    random.Random(0).shuffle(samples)
    return samples, widths, f"{len(samples)} {source}, {words}"


def describe(options: argparse.Namespace) -> dict[str, Any]:
    cuda = options.device == "cuda"
    made: dict[str, Any] = {"device": torch.cuda.get_device_name() if cuda else platform.machine()}
    made |= {"threads": options.threads, "load": os.getloadavg()[0], "torch": torch.__version__}
    made |= {"transformers": transformers.__version__, "peft": peft.__version__, "python": platform.python_version()}
    if cuda:
        made |= {"cuda": torch.version.cuda, "gpu_bytes": torch.cuda.get_device_properties(0).total_memory}
    return made


def checked(case: Case, function: Callable[[Case], dict[str, float]]) -> dict[str, float] | str:
    """How far apart what should be equal is, or why there is no room to see; ends the script where it is too far."""
    try:
        found: dict[str, float] | str = alone(function, case)
    except SettingsError as error:
        sys.exit(f"check: {error}")
    if isinstance(found, str):
        return found
    print("check, relative differences: " + ", ".join(f"{name} {gap:.1e}" for name, gap in found.items()))
    for name, gap in found.items():
        halved = "gradient" in name and (case.device == "cuda" or "cached" in name)
        if not gap <= (HALF if halved else TOLERANCES[case.device]):
            sys.exit(f"check: {name} differs by {gap:.1e}")
    return found


def main() -> int:
    options = arguments()
    begin, found = time.perf_counter(), describe(options)
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    peak = bf16_peak() if options.device == "cuda" else None
    if peak:
        print(f"utilisation is of {peak / 1e12:.0f} TFLOP/s, the dense bfloat16 peak")
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples, widths, source = workplace(options, folder)
        trains = "adapters train" if options.lora else "all weights train"
        print(f"{' and '.join(SIZES[options.size])}, {trains}; {source}, {options.image_size} px, padded to {widths}")
        for size in options.batch_size:
            print(f"\nbatch size {size}: medians of {options.repeats} steps; ratios to the published one")
            steps = options.repeats + (3 if options.device == "cuda" else 1)
            chosen = (samples * size)[: size * steps]
            fields = (options.size, options.device, options.lora, options.image_size, size, options.threads)
            case = Case(*fields, chosen, widths, folder)
            written = alone(write_targets, case)
            if isinstance(written, str):
                sys.exit(f"soft targets could not be written: {written}")
            ours, baseline = checked(case, check_ours), checked(case, check_baseline)
            if isinstance(ours, str):
                sys.exit(f"check: not done, {ours}")
            rows = compare(case, options.repeats, {"published": baseline} if isinstance(baseline, str) else {})
            show(rows, peak)
            print(f"soft targets: {written:.3f} s a sample to write them once")
            targets = judge(rows, written, options.device, peak)
            differences = {"ours": ours, "baseline": baseline}
            results.append({"rows": rows, "differences": differences, "written": written, "targets": targets})
    print(f"{time.perf_counter() - begin:.0f} s in all; load {os.getloadavg()[0]:.1f} at the end")
    if options.json:
        made = found | {"options": {name: str(value) for name, value in vars(options).items()}, "source": source}
        made |= {"peak": peak, "widths": widths, "results": results}
        options.json.write_text(json.dumps(made, indent=2) + "\n")
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The published student step against ours.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where (default: cpu)")
    parser.add_argument("--size", choices=SIZES, help="of the models (default: tiny; on a GPU published, 3B and 7B)")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[2], help="samples in a step (default: 2)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each side (default: 5)")
    parser.add_argument("--lora", action="store_true", help="adapters alone train (always so at the published size)")
    parser.add_argument("--image-size", type=int, default=280, help="side of the pictures (default: 280)")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "twitter15", help="folder of dev.jsonl")
    tokenizer = SHARED / "tokenizers" / "qwen2" / "tokenizer.json"
    parser.add_argument("--tokenizer", type=Path, default=tokenizer, help="Qwen2's tokenizer.json")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of a CPU (default: torch's)")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    options.size = options.size or ("published" if options.device == "cuda" else "tiny")
    options.lora |= options.size == "published"
    return options


if __name__ == "__main__":
    sys.exit(main())
