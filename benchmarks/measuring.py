"""Time and memory of a step, and result files. Shared by the benchmark scripts; imports no heavy module.

`annotate.py` measures the memory of a process that does not load torch, so torch is imported only where it is needed.
"""

import ctypes
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

STATUS = Path("/proc/self/status")


class Usage(NamedTuple):
    """Cost of one call: wall-clock seconds, CPU seconds, and peak memory in bytes above the memory before the call."""

    seconds: float
    cpu_seconds: float
    extra_bytes: int


def memory_bytes(field: str) -> int:
    """A field of this process's memory in bytes: VmRSS (resident), VmHWM (peak resident), RssAnon (anonymous)."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def measure_cpu(step: Callable[[], object], *, trim: bool = True) -> Usage:
    """Run a step on the CPU. Memory is resident memory.

    Args:
        trim: return free memory to the system first. The step could otherwise reuse it, which hides part of the peak.
    """
    if trim:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM
    before = memory_bytes("VmRSS")
    begin, cpu = time.perf_counter(), time.process_time()
    step()
    return Usage(time.perf_counter() - begin, time.process_time() - cpu, memory_bytes("VmHWM") - before)


def measure_cuda(step: Callable[[], object]) -> Usage:
    """Run a step on the GPU. Time is taken with CUDA events; memory is memory allocated by torch."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    before, cpu = torch.cuda.memory_allocated(), time.process_time()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    seconds = begin.elapsed_time(end) / 1000
    return Usage(seconds, time.process_time() - cpu, torch.cuda.max_memory_allocated() - before)


def write_json(path: Path | None, results: dict[str, Any]) -> None:
    """Write the results of a benchmark if a file was given."""
    if path:
        path.write_text(json.dumps(results, indent=2) + "\n")
