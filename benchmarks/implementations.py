"""The implementations that `student_step.py` compares: their steps, memory and FLOP, and checks that they agree.

Each implementation runs in its own process with its own models.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import published
import torch
import torch.nn.functional as F
import workload
from measuring import Usage, measure_cpu, measure_cuda
from workload import TASKS

from distill.models import tiny
from distill.models.backbone import Backbone, LoraSettings
from distill.models.packing import tree_mask
from distill.planning.flops import flops
from distill.task.sample import Sample
from distill.training import soft_target_cache
from distill.training.batches import Batch, check_compatibility, encode
from distill.training.fused_loss import answer_loss
from distill.training.soft_target_cache import CachedTargets
from distill.training.soft_targets import OnlineTargets
from distill.training.student import DistillationSettings, StudentModule, StudentSettings

IMPLEMENTATIONS = ("published", "online", "cached")
SIZES = {"tiny": ("tiny-64", "tiny-128"), "published": ("Qwen2.5-VL-3B", "Qwen2.5-VL-7B")}
"""Student and assistant of each size, by their names in `workload.MODELS`."""
WEIGHT, TEMPERATURE = 0.3, 2.0


@dataclass(frozen=True)
class Case:
    """One measured configuration. `folder` holds the tokenizer and the soft targets, which the processes share."""

    size: str
    device: str
    lora: bool
    image_size: int
    batch_size: int
    threads: int
    samples: list[Sample]
    padded_lengths: dict[Any, int]
    folder: Path

    def batch(self, index: int) -> list[Sample]:
        return self.samples[index * self.batch_size : (index + 1) * self.batch_size]

    def models(self, student_device: str, assistant_device: str | None) -> tuple[Backbone, Backbone | None]:
        """Student and assistant, with the same weights in every process."""
        torch.set_num_threads(self.threads)
        tokenizer = tiny.load_tokenizer(self.folder / "tokenizer")
        options: dict[str, Any] = {"image_size": self.image_size, "batch_size": self.batch_size}
        lora = LoraSettings() if self.lora else None
        student = workload.build_model(SIZES[self.size][0], tokenizer, student_device, seed=1, lora=lora, **options)
        if assistant_device is None:
            return student, None
        return student, workload.build_model(SIZES[self.size][1], tokenizer, assistant_device, seed=2, **options)

    def autocast(self) -> torch.autocast:
        """Mixed precision as in training: bfloat16 arithmetic on a GPU, with float32 adapters and optimizer."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")


@dataclass
class Run:
    """One step. `preparing` is the time to prepare its batch in seconds, `logits` the number of positions with logits.

    `seconds`, `cpu_seconds` and `extra_bytes` are those of `measuring.Usage`.
    """

    preparing: float
    seconds: float
    cpu_seconds: float
    extra_bytes: int
    tokens: int
    logits: int
    flop: float


