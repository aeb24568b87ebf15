"""The README's figures of the distillation loss: ours in chunks against the plain formula, TRL's and Liger's.

    python benchmarks/kd_loss.py                                     # 512, 1024 and 2048 positions on a CPU
    python benchmarks/kd_loss.py --positions 8192 --repeats 3        # what does not fit into memory is said, not tried
    python benchmarks/kd_loss.py --device cuda --json kd_loss.json   # bfloat16 at the widths of Qwen2.5-VL 3B and 7B

Every side turns the same hidden states and output heads into (1 - λ) cross-entropy + λ KL, λ = 0.3, T = 2, averaged
over positions, and into the gradient of the student's hidden states (and of its head with --trained-head). Each lives
in a process of its own, and they take turns. Time and memory are those of forward and backward: medians, and the
peak above what was there before. The exit status is 1 where values or gradients differ.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F

from distill.training.fused_loss import HiddenTargets, answer_loss

WEIGHT, TEMPERATURE = 0.3, 2.0
NEEDED = {"fused": 0.0, "plain": 7.5, "trl": 9.5, "liger": 9.5}
"""Tensors [N, V] in float32 that a side holds at its peak, roughly; on a CPU it is tried only where they fit."""
DIFFERENCES = ("value_difference", "gradient_difference")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """What is measured: sizes, and where."""

    positions: int
    vocabulary: int
    width: int
    assistant_width: int
    device: str
    trained_head: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32


@dataclass
class Inputs:
    """hidden [N, D], head [V, D], assistant [N, D'], assistant_head [V, D'], tokens [N]."""

    hidden: torch.Tensor
    head: torch.Tensor
    assistant: torch.Tensor
    assistant_head: torch.Tensor
    tokens: torch.Tensor


def inputs(case: Case) -> Inputs:
    """Random states and heads whose logits have a standard deviation of 3."""
    g = torch.Generator(case.device).manual_seed(case.positions)

    def normal(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=g, device=case.device, dtype=case.dtype).mul_(scale)

    n, v, d, e = case.positions, case.vocabulary, case.width, case.assistant_width
    tokens = torch.randint(0, v, (n,), generator=g, device=case.device)
    made = Inputs(normal(n, d), normal(v, d, 3 * d**-0.5), normal(n, e), normal(v, e, 3 * e**-0.5), tokens)
    made.hidden.requires_grad_()
    made.head.requires_grad_(case.trained_head)
    return made


def fused(x: Inputs) -> torch.Tensor:
    shares = x.hidden.new_full((len(x.hidden),), 1 / len(x.hidden), dtype=torch.float32)
    targets = HiddenTargets(x.assistant, x.assistant_head)
    return answer_loss(x.hidden, x.head, x.tokens, shares, targets, WEIGHT, TEMPERATURE).total


def plain(x: Inputs) -> torch.Tensor:
    logits, targets = F.linear(x.hidden, x.head).float(), F.linear(x.assistant, x.assistant_head).float()
    log_p, log_q = F.log_softmax(logits / TEMPERATURE, -1), F.log_softmax(targets / TEMPERATURE, -1)
    soft = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return (1 - WEIGHT) * F.cross_entropy(logits, x.tokens) + WEIGHT * soft


def trl(x: Inputs) -> torch.Tensor:
    """TRL's loss at beta = 0, which is KL(teacher || student), and the plain cross-entropy beside it."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    logits, targets = F.linear(x.hidden, x.head).float(), F.linear(x.assistant, x.assistant_head).float()
    soft = GKDTrainer.generalized_jsd_loss(logits, targets, beta=0, temperature=TEMPERATURE)
    return (1 - WEIGHT) * F.cross_entropy(logits, x.tokens) + WEIGHT * soft


