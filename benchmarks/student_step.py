"""Benchmark of the student's training step: the published procedure against packed sequences and the fused loss.

    python benchmarks/student_step.py                                   # tiny models, Qwen's vocabularies, on a CPU
    python benchmarks/student_step.py --repeats 9 --json student_step.json
    python benchmarks/student_step.py --device cuda --batch-size 2 8    # 3B and 7B with random weights in bfloat16
    python benchmarks/student_step.py --model FOLDER --teacher FOLDER --lora --dtype float32 bfloat16

The last command takes pretrained text models, and is described in pretrained_step.py. The rest of this text is about
the others.

Implementations:
    published: published.py; two padded sequences per sample, each through student and assistant, logits and KL at
        every position.
    online: StudentModule on packed sequences, with a forward pass of the assistant in every step.
    cached: StudentModule on packed sequences, with soft targets read from disk.

A step is loss, backward and AdamW. On a CPU the implementations take turns; on a GPU each runs alone, one after the
other. Results are checked before anything is timed: packed against unpacked sequences, cross-entropy, KL and their
gradients against the plain formula, cached against online targets, the baseline's loss terms against `positions: all`.
The exit status is 1 if a check fails. If memory does not suffice to check the baseline, the baseline is not timed.

The posts are Twitter-2015's if --data holds them, otherwise synthetic posts of the same lengths. Batch preparation is
included only where the table says so, and only for online and cached: the published code prepares all batches before
training. Memory is the peak above the memory before the step: resident memory on a CPU, memory allocated by torch on a
GPU. FLOP are those that an implementation needs (distill/planning/flops.py); utilisation is their rate divided by the
GPU's dense bfloat16 peak.
"""

import argparse
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import pretrained_step
import psutil
import published
import torch
import transformers
import workload
from implementations import IMPLEMENTATIONS, SIZES, Case, Run, check_baseline, check_ours, measure, write_targets
from measuring import write_json
from processes import call, call_alone, worker
from workload import TASKS

from distill.errors import SettingsError

