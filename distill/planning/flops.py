"""FLOPs and saved activations of a pass through a model, counted from its modules (meta device suffices)."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

_PARTS = {
    "adapter": ("lora_",),
    "projection": ("merger", "projector", "connector"),  # from patches to tokens; may be inside the vision tower
    "vision": ("visual", "vision"),
    "audio": ("audio",),
}
"""Substrings of the module names of each part; all other modules belong to the language model."""


_SOUND_MASKS = ("feature_attention_mask", "input_features_mask", "audio_attention_mask")
"""Names of the inputs that say which steps of a spectrogram are sound."""


def flops(
    model: Any,
    *,
    tokens: float,
    logits: float,
    patches: float = 0,
    pairs: float = 0,
    sounds: float = 0,
    backward: Literal["none", "activations", "all"] = "none",
) -> float:
    """Return the FLOPs of a forward pass and its backward pass: two per multiply-add of a matrix product.

    A backward pass costs as much as the forward pass for the gradients of activations, and as much again for those of
    weights; attention has no weights and always costs two forward passes. Not counted: recomputation, operations other
    than matrix products, attention between patches (1 to 2% of a vision tower at 400 patches).

    Args:
        model: a vision-language model of transformers, with or without a peft adapter.
        tokens: number of positions in the language model, including image tokens.
        logits: number of positions in the output head.
        patches: number of image patches in the vision tower.
        sounds: number of positions in the audio tower.
        pairs: number of (query, key) pairs that the mask allows, summed over all sequences, for one layer and head.
        backward: "none"; "activations" if only an adapter is trained, so that no gradient enters the vision tower;
            "all" if all weights are trained.
    """
    sizes = _sum_linear(
        model, lambda linear: linear.in_features * linear.out_features
    )  # not weight.numel(), which differs for 4-bit weights
    forward, weight_grads = (1, 0) if backward == "none" else (2, int(backward == "all"))
    width, merged = _widths(model)
    images = patches * (sizes["vision"] + sizes["projection"] * width / merged)
    language = tokens * sizes["language"] + logits * sizes["head"]
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    query_width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    attention = 2 * pairs * query_width * config.num_hidden_layers
    return 2.0 * (
        patches * sizes["patches"] * (1 + weight_grads)  # pixels need no gradient
        + (images + sounds * sizes["audio"]) * (1 + 2 * weight_grads)
        + language * (forward + weight_grads)
        + (tokens * sizes["adapter"] + attention) * (2 * forward - 1)
    )


def saved_activations(
    model: Any, *, tokens: float, patches: float = 0, sounds: float = 0, backward: Literal["activations", "all"]
) -> float:
    """Estimate how many values a forward pass saves for the backward pass: the inputs and outputs of matrix products.

    The output head is not included, and attention is assumed to be a fused kernel. In 16 bits, the estimate is 32 bytes
    per token and hidden unit of a standard transformer layer; Korthikanti et al. (arXiv 2205.05198, equation 2) count
    34.
    """
    widths = _sum_linear(model, lambda linear: linear.in_features + linear.out_features)
    towers = patches * widths["vision"] + sounds * widths["audio"] if backward == "all" else 0.0
    return tokens * (widths["language"] + widths["adapter"]) + towers


def count_patches(model: Any, features: Mapping[str, torch.Tensor]) -> int:
    """Return the number of image patches in a batch, of pictures and of videos."""
    size = next((module.weight[0].numel() for module in _patch_embeddings(model)), 0)
    pixels = sum(features[name].numel() for name in ("pixel_values", "pixel_values_videos") if name in features)
    return pixels // size if size else 0


def count_sounds(features: Mapping[str, torch.Tensor]) -> int:
    """Return the number of positions in the audio tower for a batch: one for two steps of a spectrogram."""
    masks = (features[name] for name in _SOUND_MASKS if name in features)
    return next((int(mask.sum()) // 2 for mask in masks), 0)


def _sum_linear(model: Any, value: Callable[[nn.Linear], int]) -> Counter[str]:
    """Sum `value` over the linear layers of each part; `patches` counts the weights of the patch embedding."""
    head = model.get_output_embeddings()
    sums = Counter({"patches": sum(module.weight.numel() for module in _patch_embeddings(model))})
    head = getattr(head, "base_layer", head)  # it may have an adapter
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            sums["head" if module is head else _part(name)] += value(module)
    return sums


def _patch_embeddings(model: Any) -> Iterator[nn.Conv2d | nn.Conv3d]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and _part(name) != "audio":
            yield module


def _part(name: str) -> str:
    for part, substrings in _PARTS.items():
        if any(substring in name for substring in substrings):
            return part
    return "language"


def _widths(model: Any) -> tuple[int, int]:
    """Return the width of a patch in the vision tower, and the input width of the projection for one image token."""
    width = merged = next((module.out_channels for module in _patch_embeddings(model)), 1)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and _part(name) == "projection":
            return width, module.in_features
    return width, merged
