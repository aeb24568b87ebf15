"""Benchmark of the distillation loss: the chunked fused loss, the plain formula, TRL's loss and Liger's.

    python benchmarks/kd_loss.py                                     # 512, 1024 and 2048 positions on a CPU
    python benchmarks/kd_loss.py --positions 8192 --repeats 3        # implementations that do not fit are skipped
    python benchmarks/kd_loss.py --device cuda --json kd_loss.json   # bfloat16 at the widths of Qwen2.5-VL 3B and 7B

All implementations receive the same hidden states and output heads. They compute (1 - λ) cross-entropy + λ KL, with
λ = 0.3 and T = 2, averaged over positions, and the gradient with respect to the student's hidden states (and its head
with --trained-head). Each runs in its own process, and they take turns. Time and memory cover forward and backward:
medians over the repeats, and peak memory above the memory before the step. The exit status is 1 if values or gradients
differ by more than the tolerance.
"""

import argparse
import importlib.util
import os
import platform
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from measuring import Usage, measure_cpu, measure_cuda, write_json
from processes import call, worker

from distill.training.fused_loss import HiddenTargets, answer_loss

WEIGHT, TEMPERATURE = 0.3, 2.0
PEAK_TENSORS = {"fused": 0.0, "plain": 7.5, "trl": 9.5, "liger": 9.5}
"""Approximate count of float32 tensors [N, V] at the peak; on a CPU an implementation is skipped if they do not fit."""
DIFFERENCES = ("value_difference", "gradient_difference")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """Sizes and device of one measurement."""

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


def random_inputs(case: Case) -> Inputs:
    """Random states and heads whose logits have a standard deviation of 3."""
    g = torch.Generator(case.device).manual_seed(case.positions)

    def normal(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=g, device=case.device, dtype=case.dtype).mul_(scale)

    n, v, d, e = case.positions, case.vocabulary, case.width, case.assistant_width
    tokens = torch.randint(0, v, (n,), generator=g, device=case.device)
    inputs = Inputs(normal(n, d), normal(v, d, 3 * d**-0.5), normal(n, e), normal(v, e, 3 * e**-0.5), tokens)
    inputs.hidden.requires_grad_()
    inputs.head.requires_grad_(case.trained_head)
    return inputs


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
    """TRL's loss at beta = 0, which is KL(teacher || student), plus plain cross-entropy."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    logits, targets = F.linear(x.hidden, x.head).float(), F.linear(x.assistant, x.assistant_head).float()
    soft = GKDTrainer.generalized_jsd_loss(logits, targets, beta=0, temperature=TEMPERATURE)
    return (1 - WEIGHT) * F.cross_entropy(logits, x.tokens) + WEIGHT * soft


def liger(x: Inputs) -> torch.Tensor:
    """Liger's chunked loss at beta = 0. It is compiled on a GPU only, because compilation on a CPU takes minutes."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(1 - WEIGHT, WEIGHT, beta=0.0, temperature=TEMPERATURE, compiled=x.hidden.is_cuda)
    return loss(x.hidden, x.head, x.assistant, x.assistant_head, x.tokens)


Loss = Callable[[Inputs], torch.Tensor]
IMPLEMENTATIONS: dict[str, Loss] = {"fused": fused, "plain": plain, "trl": trl, "liger": liger}
cached_inputs: dict[Case, Inputs] = {}


@dataclass
class Run:
    usage: Usage
    value: float
    gradient: torch.Tensor | None = None


def measure(name: str, case: Case, threads: int | None, with_gradient: bool) -> Run:
    """One forward and backward pass of an implementation; called in its worker process."""
    if threads:
        torch.set_num_threads(threads)
    if case not in cached_inputs:
        cached_inputs.clear()
        cached_inputs[case] = random_inputs(case)
    x = cached_inputs[case]
    losses: list[torch.Tensor] = []

    def step() -> None:
        losses.append(IMPLEMENTATIONS[name](x))
        losses[-1].backward()

    def reset() -> None:
        losses.clear()
        x.hidden.grad = x.head.grad = None

    reset()
    if case.device == "cuda":
        try:
            step()  # untimed, so that the allocator already holds the memory in the timed pass
            reset()
            usage = measure_cuda(step)
        finally:
            torch.cuda.empty_cache()  # leave the memory to the other implementations
    else:
        usage = measure_cpu(step, trim=False)
    gradient = x.hidden.grad.float().cpu() if with_gradient and x.hidden.grad is not None else None
    return Run(usage, float(losses[0].detach()), gradient)


