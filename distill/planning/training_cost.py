"""Cost of one training per sample: tokens, FLOPs, memory and disk space.

Each cost is given twice, for the published procedure and for the settings of the recipe. The published procedure
(MulCoT-RD, arXiv 2508.05234) gives each task its own sequence with its own image, pads it to the longest of the data
set, computes logits at all positions and runs the assistant in every epoch.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from distill.models.backbone import Backbone
from distill.planning.flops import count_patches, count_sounds, flops, saved_activations
from distill.task.prompts import Template
from distill.task.sample import Sample
from distill.training.assistant import TrainSettings
from distill.training.batches import encode, row_lengths, synthetic_answers, target_answer
from distill.training.fused_loss import CPU_ELEMENTS, CUDA_ELEMENTS
from distill.training.sharding import units
from distill.training.soft_target_cache import bytes_per_token
from distill.training.student import DistillationSettings, StudentSettings

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class TokenCounts:
    """Mean counts per sample, as arguments of `flops`.

    Attributes:
        longest: number of tokens of the longest sample.
        answers: answer tokens with soft targets; those after the same tokens have the same logits. 0 where not counted.
        sounds: positions in the audio tower.
    """

    tokens: float
    logits: float
    patches: float
    pairs: float
    longest: int
    answers: float = 0
    sounds: float = 0


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes per device.

    Attributes:
        gathered: whole weights and gradients that a device holds at a time if they are sharded.
    """

    weights: float
    optimizer: float
    activations: float
    logits: float
    assistant: float
    gathered: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.optimizer + self.activations + self.logits + self.assistant + self.gathered


SoftTargetSource = Literal["none", "online", "cached"]
"""Source of a student's soft targets."""


def count_tokens(
    samples: Sequence[Sample], backbone: Backbone, settings: TrainSettings
) -> tuple[TokenCounts, TokenCounts]:
    """Return the counts of the published procedure and of these settings.

    Each sample must have an answer to at least one task, or teach a label distribution. Padding within a batch of these
    settings is not counted.

    Raises:
        ImageError: an image cannot be read.
        SettingsError: the chat template does not allow the prompts to share their images.
    """
    tasks: dict[Template, float] = settings.tasks  # type: ignore[assignment]
    separate = [_separate_lengths(sample, backbone, tasks) for sample in samples]
    widths = {task: max(lengths.get(task, 0) for lengths, _ in separate) for task in tasks}
    published = [_separate_counts([widths[task] for task in lengths], *media) for lengths, media in separate]
    if uses_all_positions(settings):
        return _mean(published), _mean([_separate_counts(lengths.values(), *media) for lengths, media in separate])
    labels, size = learns_labels(settings), settings.batch_size

    def packed(part: Sequence[Sample]) -> TokenCounts:
        return _packed_counts(part, backbone, tasks, settings.packing, labels)

    batches = _mean([packed(samples[first : first + size]) for first in range(0, len(samples), size)], len(samples))
    return _mean(published), replace(batches, longest=max(packed([sample]).longest for sample in samples))


def uses_all_positions(settings: TrainSettings) -> bool:
    """Whether the settings use the published layout, with logits at all positions."""
    return isinstance(settings, StudentSettings) and settings.distillation.positions == "all"


def learns_labels(settings: TrainSettings) -> bool:
    """Whether every sample has the prompt of a label distribution."""
    return isinstance(settings, StudentSettings) and settings.distillation.label_weight > 0


def training_flops(
    model: Any,
    settings: TrainSettings,
    published: TokenCounts,
    ours: TokenCounts,
    *,
    assistant: Any = None,
    source: SoftTargetSource = "none",
    epochs: float = 1,
) -> tuple[float, float]:
    """Return the FLOPs per sample and epoch of the published procedure and of these settings.

    The cost of cached soft targets is divided by the number of epochs; with cached hidden states, the assistant's
    logits of the answer tokens are computed in every epoch.
    """
    backward: Literal["activations", "all"] = "activations" if settings.model.lora else "all"
    before, after = (_flops(model, counts, backward) for counts in (published, ours))
    if source == "none":
        return before, after
    assert isinstance(settings, StudentSettings)
    before += _flops(assistant, published)
    full, head = _flops(assistant, ours), flops(assistant, tokens=0, logits=ours.logits)
    if source == "online":
        return before, after + full
    every_epoch = 0.0 if settings.distillation.top_k else head
    return before, after + (full - every_epoch) / (epochs or 1) + every_epoch


