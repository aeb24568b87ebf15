"""Models of other kinds, which cannot classify and explain posts: refused by one sentence before they are loaded."""

import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES, MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES

from distill.errors import SettingsError
from distill.models import families
from distill.models.adapters import find_file
from distill.models.hub import load_from_hub

_OTHER_TASK = re.compile(
    r"For(?:Sequence|Token|Image|Audio)Classification$|For(?:MaskedLM|QuestionAnswering|MultipleChoice|Retrieval)$"
)
"""Architectures whose output is no next token."""


def check_kind(path: str, revision: str) -> None:
    """Raise SettingsError if a folder or hub model is no decoder that generates text; nothing is loaded.

    A config that cannot be read is left to the loading of the model.
    """
    if problem := _problem(path, revision):
        raise SettingsError(f"model.path: {path} {problem}")


def attention_problem(error: Exception, attention: str) -> str | None:
    """A sentence about an attention implementation that a model does not have; None for other errors."""
    message = str(error)
    match = re.match(r"(\w+) does not support (?:an attention implementation|Flash Attention)", message)
    return f"model.attention: {match[1]} does not support {attention}; use eager" if match else None


def _problem(path: str, revision: str) -> str | None:
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").exists() and (files := sorted(folder.glob("*.gguf"))):
        return f"holds only quantized weights ({files[0].name}), which cannot be trained; use the original weights"
    try:
        config: Any = load_from_hub(AutoConfig.from_pretrained, path, revision=revision)
    except Exception:  # noqa: BLE001 (a broken config raises various errors, which loading reports)
        return None
    kind, architecture = config.model_type, next(iter(config.architectures or ()), "")
    audio = hasattr(config, "audio_config") and not hasattr(config, "vision_config")
    audio = audio and not (kind in families.FAMILIES and families.FAMILIES[kind].audio)
    if audio or kind in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES or kind in MODEL_FOR_CTC_MAPPING_NAMES:
        return f"is a model of audio ({kind}); it must take images and text"
    if config.is_encoder_decoder:
        return f"is an encoder-decoder model ({kind}); it must be a decoder, which continues its prompt"
    if find_file(path, "modules.json", revision) is not None:
        return "is an embedding model of sentence-transformers; it must generate text"
    if _OTHER_TASK.search(architecture):
        return f"is a {architecture}; it must be a model that generates text"
    return None
