"""How many tokens of a post's text a model takes, and texts cut to that many."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from distill.models import tiny
from distill.models.adapters import find_source
from distill.models.backbone import ModelSettings
from distill.models.hub import load_from_hub

CHARACTERS_PER_TOKEN = 4
"""Estimate used without a tokenizer."""


def default_limit(settings: ModelSettings | None, most: int) -> int:
    """Half of the model's context, at most `most`: the rest is left to the image, the instructions and the answer."""
    if settings is None or not settings.path:
        return min(tiny.CONTEXT // 2, most) if settings is not None else most
    try:
        source = find_source(settings.path, settings.revision)
        config = load_from_hub(AutoConfig.from_pretrained, source.path, revision=source.revision)
    except (OSError, ValueError):
        return most
    return min((getattr(config.get_text_config(), "max_position_embeddings", None) or 2 * most) // 2, most)


def tokenizer(settings: ModelSettings | None, tiny_folder: Path) -> Any:
    """The tokenizer of a model, in `tiny_folder` for a tiny model; None if there is no model or it cannot be loaded."""
    if settings is None:
        return None
    try:
        if not settings.path:
            return tiny.load_tokenizer(tiny_folder)
        path, revision = find_source(settings.path, settings.revision).tokenizer
        return load_from_hub(AutoTokenizer.from_pretrained, path, revision=revision)
    except Exception:  # noqa: BLE001 (of many types if files are broken, which loading the model reports)
        return None


def cut(text: str, limit: int, tokenizer: Any) -> str:
    """The first `limit` tokens of a text; without a tokenizer, CHARACTERS_PER_TOKEN characters for each.

    Control tokens count as the characters that they are, because an encoder escapes them.
    """
    if tokenizer is None:
        return text[: CHARACTERS_PER_TOKEN * limit]
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    encoded = tokenizer(text, return_offsets_mapping=True, **options)
    offsets = encoded["offset_mapping"]
    return text if len(offsets) <= limit else text[: offsets[limit][0]]
