"""Adapters as peft alone writes them: no processor, no config of the model, and a base model named by its path."""

from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoConfig

from distill.models.text_models import model_class

TARGETS = r".*language_model.*\.(q|v)_proj"


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | options)


def ia3() -> IA3Config:
    return IA3Config(target_modules=r".*language_model.*\.(k|v|down)_proj", feedforward_modules=r".*down_proj")


def write(folder: Path, base: Path, config: PeftConfig) -> PeftModel:
    """Write an adapter whose weights are random, and return the model that peft computes with."""
    torch.manual_seed(0)
    loaded = model_class(AutoConfig.from_pretrained(base)).from_pretrained(base)
    model = get_peft_model(loaded, config)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.requires_grad:
                weights.add_(torch.randn_like(weights) * 0.1)
    model.save_pretrained(folder)
    return model.eval()


def inputs() -> dict[str, torch.Tensor]:
    """Two texts of nine tokens."""
    ids = torch.randint(7, 260, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Logits [2, 9, V] of `inputs`, without dropout."""
    training = model.training
    found = model.eval()(**inputs()).logits
    model.train(training)
    return found
