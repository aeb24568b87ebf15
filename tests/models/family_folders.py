"""Folders of tiny models of published families: real classes, random weights, files named as in published folders."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import PretrainedConfig

from distill.models import tiny
from distill.models.text_models import model_class

WORDS = ["negative neutral positive", "the sentiment of a post with text and images", "Prediction: Text_analysis"]

TEMPLATE = (
    "{{% for message in messages %}}{bos}<|im_start|>{{{{ message['role'] }}}}\n"
    "{{% if message['content'] is string %}}{{{{ message['content'] }}}}{{% else %}}"
    "{{% for part in message['content'] %}}{{% if part['type'] == 'image' %}}{image}"
    "{{% elif part['type'] == 'video' %}}{video}"
    "{{% elif part['type'] == 'audio' %}}{audio}"
    "{{% elif part['type'] == 'text' %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}{{% endif %}}<|im_end|>\n"
    "{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)
"""A chat template; the families differ in the markers of media."""

Ids = Callable[[str], int]


@dataclass(frozen=True)
class TinyFamily:
    """How to build a tiny model of a family.

    Attributes:
        config: the config, given the vocabulary's size and a function from a token to its id.
        processor: content of `processor_config.json`; empty for a text-only model.
        image, video, audio: the markers of media in the chat template; empty for those that the model does not take.
        tokens: special tokens; those with a name are attributes of the tokenizer.
        bos: the BOS token, with which the chat template begins.
        image_size, attention: `model.image_size` and `model.attention` of the family.
        pictures: numbers of pictures of posts that a batch can hold.
    """

    config: Callable[[int, Ids], PretrainedConfig]
    processor: Mapping[str, Any]
    image: str
    tokens: Mapping[str, str] = field(default_factory=dict)
    more_tokens: tuple[str, ...] = ()
    bos: str = ""
    image_size: int = 56
    attention: str = "sdpa"
    pictures: tuple[int, ...] = (1, 2, 0, 1)
    video: str = ""
    audio: str = ""


def write(family: TinyFamily, folder: Path, seed: int = 0) -> Path:
    """Write the weights, the tokenizer and the processor's files; the video processor has no file of its own."""
    tokenizer = tiny.train_tokenizer(WORDS, 320)
    special = [token for token in (*family.more_tokens, family.bos, *family.tokens.values()) if token]
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in special], special_tokens=True)
    if family.bos:
        tokenizer.bos_token = family.bos
    tokenizer.init_kwargs |= family.tokens
    for name, token in family.tokens.items():
        tokenizer._set_model_specific_special_tokens({name: token})
    tokenizer.chat_template = TEMPLATE.format(
        image=family.image, video=family.video, audio=family.audio, bos="{{ bos_token }}" if family.bos else ""
    )
    torch.manual_seed(seed)
    config = family.config(len(tokenizer), tokenizer.convert_tokens_to_ids)
    model: Any = model_class(config).from_config(config)
    spread(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if family.processor:
        (folder / "processor_config.json").write_text(json.dumps(family.processor, indent=2))
    return folder


def spread(model: torch.nn.Module) -> None:
    """Give weights that are initialised to zero, such as gates of cross-attention, random values.

    Also embeddings of padding, which are not zero in published models: Gemma 3n takes the root of their mean square.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].normal_(0, 0.1)
        for weights in model.parameters():
            if not weights.any():
                weights.normal_(0, 0.5)