class Implementation:
    """One implementation with its models. `weights_bytes` is their size; for `cached`, student and assistant head."""

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
        usage: Usage = (measure_cuda if self.case.device == "cuda" else measure_cpu)(lambda: self.step(batch))
        return Run(preparing, *usage, *self.cost(batch))

    def prepare(self, samples: Sequence[Sample]) -> Any:
        """An encoded batch on the device."""
        if self.name == "published":
            return _to(self.case.device, published.encode(samples, self.student, self.case.padded_lengths))
        return Batch(**_to(self.case.device, self.module.encode(samples)._asdict()))

    def step(self, batch: Any) -> None:
        """Loss, backward and optimizer step."""
        with self.case.autocast():
            if self.name == "published":
                assert self.assistant is not None
                loss = published.loss(self.student.model, self.assistant.model, batch, WEIGHT, TEMPERATURE)
            else:
                loss = self.module.loss(batch).total
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def cost(self, batch: Any) -> tuple[int, int, float]:
        """Returns the tokens that the language model reads, the positions with logits, and the FLOP of a step."""
        parts = (
            [_padded_cost(features) for features in batch.values()]
            if isinstance(batch, dict)
            else [_packed_cost(batch, self.student)]
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


loaded: dict[str, Implementation] = {}


def measure(case: Case, name: str, index: int) -> tuple[Run, int]:
    """Returns one measured step of an implementation and its `weights_bytes`. The models stay in the process."""
    if name not in loaded:
        loaded[name] = Implementation(case, name)
    return loaded[name].run(index), loaded[name].weights_bytes


def write_targets(case: Case) -> float:
    """Write the soft targets that `cached` reads. Returns seconds per sample. The student's weights are not loaded."""
    student, assistant = case.models("meta", case.device)
    assert assistant is not None
    soft_targets = OnlineTargets(assistant, student)
    folder, key = _cache(case, student)

    def write(folder: Path, samples: Sequence[Sample]) -> float:
        begin = time.perf_counter()
        soft_target_cache.write(
            folder, samples, key, lambda rows: encode(rows, student, TASKS, True), lambda: soft_targets,
            device=case.device,
        )  # fmt: skip
        return (time.perf_counter() - begin) / len(samples)

    write(case.folder / "first", case.batch(0))  # warm-up, not timed
    return write(folder, case.samples)


def check_baseline(case: Case) -> dict[str, float]:
    """Relative differences between the two loss terms of `published` and those of `positions: all`."""
    student, assistant = case.models(case.device, case.device)
    assert assistant is not None
    batch = _to(case.device, published.encode(case.batch(0), student, case.padded_lengths))
    module = _module(student, assistant, None, "all").eval()
    with torch.no_grad(), case.autocast():
        parts = [module.published_loss(features) for features in batch.values()]
        hard, soft = (sum(getattr(part, name) for part in parts) for name in ("hard", "soft"))
        cross_entropy, divergence = (
            published.loss(student.model, assistant.model, batch, weight, TEMPERATURE) for weight in (0.0, 1.0)
        )
    return {
        "published cross-entropy": _relative_difference(cross_entropy, hard),
        "published KL": _relative_difference(divergence, soft),
    }


def check_ours(case: Case) -> dict[str, float]:
    """Relative differences of the fused loss, each by its largest entry.

    Packed sequences are first checked against unpacked ones. Then each term of the fused loss and its gradient is
    compared with the plain formula, and the gradient of KL with cached targets with that of online targets.

    Raises:
        SettingsError: packed and unpacked sequences differ.
    """
    student, assistant = case.models(case.device, case.device)
    assert assistant is not None
    samples = case.batch(0)
    check_compatibility(student, samples, list(TASKS), True)
    module = _module(student, assistant, None, "response").eval()
    packed = Batch(**_to(case.device, module.encode(samples)._asdict()))
    cache = CachedTargets(*_cache(case, student))
    with torch.no_grad(), case.autocast():
        hidden = module.hidden_states(packed)
        online = module.soft_targets(packed)  # type: ignore[misc]
        cached = cache(packed._replace(soft_targets=_to(case.device, cache.read(samples))))
    hidden.requires_grad_()

    def fused_loss(soft: Any, weight: float) -> torch.Tensor:
        with case.autocast():
            return answer_loss(
                hidden, student.head, packed.tokens, packed.loss_weights, soft, weight, TEMPERATURE
            ).total

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, hidden)[0]

    differences = {}
    for name, weight in (("cross-entropy", 0.0), ("KL", 1.0)):
        fused = fused_loss(online, weight)
        plain = _plain_loss(hidden, student.head, packed, online.hidden, online.head, weight)
        differences[name] = _relative_difference(fused, plain)
        fused_gradient = gradient(fused)
        differences[f"gradient of the {name}"] = _relative_difference(fused_gradient, gradient(plain))
    differences["gradient of the KL from cached targets"] = _relative_difference(
        gradient(fused_loss(cached, 1.0)), fused_gradient
    )
    return differences


def _relative_difference(actual: Any, expected: Any) -> float:
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


def _plain_loss(
    hidden: torch.Tensor, head: torch.Tensor, batch: Batch, assistant: torch.Tensor, assistant_head: torch.Tensor,
    weight: float,
) -> torch.Tensor:  # fmt: skip
    """The loss over the answer tokens, from the logits of all of them at once."""
    z, a = hidden.float() @ head.float().T, assistant.float() @ assistant_head.float().T
    ids = min(z.shape[1], a.shape[1])
    hard = F.cross_entropy(z[:, :ids], batch.tokens, reduction="none")
    log_p, log_q = (F.log_softmax(logits[:, :ids] / TEMPERATURE, -1) for logits in (z, a))
    soft = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    return (batch.loss_weights * ((1 - weight) * hard + weight * soft)).sum()


def _module(student: Backbone, assistant: Backbone | None, soft: Any, positions: Any) -> StudentModule:
    settings = StudentSettings(distillation=DistillationSettings(WEIGHT, TEMPERATURE, positions))
    module = StudentModule(student, settings, soft if assistant is None else OnlineTargets(assistant, student))
    module.model.train()  # the mode of the module does not set that of its model
    return module


def _cache(case: Case, student: Backbone) -> tuple[Path, soft_target_cache.KeyFunction]:
    return case.folder / f"targets-{case.batch_size}", soft_target_cache.key_function(
        student, list(TASKS), "random weights", 0, TEMPERATURE
    )


def _padded_cost(features: Any) -> dict[str, Any]:
    count, length = features["input_ids"].shape
    return {"tokens": count * length, "logits": count * length, "pairs": count * length * (length + 1) / 2,
            "patches": len(features["pixel_values"])}  # fmt: skip


def _packed_cost(batch: Batch, student: Backbone) -> dict[str, Any]:
    inputs = batch.inputs
    padding = int((inputs["input_ids"] == student.processor.tokenizer.pad_token_id).sum())
    pairs = int(tree_mask(inputs["ends"]).sum()) - padding  # a padding position attends to itself
    return {"tokens": inputs["input_ids"].numel() - padding, "logits": len(batch.tokens), "pairs": pairs,
            "patches": len(inputs["pixel_values"])}  # fmt: skip


def _to(device: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _to(device, part) for name, part in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value