def training_memory(
    backbone: Backbone,
    settings: TrainSettings,
    published: TokenCounts,
    ours: TokenCounts,
    *,
    assistant: Backbone | None = None,
    source: SoftTargetSource = "none",
    half: bool = False,
    cuda: bool = False,
    shards: int = 1,
    images: bool = True,
) -> tuple[DeviceMemory, DeviceMemory]:
    """Estimate the memory per device of the published procedure and of these settings, for a batch of longest samples.

    The published procedure has all weights on each device. If logits are computed at all positions, one logits tensor
    per model is counted, otherwise the buffers of `answer_loss`.

    Args:
        half: whether training uses 16-bit arithmetic.
        cuda: whether training runs on a GPU.
        shards: devices among which weights, gradients and optimizer state are divided.
        images: whether every post has an image, so that each layer of a tower is gathered alone.
    """
    weights, trained = weight_bytes(backbone)
    model, batch_size, vocabulary = backbone.model, settings.batch_size, len(backbone.head)
    assistant_bytes = 0.0 if assistant is None or source == "none" else weight_bytes(assistant)[0]

    def estimate(counts: TokenCounts, positions: float, assistant_bytes: float) -> DeviceMemory:
        backward: Literal["activations", "all"] = "activations" if settings.model.lora else "all"
        values = saved_activations(
            model, tokens=counts.longest, patches=counts.patches, sounds=counts.sounds, backward=backward
        )
        activations = batch_size * values * (2 if half else _BYTES[settings.model.dtype])
        return DeviceMemory(weights, 3 * trained, activations, 4 * vocabulary * positions, assistant_bytes)

    models = 1 + (source != "none")
    before = estimate(published, models * batch_size * published.longest, assistant_bytes)

    def divided(memory: DeviceMemory) -> DeviceMemory:
        if shards == 1:
            return memory
        gathered = gathered_bytes(backbone, images=images)
        return replace(memory, weights=weights / shards, optimizer=3 * trained / shards, gathered=gathered)

    if uses_all_positions(settings):
        return before, divided(estimate(ours, models * batch_size * ours.longest, assistant_bytes))
    buffers = 1 + cuda
    if source != "none":
        assert isinstance(settings, StudentSettings) and assistant is not None
        buffers += cuda if settings.distillation.top_k else 1
        if source == "cached":
            assistant_bytes = 0.0 if settings.distillation.top_k else head_bytes(assistant)
    chunk = min(batch_size * ours.logits, max((CUDA_ELEMENTS if cuda else CPU_ELEMENTS) // vocabulary, 1))
    return before, divided(estimate(ours, buffers * chunk, assistant_bytes))


def weight_bytes(backbone: Backbone) -> tuple[float, float]:
    """Return the bytes of all weights and of the trainable ones."""
    settings = backbone.settings
    size = _BYTES[settings.dtype]
    trainable = [weights for weights in backbone.model.parameters() if weights.requires_grad]
    trained, total = (sum(weights.numel() for weights in part) for part in (trainable, backbone.model.parameters()))
    if settings.lora is None:
        return total * size, trained * size
    frozen = float(total - trained) * size
    if settings.lora.quantize:  # matrices in 4 bits; peft casts embeddings, output head and vectors to float32
        head = backbone.model.get_output_embeddings().weight  # type: ignore[operator]
        matrices = [module for module in backbone.model.modules() if isinstance(module, torch.nn.Linear)]
        packed = sum(m.weight.numel() for m in matrices if not m.weight.requires_grad and m.weight is not head)
        frozen = 0.5 * packed + 4.0 * (total - trained - packed)
    return frozen + 4 * trained, 4 * trained  # peft keeps adapters in float32


def gathered_bytes(backbone: Backbone, *, images: bool) -> float:
    """Return the bytes of whole weights, and gradients of trained ones, that a device holds when they are sharded.

    They are those of the root unit (embeddings, output head, and the towers unless every post has an image), of the
    layer that runs and of the next one.
    """
    dtype = _BYTES[backbone.settings.dtype]

    def size(weights: Iterable[torch.nn.Parameter]) -> float:
        adapter = 4 if backbone.settings.lora else dtype  # peft keeps adapters in float32
        return sum(w.numel() * (2 * adapter if w.requires_grad else dtype) for w in weights)

    layers = [list(layer.parameters()) for layer in units(backbone.model, all_used=images)]
    inside = {id(w) for layer in layers for w in layer}
    root = [w for w in backbone.model.parameters() if id(w) not in inside]
    return size(root) + 2 * max(map(size, layers), default=0.0)


def head_bytes(backbone: Backbone) -> float:
    """Return the bytes of the output head."""
    return backbone.head.numel() * _BYTES[backbone.settings.dtype]


def soft_target_bytes(answer_tokens: float, options: DistillationSettings, assistant: Backbone) -> float:
    """Return the bytes of cached soft targets on disk, including the output head that hidden states need."""
    rows = answer_tokens * bytes_per_token(assistant.head.shape[1], options.top_k)
    return rows + (0.0 if options.top_k else head_bytes(assistant))


def _flops(model: Any, counts: TokenCounts, backward: Literal["none", "activations", "all"] = "none") -> float:
    return flops(
        model, tokens=counts.tokens, logits=counts.logits, patches=counts.patches, sounds=counts.sounds,
        pairs=counts.pairs, backward=backward,
    )  # fmt: skip


def _separate_lengths(
    sample: Sample, backbone: Backbone, tasks: dict[Template, float]
) -> tuple[dict[Template, int], tuple[int, int]]:
    """Return the tokens of a separate sequence for each task, and the patches and sound positions of all sequences."""
    lengths, patches, sounds = {}, 0, 0
    for task in tasks:
        if (text := target_answer(task, sample, backbone.labels)) is not None:
            earlier = [synthetic_answers(sample, backbone.labels)] if task == "review" else None
            features = backbone.encode([sample], task, [text], earlier=earlier)
            lengths[task] = int(features["attention_mask"].sum())
            patches += count_patches(backbone.model, features)
            sounds += count_sounds(features)
    return lengths, (patches, sounds)


def _packed_counts(
    samples: Sequence[Sample], backbone: Backbone, tasks: dict[Template, float], packing: bool, labels: bool
) -> TokenCounts:
    """Return the sums over a batch, without its padding."""
    count = len(backbone.labels)
    targets = {sample.id: [1 / count] * count for sample in samples} if labels else {}
    batch = encode(samples, backbone, tasks, packing, targets)
    lengths = row_lengths(batch)
    pairs = int((lengths * (lengths + 1) // 2).sum())
    if (ends := batch.inputs.get("ends")) is not None:  # visible from itself to its branch's end
        columns = torch.arange(ends.shape[1])
        pairs = int(((ends - columns) * (columns < lengths[:, None])).sum())
    tokens, logits = int(lengths.sum()), len(batch.positions.unique())
    patches, sounds = count_patches(backbone.model, batch.inputs), count_sounds(batch.inputs)
    return TokenCounts(tokens, logits, patches, pairs, tokens, len(batch.tokens), sounds)


def _separate_counts(lengths: Collection[int], patches: int, sounds: int) -> TokenCounts:
    """Return the counts of causal sequences with logits at all positions."""
    tokens, pairs = sum(lengths), sum(length * (length + 1) // 2 for length in lengths)
    return TokenCounts(tokens, tokens, patches, pairs, tokens, sounds=sounds)


def _mean(parts: list[TokenCounts], samples: int = 0) -> TokenCounts:
    """Return the mean over the samples; by default each part has one."""
    n = samples or len(parts)
    names = "tokens", "logits", "patches", "pairs", "answers", "sounds"
    mean = {name: sum(getattr(part, name) for part in parts) / n for name in names}
    return TokenCounts(**mean, longest=max(part.longest for part in parts))
