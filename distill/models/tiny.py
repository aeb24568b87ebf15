"""Tiny Qwen2.5-VL and Qwen2.5-Omni models with random weights, and a tokenizer trained on the corpus.

They use the same transformers classes as pretrained models, so that the whole chain runs on a CPU without a model hub.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    WhisperFeatureExtractor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from distill.models.processors import VideoSettings, image_only, video_settings
from distill.settings import Range, Settings

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip

AUDIO_TOKENS = ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
"""Special tokens that follow in a vocabulary with sound."""

_NAMED_TOKENS = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>", "audio_bos_token": "<|audio_bos|>", "audio_token": "<|AUDIO|>",
    "audio_eos_token": "<|audio_eos|>",
}  # fmt: skip
"""Attributes of the tokenizer that the processor of Qwen2.5-Omni reads."""

_MELS = 80
"""Frequency bands of a spectrogram."""

CONTEXT = 4096
"""Number of positions of a tiny model."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

AUDIO_TEMPLATE = CHAT_TEMPLATE.replace(
    "{% elif part['type'] == 'text' %}",
    "{% elif part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>{% elif part['type'] == 'text' %}",
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
    audio_hidden: Annotated[int, Range(16, 8192, step=16)] | None = None
    """Hidden size of the audio tower, a multiple of 16: the model is a Qwen2.5-Omni, which hears; null: a Qwen2.5-VL,
    which does not."""
    audio_depth: Annotated[int, Range(1, 128)] = 1
    """Number of layers of the audio tower."""
    vocabulary: Annotated[int, Range(256 + len(SPECIAL_TOKENS), 1_000_000)] = 2048
    """Size of the byte-pair vocabulary trained on the corpus, including the 256 bytes and the special tokens."""


def train_tokenizer(texts: Iterable[str], vocabulary: int, audio: bool = False) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on `texts`, with Qwen's special tokens and chat template.

    Args:
        audio: whether it has the tokens of sounds, which models that hear need; other models can use it, too.
    """
    names = (*SPECIAL_TOKENS, *AUDIO_TOKENS) if audio else SPECIAL_TOKENS
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in names]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    trained = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(names[1:]),
        chat_template=AUDIO_TEMPLATE if audio else CHAT_TEMPLATE,
        padding_side="left",
    )
    if audio:
        trained.init_kwargs |= _NAMED_TOKENS
        trained._set_model_specific_special_tokens(_NAMED_TOKENS)
    return trained


def build_processor(tokenizer: PreTrainedTokenizerFast, settings: TinySettings | None = None) -> Any:
    """Combine an image processor (without torchvision), the tokenizer and, for a model that hears, a spectrogram."""
    images = Qwen2VLImageProcessorPil()
    video = VideoSettings(video_settings(images) | {"video_processor_type": "Qwen2VLVideoProcessor"})
    if settings is None or settings.audio_hidden is None:
        return image_only(Qwen2_5_VLProcessor)(images, tokenizer, video, chat_template=CHAT_TEMPLATE)
    sounds = WhisperFeatureExtractor(_MELS, chunk_length=300, return_attention_mask=True)
    return image_only(Qwen2_5OmniProcessor)(images, video, sounds, tokenizer, chat_template=AUDIO_TEMPLATE)


def build_config(settings: TinySettings, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """A Qwen2.5-VL or Qwen2.5-Omni config of the given size.

    The embeddings are tied: untied, tiny models stay at chance level.
    """
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*SPECIAL_TOKENS, *AUDIO_TOKENS)}
    heads = settings.hidden // 32
    initializer_std = settings.hidden**-0.5  # the usual 0.02 is too small here: narrow models then hardly use the image
    text = {
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
    }
    vision = {
        "depth": settings.vision_depth,
        "hidden_size": settings.vision_hidden,
        "intermediate_size": 2 * settings.vision_hidden,
        "num_heads": settings.vision_hidden // 16,
        "out_hidden_size": settings.hidden,
        "fullatt_block_indexes": list(range(settings.vision_depth)),
        "initializer_range": initializer_std,
    }
    common = {
        "text_config": text,
        "vision_config": vision,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": True,
        "initializer_range": initializer_std,
    }
    if settings.audio_hidden is None:
        return Qwen2_5_VLConfig(**common)
    audio = {
        "num_mel_bins": _MELS,
        "encoder_layers": settings.audio_depth,
        "encoder_attention_heads": settings.audio_hidden // 16,
        "encoder_ffn_dim": 2 * settings.audio_hidden,
        "d_model": settings.audio_hidden,
        "output_dim": settings.hidden,
        "initializer_range": initializer_std,
    }
    return Qwen2_5OmniThinkerConfig(
        **common,
        audio_config=audio,
        audio_token_id=ids["<|AUDIO|>"],
        audio_start_token_id=ids["<|audio_bos|>"],
        audio_end_token_id=ids["<|audio_eos|>"],
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer of `train_tokenizer` that was saved with `save_pretrained`."""
    return PreTrainedTokenizerFast.from_pretrained(folder)