def reason_to_skip(name: str, case: Case) -> str | None:
    """Why an implementation cannot run here, or None."""
    module = {"trl": "trl", "liger": "liger_kernel"}.get(name)
    if module and importlib.util.find_spec(module) is None:
        return f"skipped: {module.replace('_', '-')} is not installed"
    positions = min(case.positions, 2047) if name == "liger" else case.positions  # its largest chunk
    need = PEAK_TENSORS[name] * positions * case.vocabulary * 4
    if case.device == "cpu" and need > psutil.virtual_memory().available:
        return f"skipped: needs about {need / 1e9:.0f} GB"
    return None


def compare(case: Case, options: argparse.Namespace, workers: dict[str, ProcessPoolExecutor]) -> list[dict[str, Any]]:
    """All implementations in turn, `repeats` times after a warm-up; one row each."""
    failures = {name: reason for name in IMPLEMENTATIONS if (reason := reason_to_skip(name, case))}
    runs: dict[str, list[Run]] = {name: [] for name in IMPLEMENTATIONS}
    for repeat in range(options.repeats + 1):
        for name in [name for name in IMPLEMENTATIONS if name not in failures]:
            try:
                result = call(workers[name], measure, name, case, options.threads, repeat == 0)
            except Exception as error:  # a third-party implementation may fail in any way; ours must not
                if name in ("fused", "plain"):
                    raise
                result = f"failed: {type(error).__name__}: {error}".splitlines()[0]
            if isinstance(result, str):
                failures[name] = result
            else:
                runs[name].append(result)
    return [summarize(name, case, runs, failures.get(name)) for name in IMPLEMENTATIONS]


def summarize(name: str, case: Case, runs: dict[str, list[Run]], failure: str | None) -> dict[str, Any]:
    """Medians of one implementation and its differences from the plain formula, or why it did not run."""
    row: dict[str, Any] = {"positions": case.positions, "implementation": name, "failure": failure}
    if failure:
        return row
    first, *timed = runs[name]
    for field in Usage._fields:
        row[field] = statistics.median(getattr(run.usage, field) for run in timed)
    row["all_seconds"] = [run.usage.seconds for run in timed]
    row["value"] = first.value
    if runs["plain"]:
        expected = runs["plain"][0]
        assert first.gradient is not None and expected.gradient is not None
        row["value_difference"] = abs(first.value - expected.value)
        difference = (first.gradient - expected.gradient).abs().max() / expected.gradient.abs().max()
        row["gradient_difference"] = float(difference)
    return row


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows of one case; ratios are relative to the fused loss."""
    ours = rows[0]
    for row in rows:
        print(f"{row['positions']:>9}  {row['implementation']:<14}", end="")
        if row["failure"]:
            print(f"  {row['failure']}")
            continue
        ratios = [row[name] / ours[name] if name in ours else float("nan") for name in ("seconds", "extra_bytes")]
        print(f"{row['seconds']:>9.3f}{ratios[0]:>8.2f}{row['cpu_seconds']:>8.3f}", end="")
        print(f"{row['extra_bytes'] / 1e6:>10.0f}{ratios[1]:>8.2f}", end="")
        differences = [row.get(name) for name in DIFFERENCES]
        print(*(f"{'-' if value is None else f'{value:.1e}':>10}" for value in differences), sep="")


def main() -> int:
    parser = argparse.ArgumentParser(description="Distillation loss: fused, plain formula, TRL, Liger.")
    parser.add_argument("--positions", type=int, nargs="+", help="positions N (default: 512 to 2048; to 8192 on a GPU)")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="tokens V (default: 151936, Qwen2.5-VL-3B's)")
    parser.add_argument("--width", type=int, help="hidden size of the student (default: 64; 2048 on a GPU)")
    parser.add_argument("--assistant-width", type=int, help="hidden size of the assistant (default: 96; 3584 on a GPU)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device (default: cpu)")
    parser.add_argument("--trained-head", action="store_true", help="also compute the gradient of the student's head")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs after the warm-up (default: 5)")
    parser.add_argument("--threads", type=int, help="CPU threads per implementation (default: torch's)")
    parser.add_argument("--json", type=Path, help="file for all results")
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
    print("positions  implementation  seconds   ratio   CPU s  extra MB   ratio   value Δ   grad. Δ", flush=True)
    rows = []
    for case in cases:
        workers = {name: worker() for name in IMPLEMENTATIONS}
        try:
            case_rows = compare(case, options, workers)
        finally:
            for process in workers.values():
                process.shutdown()
        show(case_rows)
        sys.stdout.flush()
        rows += case_rows
    results = {"device": device, "torch": torch.__version__, "cases": [asdict(case) for case in cases], "rows": rows}
    write_json(options.json, results)
    return int(any(row.get(name, 0) > TOLERANCE[cases[0].dtype] for row in rows for name in DIFFERENCES))


if __name__ == "__main__":
    sys.exit(main())
