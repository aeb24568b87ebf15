"""Attention masks of packed rows: whole for normal rows, block by block for long ones.

A mask of T x T entries grows with the square of a row; the attention kernels keep a copy of it for each layer. Rows of
more than BLOCK tokens are therefore attended to in blocks of queries, whose masks are rebuilt in the backward pass.
"""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from distill.models.packing import tree_mask

BLOCK = 2048
"""Largest number of queries whose mask is built at once."""


def layers_with_state(config: Any) -> list[str]:
    """The kinds of layers of a language model that ignore the mask of packed rows, such as linear attention.

    They carry a state through all tokens of a sequence, or attend in chunks.
    """
    kinds = getattr(config, "layer_types", None) or ()
    return sorted({*kinds} - {"full_attention", "sliding_attention"})


def attention_mask(ends: torch.Tensor, attention: str, config: Any) -> torch.Tensor | dict[str, torch.Tensor]:
    """The `attention_mask` argument of a model from `ends` [B, T] of packed rows.

    Args:
        config: of the language model; its layers may have sliding windows.

    Returns:
        The mask [B, 1, T, T]: boolean for sdpa, added to the scores for eager. For sdpa and T > BLOCK, `ends` itself as
        integers [B, 1, 1, T], from which the attention function below builds the mask of each block. A dictionary of
        masks by type of layer if only some layers have a window.
    """
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if not window or (kinds and "sliding_attention" not in kinds) or window >= ends.shape[1]:
        if attention == "sdpa" and ends.shape[1] > BLOCK:
            return ends[:, None, None]
        return _for_kernel(tree_mask(ends), attention)
    mask = tree_mask(ends)
    depths = mask.sum(-1)
    windowed = _for_kernel(mask & (depths[..., :, None] - depths[..., None, :] < window), attention)
    return {"full_attention": _for_kernel(mask, attention), "sliding_attention": windowed} if kinds else windowed


def _for_kernel(mask: torch.Tensor, attention: str) -> torch.Tensor:
    if attention != "eager":
        return mask
    zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return zeros.masked_fill(~mask, torch.finfo(torch.float32).min)


def _sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa attention; integers [B, 1, 1, T] instead of a mask are the `ends` of packed rows."""
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    def attend(begin: int, end: int, *states: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(begin, end, device=query.device)[:, None]
        mask = (rows >= torch.arange(end, device=query.device)) & (rows < attention_mask[..., :end])
        return sdpa_attention_forward(module, *states, mask, **options)[0]

    blocks = []
    for begin in range(0, query.shape[2], BLOCK):
        end = min(begin + BLOCK, query.shape[2])
        states = query[:, :, begin:end], key[:, :, :end], value[:, :, :end]
        if torch.is_grad_enabled():
            blocks.append(checkpoint(attend, begin, end, *states, use_reentrant=False))
        else:
            blocks.append(attend(begin, end, *states))
    return torch.cat(blocks, 1), None


AttentionInterface.register("sdpa", _sdpa)
