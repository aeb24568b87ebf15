"""The sides of a student step, each with its models in a process of its own: what they do, hold and need."""

import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import published
import torch
import torch.nn.functional as F
import workload
from workload import TASKS

from distill.models import tiny
from distill.models.backbone import Backbone, LoraSettings
from distill.models.packing import tree_mask
from distill.planning.flops import flops
from distill.task.sample import Sample
from distill.training import soft_target_cache
from distill.training.batches import Batch, check_exact, encode
from distill.training.fused_loss import answer_loss
from distill.training.soft_target_cache import CachedTargets
from distill.training.soft_targets import SoftTargets
from distill.training.student import DistillationSettings, StudentModule, StudentSettings

SIDES = ("published", "online", "cached")
SIZES = {"tiny": ("tiny-64", "tiny-128"), "published": ("Qwen2.5-VL-3B", "Qwen2.5-VL-7B")}
WEIGHT, TEMPERATURE = 0.3, 2.0


@dataclass(frozen=True)
class Case:
    """What is measured. `folder` holds what the processes share: the tokenizer and the soft targets."""

    size: str
    device: str
    lora: bool
    image_size: int
    batch_size: int
    threads: int
    samples: list[Sample]
    widths: dict[Any, int]
    folder: Path

    def batch(self, index: int) -> list[Sample]:
        return self.samples[index * self.batch_size : (index + 1) * self.batch_size]

    def models(self, student_on: str, assistant_on: str | None) -> tuple[Backbone, Backbone | None]:
        """Student and assistant, the same in every process."""
        torch.set_num_threads(self.threads)
        words = tiny.load_tokenizer(self.folder / "tokenizer")
        options: dict[str, Any] = {"image_size": self.image_size, "batch_size": self.batch_size}
        lora = LoraSettings() if self.lora else None
        student = workload.build(SIZES[self.size][0], words, student_on, seed=1, lora=lora, **options)
        if assistant_on is None:
            return student, None
        return student, workload.build(SIZES[self.size][1], words, assistant_on, seed=2, **options)

    def autocast(self) -> torch.autocast:
        """As recipes train: on a GPU the arithmetic is bfloat16, adapters and their optimizer float32."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")


@dataclass
class Run:
    """One step: seconds of preparing its batch, its own by the clock and of the processor, bytes above the models,
    tokens, positions that get logits, FLOP."""

    preparing: float
    seconds: float
    processor_seconds: float
    extra_bytes: int
    tokens: int
    logits: int
    flop: float


class Side:
    """One side with its models. `weights_bytes` is what those take, of a written assistant its output head."""

    def __init__(self, case: Case, name: str) -> None:
        self.case, self.name = case, name
        self.student, self.assistant = case.models(case.device, None if name == "cached" else case.device)
        soft = CachedTargets(*_cache(case, self.student)) if self.assistant is None else None
        self.module = _module(self.student, self.assistant, soft, "all" if name == "published" else "response")
        self.optimizer = self.module.configure_optimizers()["optimizer"]
        weights = list(self.student.model.parameters())
        weights += [soft.head] if soft else self.assistant.model.parameters()  # type: ignore[list-item,union-attr]
        self.weights_bytes = sum(weight.nbytes for weight in weights)

    def run(self, index: int) -> Run:
        begin = time.perf_counter()
        batch = self.prepare(self.case.batch(index))
        preparing = time.perf_counter() - begin
        taken = (on_gpu if self.case.device == "cuda" else on_cpu)(lambda: self.step(batch))
        return Run(preparing, *taken, *self.needs(batch))

    def prepare(self, samples: Sequence[Sample]) -> Any:
        """A batch on the device."""
        if self.name == "published":
            return _to(self.case.device, published.encode(samples, self.student, self.case.widths))
        return Batch(**_to(self.case.device, self.module.encode(samples)._asdict()))

    def step(self, batch: Any) -> None:
        with self.case.autocast():
            if self.name == "published":
                assert self.assistant is not None
                loss = published.loss(self.student.model, self.assistant.model, batch, WEIGHT, TEMPERATURE)
            else:
                loss = self.module.loss(batch).total
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def needs(self, batch: Any) -> tuple[int, int, float]:
        """Tokens that the language model reads, positions that get logits, FLOP."""
        parts = (
            [_padded(rows) for rows in batch.values()] if isinstance(batch, dict) else [_packed(batch, self.student)]
        )
        backward: Any = "activations" if self.case.lora else "all"
        flop = sum(flops(self.student.model, **part, backward=backward) for part in parts)
        tokens, logits = (sum(part[name] for part in parts) for name in ("tokens", "logits"))
        if self.assistant is not None:
            flop += sum(flops(self.assistant.model, **part) for part in parts)
        else:  # the assistant's logits are computed from its hidden states
            head = self.module.soft_targets.head  # type: ignore[union-attr]
            flop += 2.0 * logits * head.numel()  # type: ignore[union-attr]
        return tokens, logits, flop


held: dict[str, Side] = {}


def measure(case: Case, side: str, index: int) -> tuple[Run, int]:
    """One step of a side, which stays in its process; and what its models take."""
    if side not in held:
        held[side] = Side(case, side)
    return held[side].run(index), held[side].weights_bytes


def write_targets(case: Case) -> float:
    """Write what `cached` reads; seconds a sample. Of the student only the processor is needed."""
    student, assistant = case.models("meta", case.device)
    assert assistant is not None
    asked = SoftTargets(assistant, student)
    folder, key = _cache(case, student)

    def write(folder: Path, samples: Sequence[Sample]) -> float:
        begin = time.perf_counter()
        soft_target_cache.write(
            folder, samples, key, lambda rows: encode(rows, student, TASKS, True), lambda: asked, device=case.device
        )
        return (time.perf_counter() - begin) / len(samples)

    write(case.folder / "first", case.batch(0))  # a warm-up, which is not counted
    return write(folder, case.samples)


def check_baseline(case: Case) -> dict[str, float]:
    """How far the baseline's two terms are from those of `positions: all`, each relative to its size."""
    student, assistant = case.models(case.device, case.device)
    assert assistant is not None
    batch = _to(case.device, published.encode(case.batch(0), student, case.widths))
    module = _module(student, assistant, None, "all").eval()
    with torch.no_grad(), case.autocast():
        parts = [module.published_loss(features) for features in batch.values()]
        hard, soft = (sum(getattr(part, name) for part in parts) for name in ("hard", "soft"))
        cross_entropy, divergence = (
            published.loss(student.model, assistant.model, batch, weight, TEMPERATURE) for weight in (0.0, 1.0)
        )
    return {"published cross-entropy": _gap(cross_entropy, hard), "published KL": _gap(divergence, soft)}


