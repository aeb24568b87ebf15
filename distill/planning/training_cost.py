"""What one training takes for each sample, as published and as its settings do it: tokens, FLOP, memory, bytes on disk.

The published procedure (MulCoT-RD, arXiv 2508.05234) gives each task a sequence of its own with its own picture, pads
it to the longest of the data set, computes logits at every position and asks the assistant in every epoch.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from distill.models.backbone import Backbone
from distill.planning.flops import flops, kept_values, patches
from distill.task.prompts import Template
from distill.task.sample import Sample
from distill.training.assistant import TrainSettings
from distill.training.batches import answer, encode, synthetic_answers
from distill.training.fused_loss import CPU_ELEMENTS, CUDA_ELEMENTS
from distill.training.soft_target_cache import bytes_per_token
from distill.training.student import DistillationSettings, StudentSettings

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Work:
    """What goes through a model for one sample, on average (`flops`); `longest` is the tokens of the longest sample."""

    tokens: float
    logits: float
    patches: float
    pairs: float
    longest: int


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on each device."""

    weights: float
    optimizer: float
    activations: float
    logits: float
    assistant: float

    @property
    def total(self) -> float:
        return self.weights + self.optimizer + self.activations + self.logits + self.assistant


Targets = Literal["none", "online", "cached"]
"""Where a student's soft targets come from."""


def work(samples: Sequence[Sample], backbone: Backbone, settings: TrainSettings) -> tuple[Work, Work]:
    """What the samples take as published, and with these settings; each has an answer to at least one task.

    Sequences that the settings pad to the longest of a batch count without their padding.

    Raises:
        ImageError: a picture cannot be read.
        SettingsError: the chat template does not let the questions share their pictures.
    """
    tasks: dict[Template, float] = settings.tasks  # type: ignore[assignment]
    alone = [_alone(sample, backbone, tasks) for sample in samples]
    widths = {task: max(lengths.get(task, 0) for lengths, _ in alone) for task in tasks}
    published = [_row([widths[task] for task in lengths], count) for lengths, count in alone]
    if takes_all_positions(settings):
        return _mean(published), _mean([_row(lengths.values(), count) for lengths, count in alone])
    return _mean(published), _mean([_packed(sample, backbone, tasks, settings.packing) for sample in samples])


def takes_all_positions(settings: TrainSettings) -> bool:
    """Whether the settings follow the published code in layout and logits."""
    return isinstance(settings, StudentSettings) and settings.distillation.positions == "all"


def flop(
    model: Any,
    settings: TrainSettings,
    published: Work,
    here: Work,
    *,
    assistant: Any = None,
    targets: Targets = "none",
    epochs: float = 1,
) -> tuple[float, float]:
    """FLOP of a sample in one epoch, as published and with these settings.

    Soft targets that are computed once are shared out among the epochs; from hidden states, the logits of the answer
    tokens are computed in every epoch.
    """
    backward: Literal["activations", "all"] = "activations" if settings.model.lora else "all"
    before, after = (_flops(model, layout, backward) for layout in (published, here))
    if targets == "none":
        return before, after
    assert isinstance(settings, StudentSettings)
    before += _flops(assistant, published)
    whole, head = _flops(assistant, here), flops(assistant, tokens=0, logits=here.logits)
    if targets == "online":
        return before, after + whole
    again = 0.0 if settings.distillation.top_k else head
    return before, after + (whole - again) / (epochs or 1) + again


