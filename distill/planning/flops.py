"""Floating-point operations that a pass through a model needs, counted from its modules; the meta device is enough."""

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

_PARTS = {
    "adapter": ("lora_",),
    "projection": ("merger", "projector", "connector"),  # of patches into tokens; may lie within the vision tower
    "vision": ("visual", "vision"),
}
"""How the modules of each part are named; what is named otherwise belongs to the language model."""


def flops(
    model: Any,
    *,
    tokens: float,
    logits: float,
    patches: float = 0,
    pairs: float = 0,
    backward: Literal["none", "activations", "all"] = "none",
) -> float:
    """FLOP of a forward pass, and of its backward pass: two for every multiply-add of a matrix product.

    A backward pass costs as much as the forward pass for the gradients of activations, and as much again for those of
    weights; attention, which has no weights, always takes twice its forward pass. Recomputation is not counted, nor is
    what is no matrix product, nor the attention between patches (1 to 2% of a vision tower at 400 patches).

    Args:
        model: a vision-language model of transformers, with or without an adapter of peft.
        tokens: positions that go through the language model, those of pictures included.
        logits: positions that go through the output head.
        patches: patches of pictures that go through the vision tower.
        pairs: (query, key) pairs in which a query sees the key, summed over all sequences; of one layer and head.
        backward: "none"; "activations" where all weights but an adapter's are frozen, so that no gradient enters the
            vision tower; "all" where all weights train.
    """
    sizes = _sums(model, lambda linear: linear.in_features * linear.out_features)  # a weight may be packed in 4 bits
    forward, of_weights = (1, 0) if backward == "none" else (2, int(backward == "all"))
    width, merged = _widths(model)
    pictures = patches * (sizes["vision"] + sizes["projection"] * width / merged)
    language = tokens * sizes["language"] + logits * sizes["head"]
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    queries = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    attention = 2 * pairs * queries * config.num_hidden_layers
    return 2.0 * (
        patches * sizes["patches"] * (1 + of_weights)  # pixels need no gradient
        + pictures * (1 + 2 * of_weights)
        + language * (forward + of_weights)
        + (tokens * sizes["adapter"] + attention) * (2 * forward - 1)
    )


def kept_values(model: Any, *, tokens: float, patches: float = 0, backward: Literal["activations", "all"]) -> float:
    """How many numbers a forward pass keeps for its backward pass, about: what goes into and out of matrix products.

    The output head is left out. In 16 bits that is 32 bytes for each token and unit of width in a plain transformer
    layer, for which Korthikanti et al. (arXiv 2205.05198, equation 2) count 34; attention is taken for a fused kernel.
    """
    widths = _sums(model, lambda linear: linear.in_features + linear.out_features)
    return tokens * (widths["language"] + widths["adapter"]) + patches * widths["vision"] * (backward == "all")


def patches(model: Any, pixels: torch.Tensor | None) -> int:
    """Patches of the pictures in a batch's `pixel_values`."""
    found = (module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Conv3d))
    size = next((module.weight[0].numel() for module in found), 0)
    return pixels.numel() // size if size and pixels is not None else 0


def _sums(model: Any, of: Callable[[nn.Linear], int]) -> Counter[str]:
    """Sums over the matrix products of each part; `patches` are the weights of what cuts a picture into patches."""
    head, sums = model.get_output_embeddings(), Counter[str]()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            sums["patches"] += module.weight.numel()
        elif isinstance(module, nn.Linear):
            sums["head" if module is head else _part(name)] += of(module)
    return sums


def _part(name: str) -> str:
    for part, words in _PARTS.items():
        if any(word in name for word in words):
            return part
    return "language"


def _widths(model: Any) -> tuple[int, int]:
    """How wide a patch is in the vision tower, and how wide the patches of one token are that the projection takes."""
    width = merged = 1
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and width == 1:
            width = merged = module.out_channels
        if isinstance(module, nn.Linear) and _part(name) == "projection":
            return width, module.in_features
    return width, merged