def check_ours(case: Case) -> dict[str, float]:
    """How far each of our terms and its gradient is from the plain formula's, and the KL's gradient with targets read
    from disk from that with an assistant asked, each relative to its largest entry; after packed sequences were held
    against unpacked ones.

    Raises:
        SettingsError: packed and unpacked sequences differ.
    """
    student, assistant = case.models(case.device, case.device)
    assert assistant is not None
    samples = case.batch(0)
    check_exact(student, samples, list(TASKS), True)
    module = _module(student, assistant, None, "response").eval()
    packed = Batch(**_to(case.device, module.encode(samples)._asdict()))
    cached = CachedTargets(*_cache(case, student))
    with torch.no_grad(), case.autocast():
        hidden = module.hidden_states(packed)
        targets = module.soft_targets(packed)  # type: ignore[misc]
        read = cached(packed._replace(soft=_to(case.device, cached.read(samples))))
    hidden.requires_grad_()

    def ours(soft: Any, weight: float) -> torch.Tensor:
        with case.autocast():
            return answer_loss(hidden, student.head, packed.tokens, packed.shares, soft, weight, TEMPERATURE).total

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, hidden)[0]

    found = {}
    for name, weight in (("cross-entropy", 0.0), ("KL", 1.0)):
        fused, plain = ours(targets, weight), _plain(hidden, student.head, packed, *targets, weight)
        found[name] = _gap(fused, plain)
        asked = gradient(fused)
        found[f"gradient of the {name}"] = _gap(asked, gradient(plain))
    return found | {"gradient of the KL from cached targets": _gap(gradient(ours(read, 1.0)), asked)}


def _gap(found: Any, expected: Any) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def _plain(
    hidden: torch.Tensor, head: torch.Tensor, batch: Batch, assistant: torch.Tensor, assistant_head: torch.Tensor,
    weight: float,
) -> torch.Tensor:  # fmt: skip
    """The loss of the answer tokens from the logits of all of them at once."""
    z, a = hidden.float() @ head.float().T, assistant.float() @ assistant_head.float().T
    ids = min(z.shape[1], a.shape[1])
    hard = F.cross_entropy(z[:, :ids], batch.tokens, reduction="none")
    log_p, log_q = (F.log_softmax(logits[:, :ids] / TEMPERATURE, -1) for logits in (z, a))
    soft = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    return (batch.shares * ((1 - weight) * hard + weight * soft)).sum()


def _module(student: Backbone, assistant: Backbone | None, soft: Any, positions: Any) -> StudentModule:
    settings = StudentSettings(distillation=DistillationSettings(WEIGHT, TEMPERATURE, positions))
    module = StudentModule(student, settings, soft if assistant is None else SoftTargets(assistant, student))
    module.model.train()  # the module's own mode is not its model's
    return module


def _cache(case: Case, student: Backbone) -> tuple[Path, soft_target_cache.Key]:
    return case.folder / f"targets-{case.batch_size}", soft_target_cache.keys(
        student, list(TASKS), "random weights", 0, TEMPERATURE
    )


def _padded(rows: Any) -> dict[str, Any]:
    count, width = rows["input_ids"].shape
    return {"tokens": count * width, "logits": count * width, "pairs": count * width * (width + 1) / 2,
            "patches": len(rows["pixel_values"])}  # fmt: skip


def _packed(batch: Batch, student: Backbone) -> dict[str, Any]:
    inputs = batch.inputs
    padding = int((inputs["input_ids"] == student.processor.tokenizer.pad_token_id).sum())
    pairs = int(tree_mask(inputs["ends"]).sum()) - padding  # a padded column sees itself
    return {"tokens": inputs["input_ids"].numel() - padding, "logits": len(batch.tokens), "pairs": pairs,
            "patches": len(inputs["pixel_values"])}  # fmt: skip


def _to(device: str, value: Any) -> Any:
    return {name: _to(device, part) for name, part in value.items()} if isinstance(value, dict) else value.to(device)


def on_cpu(step: Callable[[], object]) -> tuple[float, float, int]:
    """Seconds by the clock and of the processor, and bytes of resident memory at the peak above those before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free is given back, lest it hide a part of the peak
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    begin, busy = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - begin, time.process_time() - busy, memory("VmHWM") - before


def memory(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def on_gpu(step: Callable[[], object]) -> tuple[float, float, int]:
    """The same by the device's own events and torch's allocator."""
    torch.cuda.reset_peak_memory_stats()
    before, busy = torch.cuda.memory_allocated(), time.process_time()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    seconds = begin.elapsed_time(end) / 1000
    return seconds, time.process_time() - busy, torch.cuda.max_memory_allocated() - before