def memory(
    backbone: Backbone,
    settings: TrainSettings,
    published: Work,
    here: Work,
    *,
    assistant: Backbone | None = None,
    targets: Targets = "none",
    half: bool = False,
    cuda: bool = False,
) -> tuple[DeviceMemory, DeviceMemory]:
    """An estimate for each device, as published and with these settings; the data set's longest samples in one batch.

    Logits are those of one tensor for each model where they are computed at all positions, and the buffers of
    `answer_loss` where they are not.

    Args:
        half: whether the arithmetic is in 16 bits.
    """
    weights, trained = sizes(backbone)
    model, size, vocabulary = backbone.model, settings.batch_size, len(backbone.head)
    beside = 0.0 if assistant is None or targets == "none" else sizes(assistant)[0]

    def of(layout: Work, positions: float, held: float) -> DeviceMemory:
        backward: Literal["activations", "all"] = "activations" if settings.model.lora else "all"
        values = kept_values(model, tokens=layout.longest, patches=layout.patches, backward=backward)
        activations = size * values * (2 if half else _BYTES[settings.model.dtype])
        return DeviceMemory(weights, 3 * trained, activations, 4 * vocabulary * positions, held)

    models = 1 + (targets != "none")
    before = of(published, models * size * published.longest, beside)
    if takes_all_positions(settings):
        return before, of(here, models * size * here.longest, beside)
    buffers = 1 + cuda
    if targets != "none":
        assert isinstance(settings, StudentSettings) and assistant is not None
        buffers += cuda if settings.distillation.top_k else 1
        if targets == "cached":
            beside = 0.0 if settings.distillation.top_k else head_bytes(assistant)
    chunk = min(size * here.logits, max((CUDA_ELEMENTS if cuda else CPU_ELEMENTS) // vocabulary, 1))
    return before, of(here, buffers * chunk, beside)


def sizes(backbone: Backbone) -> tuple[float, float]:
    """Bytes of all weights and of those that train."""
    settings = backbone.settings
    size = _BYTES[settings.dtype]
    trained = [weights for weights in backbone.model.parameters() if weights.requires_grad]
    count, all_ = (sum(weights.numel() for weights in part) for part in (trained, backbone.model.parameters()))
    if settings.lora is None:
        return all_ * size, count * size
    frozen = float(all_ - count) * size
    if settings.lora.quantize:  # matrices in 4 bits; of embeddings, output head and vectors peft makes float32
        matrices = [module for module in backbone.model.modules() if isinstance(module, torch.nn.Linear)]
        packed = sum(m.weight.numel() for m in matrices if not m.weight.requires_grad and m.weight is not backbone.head)
        frozen = 0.5 * packed + 4.0 * (all_ - count - packed)
    return frozen + 4 * count, 4 * count  # peft keeps adapters in float32


def head_bytes(backbone: Backbone) -> float:
    """Bytes of the output head."""
    return backbone.head.numel() * _BYTES[backbone.settings.dtype]


def disk_bytes(answer_tokens: float, options: DistillationSettings, assistant: Backbone) -> float:
    """What cached soft targets take on the disk: those of the tokens, and the output head where they need it."""
    rows = answer_tokens * bytes_per_token(assistant.head.shape[1], options.top_k)
    return rows + (0.0 if options.top_k else head_bytes(assistant))


def _flops(model: Any, layout: Work, backward: Literal["none", "activations", "all"] = "none") -> float:
    passed = {"tokens": layout.tokens, "logits": layout.logits, "patches": layout.patches, "pairs": layout.pairs}
    return flops(model, backward=backward, **passed)


def _alone(sample: Sample, backbone: Backbone, tasks: dict[Template, float]) -> tuple[dict[Template, int], int]:
    """Tokens of each task's own sequence, and the patches of all of them."""
    lengths, count = {}, 0
    for task in tasks:
        if (text := answer(task, sample, backbone.labels)) is not None:
            earlier = [synthetic_answers(sample, backbone.labels)] if task == "review" else None
            features = backbone.encode([sample], task, [text], earlier=earlier)
            lengths[task] = int(features["attention_mask"].sum())
            count += patches(backbone.model, features.get("pixel_values"))
    return lengths, count


def _packed(sample: Sample, backbone: Backbone, tasks: dict[Template, float], packing: bool) -> Work:
    """One row, or one for each task; of one row none is padded."""
    known = {task: weight for task, weight in tasks.items() if answer(task, sample, backbone.labels) is not None}
    tokens = logits = count = pairs = 0
    for row in [known] if packing else [{task: weight} for task, weight in known.items()]:
        batch = encode([sample], backbone, row, packing)
        width = batch.inputs["input_ids"].shape[1]
        ends = batch.inputs.get("ends", torch.tensor([[width] * width]))
        tokens, logits = tokens + width, logits + len(batch.tokens)
        pairs += int((ends - torch.arange(width)).sum())  # a column is seen from itself to where its branch is closed
        count += patches(backbone.model, batch.inputs.get("pixel_values"))
    return Work(tokens, logits, count, pairs, tokens)


def _row(lengths: Collection[int], count: int) -> Work:
    tokens = sum(lengths)
    return Work(tokens, tokens, count, sum(length * (length + 1) // 2 for length in lengths), tokens)


def _mean(parts: list[Work]) -> Work:
    n = len(parts)
    tokens, logits, count, pairs = (
        sum(getattr(part, name) for part in parts) / n for name in ("tokens", "logits", "patches", "pairs")
    )
    return Work(tokens, logits, count, pairs, max(part.longest for part in parts))
