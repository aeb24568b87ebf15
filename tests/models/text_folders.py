"""Folders of small text-only models with random weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Lfm2Config, LlamaConfig, Qwen3Config

from distill.models import tiny

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>me\n"
)
"""As in most text-only models, the content of a message is a string."""

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
WINDOW = 24

CONFIGS: dict[str, Any] = {
    "llama": lambda **ids: LlamaConfig(**SIZES, **ids),
    "qwen3": lambda **ids: Qwen3Config(**SIZES, **ids),
    "gemma3": lambda **ids: Gemma3TextConfig(
        **SIZES, **ids, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "lfm2": lambda **ids: Lfm2Config(
        **SIZES, **ids, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
    ),
}
"""The configs by name; a prompt about a post is longer than Gemma's window, and LFM2 has a layer with a state."""


def write(folder: Path, kind: str, tokenizer_folder: Path, template: str | None = TEMPLATE, layers: int = 2) -> Path:
    """Write a model with the tokenizer of the tests. Returns its folder."""
    tokenizer = tiny.load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = template
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = CONFIGS[kind](**ids, bos_token_id=None)
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for weights in model.parameters():  # large enough that every token changes what follows
        torch.nn.init.normal_(weights, 0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
