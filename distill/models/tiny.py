"""Tiny Qwen2.5-VL models with random weights, and a tokenizer trained on the corpus.

They use the same transformers classes as pretrained models, so that the whole chain runs on a CPU without a model hub.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from distill.models.processors import VideoSettings, image_only, video_settings
from distill.settings import Range, Settings

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip

CONTEXT = 4096
"""Number of positions of a tiny model."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class TinySettings(Settings):
    """Size of a tiny model."""

    hidden: Annotated[int, Range(32, 8192, step=32)] = 128
    """Hidden size of the language model; a multiple of 32."""
    layers: Annotated[int, Range(1, 128)] = 2
    """Number of layers of the language model."""
    vision_hidden: Annotated[int, Range(16, 8192, step=16)] = 64
    """Hidden size of the vision tower; a multiple of 16."""
    vision_depth: Annotated[int, Range(1, 128)] = 1
    """Number of layers of the vision tower."""
    vocabulary: Annotated[int, Range(256 + len(SPECIAL_TOKENS), 1_000_000)] = 2048
    """Size of the byte-pair vocabulary trained on the corpus, including the 256 bytes and the special tokens."""


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on `texts`, with Qwen's special tokens and chat template."""
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


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    """Combine an image processor (without torchvision) and the tokenizer."""
    images = Qwen2VLImageProcessorPil()
    video = VideoSettings(video_settings(images) | {"video_processor_type": "Qwen2VLVideoProcessor"})
    return image_only(Qwen2_5_VLProcessor)(images, tokenizer, video, chat_template=CHAT_TEMPLATE)


def build_config(settings: TinySettings, tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """A Qwen2.5-VL config of the given size. The embeddings are tied: untied, tiny models stay at chance level."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    heads = settings.hidden // 32
    initializer_std = settings.hidden**-0.5  # the usual 0.02 is too small here: narrow models then hardly use the image
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": settings.hidden,
            "intermediate_size": 2 * settings.hidden,
            "num_hidden_layers": settings.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": CONTEXT,
            "initializer_range": initializer_std,
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
            "initializer_range": initializer_std,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        bos_token_id=None,
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
        tie_word_embeddings=True,
        initializer_range=initializer_std,
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer of `train_tokenizer` that was saved with `save_pretrained`."""
    return PreTrainedTokenizerFast.from_pretrained(folder)
