"""Benchmark of the divergences in the fused loss, relative to the forward KL.

    python benchmarks/divergences.py                                     # V = 2,048 and 151,936 on a CPU
    python benchmarks/divergences.py --width 2048 --positions 64         # the width of Qwen2.5-VL-3B
    python benchmarks/divergences.py --device cuda --json divergences.json

Every divergence receives the same hidden states, output heads and top-k targets. One step is the loss and its gradient
with respect to the student's hidden states. In each repeat the divergences take turns, after one untimed round. A ratio
is that of the medians of CPU seconds (of seconds on a GPU).
"""

import argparse
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from measuring import measure_cpu, measure_cuda, write_json

from distill.training.divergences import Divergence, DivergenceName
from distill.training.fused_loss import HiddenTargets, SoftTargets, TopKTargets, answer_loss
from distill.training.soft_target_cache import top_k_targets

WEIGHT, TEMPERATURE, TOP_K = 0.3, 2.0, 64


def steps(vocabulary: int, options: argparse.Namespace) -> dict[tuple[str, str], Callable[[], None]]:
    """One step for each kind of targets and each divergence, on the same random inputs of a standard deviation of 3."""
    device, n, d = options.device, options.positions, options.width
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    g = torch.Generator(device).manual_seed(vocabulary)

    def normal(rows: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, d, generator=g, device=device, dtype=dtype).mul_(scale)

    hidden, head = normal(n).requires_grad_(), normal(vocabulary, 3 * d**-0.5)
    full = HiddenTargets(normal(n), normal(vocabulary, 3 * d**-0.5))
    top = TopKTargets(
        **{name: x.to(device) for name, x in top_k_targets(full.hidden @ full.head.T, TOP_K, TEMPERATURE).items()}
    )
    tokens = torch.randint(0, vocabulary, (n,), generator=g, device=device)
    shares = torch.full((n,), 1 / n, device=device)

    def step(targets: SoftTargets, divergence: Divergence) -> Callable[[], None]:
        def run() -> None:
            hidden.grad = None
            answer_loss(hidden, head, tokens, shares, targets, WEIGHT, TEMPERATURE, divergence).total.backward()

        return run

    return {
        (kind, name): step(targets, Divergence(name))
        for kind, targets in (("full", full), (f"top {TOP_K}", top))
        for name in get_args(DivergenceName)
    }


def measure(vocabulary: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per kind of targets and divergence: median seconds, and the ratio to the forward KL."""
    todo = steps(vocabulary, options)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in todo}
    for repeat in range(options.repeats + 1):
        for key, step in todo.items():
            usage = measure_cuda(step) if options.device == "cuda" else measure_cpu(step, trim=False)
            if repeat:
                seconds[key].append(usage.seconds if options.device == "cuda" else usage.cpu_seconds)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    return [
        {"vocabulary": vocabulary, "targets": kind, "divergence": name, "seconds": median}
        | {"ratio": median / medians[kind, "forward_kl"]}
        for (kind, name), median in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Divergences in the fused loss, relative to the forward KL.")
    parser.add_argument("--positions", type=int, default=256, help="positions N (default: 256)")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[2048, 151_936], help="tokens V")
    parser.add_argument("--width", type=int, default=64, help="hidden size of both models (default: 64)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device (default: cpu)")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds after the warm-up (default: 7)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--json", type=Path, help="file for all results")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = platform.machine() if options.device == "cpu" else torch.cuda.get_device_name()
    device = f"{machine} with {torch.get_num_threads()} thread(s)"
    print(f"{device}; torch {torch.__version__}; N {options.positions}, D {options.width}")
    print("vocabulary  targets  divergence       seconds  ratio", flush=True)
    rows = []
    for vocabulary in options.vocabulary:
        for row in measure(vocabulary, options):
            print(
                f"{vocabulary:>10}  {row['targets']:<7}  {row['divergence']:<15}{row['seconds']:>9.4f}"
                f"{row['ratio']:>7.2f}",
                flush=True,
            )
            rows.append(row)
    write_json(options.json, {"device": device, "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