SHARED = Path(__file__).resolve().parents[2] / "shared"
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense bfloat16 FLOP per second, by a part of the device name. The peak of other devices is measured."""
TOLERANCES = {"cpu": 1e-4, "cuda": 1e-3}
BF16_TOLERANCE = 5e-2  # for gradients computed in bfloat16: from cached hidden states, and all gradients on a GPU
PEAK_TENSORS = 6
"""Approximate number of float32 tensors [N, V] that `published` holds at its peak; it is skipped if they do not fit."""
EPOCHS = 20  # epochs over which the cost of writing soft targets is spread


def compare(case: Case, repeats: int, failures: dict[str, str]) -> list[dict[str, Any]]:
    """One row per implementation: medians over the steps after the warm-up, or its entry in `failures`."""
    logits = case.batch_size * sum(case.padded_lengths.values())
    need = PEAK_TENSORS * 4 * logits * workload.MODELS[SIZES[case.size][0]]["text"]["vocab_size"]
    if case.device == "cpu" and need > psutil.virtual_memory().available:
        failures["published"] = f"skipped: needs about {need / 1e9:.0f} GB"
    warm_up = len(case.samples) // case.batch_size - repeats
    steps = [(name, step) for step in range(warm_up + repeats) for name in IMPLEMENTATIONS]
    if case.device == "cuda":
        steps.sort(key=lambda entry: IMPLEMENTATIONS.index(entry[0]))
    workers = {name: worker() for name in IMPLEMENTATIONS}
    runs: dict[str, list[Run]] = {name: [] for name in IMPLEMENTATIONS}
    weights = {}
    for name, step in steps:
        if name in failures:
            continue
        result = call(workers[name], measure, case, name, step)
        if isinstance(result, str):
            failures[name] = result
        else:
            run, weights[name] = result
            runs[name].append(run)
        if name in failures or step == warm_up + repeats - 1:
            workers[name].shutdown()
    return [
        summarize(case, name, runs[name][warm_up:], weights.get(name), failures.get(name)) for name in IMPLEMENTATIONS
    ]


def summarize(case: Case, name: str, runs: list[Run], weights_bytes: int | None, failure: str | None) -> dict[str, Any]:
    """Medians of one implementation, or why it did not run."""
    row: dict[str, Any] = {"implementation": name, "batch_size": case.batch_size, "failure": failure}
    if failure:
        return row
    for field in ("seconds", "cpu_seconds", "preparing", "extra_bytes"):
        row[field] = statistics.median(getattr(run, field) for run in runs)
    samples = case.batch_size * len(runs)
    row |= {f"{field}_a_sample": sum(getattr(run, field) for run in runs) / samples for field in ("tokens", "logits")}
    row["flop_a_sample"] = sum(run.flop for run in runs) / samples
    row["rate"] = case.batch_size / row["seconds"]
    with_preparing = statistics.median(run.seconds + run.preparing for run in runs)
    row["rate_prepared"] = row["rate"] if name == "published" else case.batch_size / with_preparing
    row["flop_rate"] = statistics.median(run.flop / run.seconds for run in runs)
    return row | {"weights_bytes": weights_bytes, "steps": [asdict(run) for run in runs]}


RATIOS = ("rate", "rate_prepared", "extra_bytes")


def show(rows: list[dict[str, Any]], peak: float | None) -> None:
    """Print the table of one batch size; ratios are relative to `published`."""
    print(
        "implementation  seconds  samples/s   ratio  with batches   ratio  extra MB   ratio  models MB"
        "  TFLOP/sample  utilisation"
    )
    for row in rows:
        if row["failure"]:
            print(f"{row['implementation']:<14}  {row['failure']}")
            continue
        ratio = {name: row[name] / rows[0].get(name, float("nan")) for name in RATIOS}
        print(f"{row['implementation']:<14}{row['seconds']:>9.3f}{row['rate']:>11.2f}{ratio['rate']:>8.2f}", end="")
        print(f"{row['rate_prepared']:>14.2f}{ratio['rate_prepared']:>8.2f}{row['extra_bytes'] / 1e6:>10.0f}", end="")
        print(f"{ratio['extra_bytes']:>8.3f}{row['weights_bytes'] / 1e6:>11.0f}", end="")
        utilisation = f"{row['flop_rate'] / peak:.1%}" if peak else "-"
        print(f"{row['flop_a_sample'] / 1e12:>14.4f}{utilisation:>13}")
    for row in rows:
        if not row["failure"]:
            tokens, logits = row["tokens_a_sample"], row["logits_a_sample"]
            print(f"{row['implementation']}: {tokens:.0f} tokens per sample, {logits:.0f} with logits")


def check_targets(rows: list[dict[str, Any]], written: float, device: str, peak: float | None) -> dict[str, Any]:
    """Print and return the results of `cached` with their targets, as far as the implementations ran.

    Args:
        written: seconds per sample to write the soft targets.
        peak: dense bfloat16 FLOP per second of the GPU.
    """
    finished = {row["implementation"]: row for row in rows if not row["failure"]}
    if "cached" not in finished:
        return {}
    cached, results = finished["cached"], {}
    if "published" in finished:
        baseline = finished["published"]
        speedup, memory = (cached[name] / baseline[name] for name in ("rate", "extra_bytes"))
        results["times the samples per second"] = (speedup, "at least", 5 if device == "cpu" else 4)
        with_writing = 1 / (1 / cached["rate"] + written / EPOCHS) / baseline["rate"]
        results[f"times, including the writing of soft targets, spread over {EPOCHS} epochs"] = (with_writing, "", None)
        if device == "cpu":
            cpu_ratio = baseline["cpu_seconds"] / cached["cpu_seconds"]
            results["times, by CPU time"] = (cpu_ratio, "", None)
            results["of the extra memory"] = (memory, "at most", 0.25)
    if peak:
        results["of the device's peak"] = (cached["flop_rate"] / peak, "at least", 0.45)
    for name, (value, bound, target) in results.items():
        reached = target is None or (value <= target if bound == "at most" else value >= target)
        verdict = "" if target is None else f"; target: {bound} {target:g}, {'reached' if reached else 'missed'}"
        print(f"cached: {value:.3g} {name}{verdict}")
    return {
        name: {"value": value, "bound": bound, "target": target} for name, (value, bound, target) in results.items()
    }


def bf16_peak() -> float:
    """Dense bfloat16 FLOP per second of this GPU, from its name or from a large matrix product."""
    device = torch.cuda.get_device_name()
    for name, peak in PEAKS.items():
        if name in device:
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


def load_data(options: argparse.Namespace, folder: Path) -> tuple[list[Any], dict[Any, int], str]:
    """Returns shuffled posts, their padded lengths, and a description. Saves the tokenizer in `folder`."""
    if options.tokenizer.exists():
        tokenizer, vocabulary = workload.read_tokenizer(options.tokenizer), "Qwen2's tokenizer"
    else:
        tokenizer, vocabulary = workload.train_tokenizer(), "a tokenizer trained on postcards (--tokenizer not found)"
    tokenizer.save_pretrained(folder / "tokenizer")
    if (options.data / "dev.jsonl").exists():
        samples, source = workload.read_posts(options.data), f"rows of {options.data.name}/dev.jsonl"
    else:
        samples = workload.synthetic_posts(folder, 128, tokenizer, options.image_size)
        source = "synthetic posts (--data not found)"
    student = workload.build_model("tiny-64", tokenizer, "meta", image_size=options.image_size)
    lengths = published.padded_lengths(samples, student, list(TASKS))
    random.Random(0).shuffle(samples)
    return samples, lengths, f"{len(samples)} {source}, {vocabulary}"


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """Device, load and library versions."""
    cuda = options.device == "cuda"
    description: dict[str, Any] = {"device": torch.cuda.get_device_name() if cuda else platform.machine()}
    description |= {"threads": options.threads, "load": os.getloadavg()[0], "torch": torch.__version__}
    description |= {
        "transformers": transformers.__version__, "peft": peft.__version__, "python": platform.python_version(),
    }  # fmt: skip
    if cuda:
        memory = torch.cuda.get_device_properties(0).total_memory
        description |= {"cuda": torch.version.cuda, "gpu_bytes": memory}
    return description


def check(case: Case, function: Callable[[Case], dict[str, float]]) -> dict[str, float] | str:
    """Returns the differences that a check finds, or why memory does not suffice. Exits if one is above tolerance."""
    try:
        differences: dict[str, float] | str = call_alone(function, case)
    except SettingsError as error:
        sys.exit(f"check failed: {error}")
    if isinstance(differences, str):
        return differences
    print("check, relative differences: " + ", ".join(f"{name} {value:.1e}" for name, value in differences.items()))
    for name, value in differences.items():
        bf16 = "gradient" in name and (case.device == "cuda" or "cached" in name)
        if not value <= (BF16_TOLERANCE if bf16 else TOLERANCES[case.device]):
            sys.exit(f"check failed: {name} differs by {value:.1e}")
    return differences


def run_case(case: Case, repeats: int, peak: float | None) -> dict[str, Any]:
    """Write the soft targets, run the checks, and measure all implementations at one batch size."""
    print(f"\nbatch size {case.batch_size}: medians of {repeats} steps; ratios relative to published")
    written = call_alone(write_targets, case)
    if isinstance(written, str):
        sys.exit(f"soft targets could not be written: {written}")
    ours, baseline = check(case, check_ours), check(case, check_baseline)
    if isinstance(ours, str):
        sys.exit(f"check not possible: {ours}")
    rows = compare(case, repeats, {"published": baseline} if isinstance(baseline, str) else {})
    show(rows, peak)
    print(f"soft targets: written once, {written:.3f} s per sample")
    targets = check_targets(rows, written, case.device, peak)
    return {"rows": rows, "differences": {"ours": ours, "baseline": baseline}, "written": written, "targets": targets}


def main() -> int:
    options = parse_options()
    begin, description = time.perf_counter(), describe(options)
    print(", ".join(f"{name} {value}" for name, value in description.items()))
    if options.model:
        return pretrained_step.compare(options, description)
    peak = bf16_peak() if options.device == "cuda" else None
    if peak:
        print(f"utilisation is relative to {peak / 1e12:.0f} TFLOP/s, the dense bfloat16 peak")
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples, lengths, source = load_data(options, folder)
        trained = "LoRA adapters" if options.lora else "all weights"
        models = " and ".join(SIZES[options.size])
        print(f"{models}, training {trained}; {source}, {options.image_size} px, padded to {lengths}")
        for size in options.batch_size:
            steps = options.repeats + (3 if options.device == "cuda" else 1)
            chosen = (samples * size)[: size * steps]
            fields = (options.size, options.device, options.lora, options.image_size, size, options.threads)
            results.append(run_case(Case(*fields, chosen, lengths, folder), options.repeats, peak))
    print(f"total: {time.perf_counter() - begin:.0f} s; load {os.getloadavg()[0]:.1f} at the end")
    description |= {"options": {name: str(value) for name, value in vars(options).items()}, "source": source}
    write_json(options.json, description | {"peak": peak, "widths": lengths, "results": results})
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The published training step of the student against ours.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device (default: cpu)")
    parser.add_argument("--size", choices=SIZES, help="model size (default: tiny; on a GPU published, 3B and 7B)")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[2], help="samples per step (default: 2)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps per implementation (default: 5)")
    parser.add_argument("--lora", action="store_true", help="train adapters only (always at the published size)")
    parser.add_argument("--image-size", type=int, default=280, help="image width and height in pixels (default: 280)")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "twitter15", help="folder of dev.jsonl")
    tokenizer = SHARED / "tokenizers" / "qwen2" / "tokenizer.json"
    parser.add_argument("--tokenizer", type=Path, default=tokenizer, help="Qwen2's tokenizer.json")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--model", type=Path, help="folder of a pretrained student, which reads text only")
    parser.add_argument("--teacher", type=Path, help="with --model: folder of the teacher (default: the student's)")
    dtypes = ["float32", "bfloat16"]
    parser.add_argument(
        "--dtype", choices=dtypes, nargs="+", default=dtypes[:1], help="with --model (default: float32)"
    )
    names = pretrained_step.IMPLEMENTATIONS
    parser.add_argument(
        "--implementations", choices=names, nargs="+", default=names, help="with --model (default: all)"
    )
    parser.add_argument("--json", type=Path, help="file for all results")
    options = parser.parse_args()
    options.size = options.size or ("published" if options.device == "cuda" else "tiny")
    options.lora |= options.size == "published"
    options.teacher = options.teacher or options.model
    return options


if __name__ == "__main__":
    sys.exit(main())
