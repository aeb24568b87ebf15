"""What model families can do that their configs do not say, by `model_type`; one row per family.

A family without a row is treated like Llama with images: packed, and checked before training. What a config or a class
says is read from it instead: layers that cannot be packed, processors without torchvision (`processors.py`), attention
implementations.
"""

from dataclasses import dataclass
from typing import Any, Literal

from transformers import PretrainedConfig

from distill.models.tree_attention import layers_with_state


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        name: as its publisher writes it.
        packs: whether answers in one packed row are computed as in separate sequences.
        answer_type: value of `token_type_ids` for answer tokens.
        needs_picture: whether each post must have a picture.
        video: how videos are given to the model, unless `model.video` says otherwise: as pictures, or as it was trained
            on them.
        same_frames: whether all videos of a batch must have the same number of frames.
        frames_as_images: whether the processor writes the frames of a video as images into the text. Each message is
            then processed alone, since the text of a short video would name the number of frames of the longest.
        audio: whether it hears.
        audio_by_picture: whether it hears sounds otherwise if there are pictures in the batch.
        audio_window: whether each sound must fill the window of the feature extractor.
        audio_seconds: the longest sound of a family whose feature extractor does not say it and pads sounds to the
            longest of the batch; longer ones are cut.
        note: what a user should know, for the documentation.
    """

    name: str
    packs: bool = True
    answer_type: int = 0
    needs_picture: bool = False
    video: Literal["frames", "video"] = "frames"
    same_frames: bool = False
    frames_as_images: bool = False
    audio: bool = False
    audio_by_picture: bool = False
    audio_window: bool = False
    audio_seconds: int | None = None
    note: str = ""


_HYBRID = "hybrid layers"
_CROSS = "posts of a batch should have the same number of pictures: what precedes them also sees the padding"

_PALIGEMMA = Family(
    "PaliGemma",
    packs=False,
    answer_type=1,
    needs_picture=True,
    note="attends both ways over the prompt; version 2 needs `attention: eager`",
)

FAMILIES = {
    "qwen2_vl": Family("Qwen2-VL", video="video"),
    "qwen2_5_vl": Family("Qwen2.5-VL", video="video"),
    "qwen2_5_omni_thinker": Family("Qwen2.5-Omni", audio=True),
    "qwen3_vl": Family("Qwen3-VL", video="video"),
    "qwen3_5": Family("Qwen3.5", note=_HYBRID),
    "llava": Family("LLaVA, Pixtral"),
    "llava_next": Family("LLaVA-NeXT"),
    "qwen2_audio": Family("Qwen2-Audio", audio=True, audio_window=True, note="hears the first 30 seconds of a sound"),
    "llava_onevision": Family("LLaVA-OneVision", video="video", same_frames=True),
    "internvl": Family("InternVL"),
    "idefics3": Family("Idefics3"),
    "smolvlm": Family("SmolVLM", video="video", frames_as_images=True, note="needs the package `num2words`"),
    "mistral3": Family("Mistral 3"),
    "gemma3": Family("Gemma 3", packs=False, note="attends both ways within a picture"),
    "gemma3n": Family(
        "Gemma 3n",
        audio=True,
        audio_seconds=30,
        note="needs `timm` and torchvision; hears the first 30 seconds of a sound",
    ),
    "paligemma": _PALIGEMMA,
    "minicpmv4_6": Family("MiniCPM-V", note=_HYBRID),
    "molmo2": Family("Molmo2", packs=False, note="attends both ways within a picture"),
    "lfm2_vl": Family("LFM2-VL", note=_HYBRID),
    "mllama": Family("Llama 3.2 Vision", needs_picture=True, note=_CROSS),
    "phi4_multimodal": Family(
        "Phi-4-multimodal",
        audio=True,
        audio_by_picture=True,
        note="its published adapters are not loaded, see below",
    ),
    "llama": Family("Llama, SmolLM 1 and 2"),
    "qwen3": Family("Qwen3"),
    "gemma3_text": Family("Gemma 3, text"),
    "smollm3": Family("SmolLM3"),
}

_CAPPED = {
    "gemma2", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "paligemma", "vaultgemma",
}  # fmt: skip
"""Families whose logits are capped by `final_logit_softcapping`; others have the field without using it."""

_MULTIPLIED = {
    "cohere": "logit_scale", "cohere2": "logit_scale", "cohere2_moe": "logit_scale", "falcon_h1": "lm_head_multiplier",
    "hyperclovax": "logits_scaling", "hyperclovax_vision_v2": "logits_scaling",
}  # fmt: skip
_DIVIDED = {"granite", "granitemoe", "granitemoehybrid", "granitemoeshared", "granite4_vision", "minicpm3"}
"""Families whose logits are multiplied by this field, or divided by `logits_scaling`."""


def find(config: PretrainedConfig) -> Family:
    """The row of a model."""
    return FAMILIES.get(config.model_type, Family(config.model_type))


def packs(config: PretrainedConfig) -> bool:
    """Whether a model computes packed rows exactly.

    Layers of linear attention and convolution carry a state through all tokens of a sequence.
    """
    return find(config).packs and not layers_with_state(config.get_text_config())


def logit_scale(config: PretrainedConfig) -> float:
    """Factor by which a model multiplies the product of output head and last hidden states."""
    text: Any = config.get_text_config()
    if config.model_type in _DIVIDED:
        return 1 / float(text.logits_scaling)
    return float(getattr(text, _MULTIPLIED[config.model_type])) if config.model_type in _MULTIPLIED else 1.0


def logit_cap(config: PretrainedConfig) -> float | None:
    """The cap c of a model whose logits are c · tanh(z / c); None without a cap."""
    cap = getattr(config.get_text_config(), "final_logit_softcapping", None)
    return float(cap) if cap and config.model_type in _CAPPED else None