def liger(x: Inputs) -> torch.Tensor:
    """Liger's chunked loss at beta = 0; compiled on a GPU only, for on a CPU that costs minutes."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(1 - WEIGHT, WEIGHT, beta=0.0, temperature=TEMPERATURE, compiled=x.hidden.is_cuda)
    return loss(x.hidden, x.head, x.assistant, x.assistant_head, x.tokens)


SIDES: dict[str, Callable[[Inputs], torch.Tensor]] = {"fused": fused, "plain": plain, "trl": trl, "liger": liger}
held: dict[Case, Inputs] = {}


@dataclass
class Run:
    seconds: float
    cpu_seconds: float
    extra_bytes: int
    value: float
    gradient: torch.Tensor | None = None


def measure(side: str, case: Case, threads: int | None, with_gradient: bool) -> Run | str:
    """One forward and backward of one side; in its own process. A sentence where memory does not suffice."""
    if threads:
        torch.set_num_threads(threads)
    if case not in held:
        held.clear()
        held[case] = inputs(case)
    x = held[case]
    x.hidden.grad = x.head.grad = None
    try:
        found = on_gpu(SIDES[side], x) if case.device == "cuda" else on_cpu(SIDES[side], x)
    except torch.OutOfMemoryError:
        return "out of memory"
    if with_gradient and x.hidden.grad is not None:
        found.gradient = x.hidden.grad.float().cpu()
    return found


def on_cpu(loss: Callable[[Inputs], torch.Tensor], x: Inputs) -> Run:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    begin, cpu = time.perf_counter(), time.process_time()
    total = loss(x)
    total.backward()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    return Run(seconds, cpu, memory("VmHWM") - before, float(total.detach()))


def memory(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def on_gpu(loss: Callable[[Inputs], torch.Tensor], x: Inputs) -> Run:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    try:
        for _ in range(2):  # once more, with memory that is at hand
            x.hidden.grad = x.head.grad = None
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            begin.record()
            total = loss(x)
            total.backward()
            end.record()
            torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before
    finally:
        torch.cuda.empty_cache()  # for the other sides, whose turn it is next
    return Run(begin.elapsed_time(end) / 1000, 0.0, extra, float(total.detach()))


def unfit(side: str, case: Case) -> str | None:
    """Why a side cannot be tried here."""
    module = {"trl": "trl", "liger": "liger_kernel"}.get(side)
    if module and importlib.util.find_spec(module) is None:
        return f"not here: {module.replace('_', '-')} is not installed"
    positions = min(case.positions, 2047) if side == "liger" else case.positions  # its largest chunk
    need = NEEDED[side] * positions * case.vocabulary * 4
    if case.device == "cpu" and need > psutil.virtual_memory().available:
        return f"would need about {need / 1e9:.0f} GB"
    return None


def compare(case: Case, options: argparse.Namespace, pools: dict[str, ProcessPoolExecutor]) -> list[dict[str, Any]]:
    """All sides in turn, `repeats` times after a warm-up; a row for each."""
    failed = {side: reason for side in SIDES if (reason := unfit(side, case))}
    runs: dict[str, list[Run]] = {side: [] for side in SIDES}
    for repeat in range(options.repeats + 1):
        for side in [side for side in SIDES if side not in failed]:
            try:
                found = pools[side].submit(measure, side, case, options.threads, repeat == 0).result()
            except BrokenProcessPool:
                found = "its process was killed"
            except Exception as error:  # another library's side may fail in its own ways, ours may not
                if side in ("fused", "plain"):
                    raise
                found = f"does not run here: {type(error).__name__}: {error}".splitlines()[0]
            if isinstance(found, str):
                failed[side] = found
            else:
                runs[side].append(found)
    return [row(side, case, runs, failed.get(side)) for side in SIDES]


def row(side: str, case: Case, runs: dict[str, list[Run]], failure: str | None) -> dict[str, Any]:
    made: dict[str, Any] = {"positions": case.positions, "side": side, "failure": failure}
    if failure:
        return made
    first, *timed = runs[side]
    for name in ("seconds", "cpu_seconds", "extra_bytes"):
        made[name] = statistics.median(getattr(run, name) for run in timed)
    made["all_seconds"] = [run.seconds for run in timed]
    made["value"] = first.value
    if runs["plain"]:
        expected = runs["plain"][0]
        assert first.gradient is not None and expected.gradient is not None
        made["value_difference"] = abs(first.value - expected.value)
        difference = (first.gradient - expected.gradient).abs().max() / expected.gradient.abs().max()
        made["gradient_difference"] = float(difference)
    return made


def show(rows: list[dict[str, Any]]) -> None:
    """The rows of one case; ratios are to ours."""
    ours = rows[0]
    for row in rows:
        print(f"{row['positions']:>9}  {row['side']:<6}", end="")
        if row["failure"]:
            print(f"  {row['failure']}")
            continue
        ratios = [row[name] / ours[name] if name in ours else float("nan") for name in ("seconds", "extra_bytes")]
        print(f"{row['seconds']:>9.3f}{ratios[0]:>8.2f}{row['cpu_seconds']:>8.3f}", end="")
        print(f"{row['extra_bytes'] / 1e6:>10.0f}{ratios[1]:>8.2f}", end="")
        differences = [row.get(name) for name in DIFFERENCES]
        print(*(f"{'-' if found is None else f'{found:.1e}':>10}" for found in differences), sep="")


def main() -> int:
    parser = argparse.ArgumentParser(description="The distillation loss: ours, the plain formula, TRL's, Liger's.")
    parser.add_argument("--positions", type=int, nargs="+", help="positions N (default: 512 to 2048; to 8192 on a GPU)")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="ids V (default: 151936, Qwen2.5-VL-3B's)")
    parser.add_argument("--width", type=int, help="the student's hidden width (default: 64; 2048 on a GPU)")
    parser.add_argument("--assistant-width", type=int, help="the assistant's (default: 96; 3584 on a GPU)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where (default: cpu)")
    parser.add_argument("--trained-head", action="store_true", help="the head gets a gradient, too")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs after the first (default: 5)")
    parser.add_argument("--threads", type=int, help="threads of a side on a CPU (default: torch's)")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    width, assistant_width = options.width or (2048 if cuda else 64), options.assistant_width or (3584 if cuda else 96)
    cases = [
        Case(positions, options.vocabulary, width, assistant_width, options.device, options.trained_head)
        for positions in options.positions or ([512, 2048, 8192] if cuda else [512, 1024, 2048])
    ]
    threads = options.threads or torch.get_num_threads()
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()} with {threads} thread(s)"
    versions = f"torch {torch.__version__}, {str(cases[0].dtype).removeprefix('torch.')}"
    print(f"{device}; {versions}; V {options.vocabulary}, D {width}, D' {assistant_width}")
    print(f"{'positions':>9}  side    seconds   ratio   CPU s  extra MB   ratio   value d   grad. d", flush=True)
    context = multiprocessing.get_context("spawn")
    rows = []
    for case in cases:
        pools = {side: ProcessPoolExecutor(1, mp_context=context) for side in SIDES}  # processes start when first used
        try:
            found = compare(case, options, pools)
        finally:
            for pool in pools.values():
                pool.shutdown()
        show(found)
        sys.stdout.flush()
        rows += found
    if options.json:
        made = {"device": device, "torch": torch.__version__, "cases": [asdict(case) for case in cases], "rows": rows}
        options.json.write_text(json.dumps(made, indent=2) + "\n")
    return int(any(row.get(name, 0) > TOLERANCE[cases[0].dtype] for row in rows for name in DIFFERENCES))


if __name__ == "__main__":
    sys.exit(main())
