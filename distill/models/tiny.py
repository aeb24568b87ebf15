"""Tiny vision-language models from a config, with a tokenizer trained on the corpus: same classes as the real ones.

They make the whole chain run on a CPU without a model hub. The architecture is Qwen2.5-VL.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoProcessor,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available

from distill.errors import SettingsError

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class TinySettings:
    """Size of a tiny model."""

    hidden: int = 128
    """Width of the language model; a multiple of 32."""
    layers: int = 2
    """Layers of the language model."""
    vision_hidden: int = 64
    """Width of the vision tower; a multiple of 16."""
    vision_depth: int = 1
    """Layers of the vision tower."""
    vocabulary: int = 2048
    """Size of the byte-pair vocabulary trained on the corpus, special tokens included."""

    def __post_init__(self) -> None:
        for name, step in (("hidden", 32), ("layers", 1), ("vision_hidden", 16), ("vision_depth", 1)):
            value = getattr(self, name)
            if value < 1 or value % step:
                raise SettingsError(f"{name} is {value}; it takes a positive multiple of {step}")
        least = 256 + len(SPECIAL_TOKENS)
        if self.vocabulary < least:
            raise SettingsError(f"vocabulary is {self.vocabulary}; it takes {least} or more, for every byte is in it")


class ImageOnlyProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its video half, which needs torchvision; reads the standard directories."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **kwargs)


def processor_class(config: PretrainedConfig) -> Any:
    """What reads the processor of a model: AutoProcessor, but for Qwen2.5-VL without torchvision.

    Registering the image-only class with AutoProcessor would not do: a folder that names the standard class gets that.
    """
    image_only = isinstance(config, Qwen2_5_VLConfig) and not is_torchvision_available()
    return ImageOnlyProcessor if image_only else AutoProcessor


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer over `texts`, with Qwen's special tokens and chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> ImageOnlyProcessor:
    """Image processor (without torchvision) and tokenizer together."""
    return ImageOnlyProcessor(Qwen2VLImageProcessorPil(), tokenizer, chat_template=CHAT_TEMPLATE)


def build_config(settings: TinySettings, tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """A Qwen2.5-VL configuration of the given size. The embeddings are tied: untied, tiny models stay at chance."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    heads = settings.hidden // 32
    spread = settings.hidden**-0.5  # the usual 0.02 suits wide models; narrow ones hardly see a picture through it
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": settings.hidden,
            "intermediate_size": 2 * settings.hidden,
            "num_hidden_layers": settings.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 4096,
            "initializer_range": spread,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": settings.vision_depth,
            "hidden_size": settings.vision_hidden,
            "intermediate_size": 2 * settings.vision_hidden,
            "num_heads": settings.vision_hidden // 16,
            "out_hidden_size": settings.hidden,
            "fullatt_block_indexes": list(range(settings.vision_depth)),
            "initializer_range": spread,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        bos_token_id=None,
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
        tie_word_embeddings=True,
        initializer_range=spread,
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer that `train_tokenizer` made and `save_pretrained` stored."""
    return PreTrainedTokenizerFast.from_pretrained(folder)
