"""Settings of a model, and loading of pretrained ones: what must be there first, config, weights, LoRA, processor."""

import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Annotated, Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from distill.errors import SettingsError
from distill.models import tiny
from distill.models.hub import base_of_adapter, load_from_hub, missing_weights
from distill.models.tiny import TinySettings
from distill.settings import Count, Range, Settings


@dataclass
class LoraSettings(Settings):
    """LoRA adapter of a pretrained model."""

    r: Count = 16
    """Rank of the adapter."""
    alpha: Count = 32
    """Scaling of the adapter: its update is multiplied by alpha / r."""
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.05
    """Dropout before the adapter."""
    targets: str = r".*(language_model|text_model).*\.(q|k|v|o|gate|up|down)_proj"
    """Regular expression over module names; the default matches the projections of the language model only."""
    quantize: bool = False
    """QLoRA: load the frozen weights in 4 bits; needs bitsandbytes and a GPU."""


@dataclass
class ModelSettings(Settings):
    """Choice and loading of a model."""

    path: str = ""
    """Folder or hub name of an image-text-to-text model; empty: build a tiny model."""
    revision: str = "main"
    """Revision of a hub model."""
    tiny: TinySettings = field(default_factory=TinySettings)
    """Size of the tiny model that is built if `path` is empty."""
    lora: LoraSettings | None = None
    """LoRA adapter trained on top of `path`; null: train all weights."""
    image_size: Annotated[int, Range(0, 8192)] = 280
    """Images are resized to squares of this many pixels; 0: the processor chooses the size."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the weights; `trainer.precision` sets that of the computation."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation."""
    batch_size: Count = 8
    """Samples per batch of label scoring and generation."""


def attention_of_shapes(settings: ModelSettings) -> str:
    """Attention of a model without weights: flash attention cannot be set without a GPU; see `check_libraries`."""
    return "sdpa" if settings.attention == "flash_attention_2" else settings.attention


def on_meta(settings: ModelSettings) -> torch.nn.Module:
    """Create the model on the meta device, for its shapes and size; no weights are read.

    Raises:
        SettingsError: the config of the model cannot be loaded.
    """
    with torch.device("meta"):
        if not settings.path:
            tokenizer = tiny.train_tokenizer(["negative neutral positive"], settings.tiny.vocabulary)
            return AutoModelForImageTextToText.from_config(tiny.build_config(settings.tiny, tokenizer))
        try:
            path = base_of_adapter(settings.path) or settings.path
            config = load_from_hub(AutoConfig.from_pretrained, path, revision=settings.revision)
            return AutoModelForImageTextToText.from_config(config, attn_implementation=attention_of_shapes(settings))
        except (OSError, ValueError, ImportError) as error:
            raise SettingsError(f"model.path: {settings.path} cannot be loaded: {first_line(error)}") from error


def check_libraries(settings: ModelSettings) -> None:
    """Raise SettingsError if a library that the settings of a model need is not installed."""
    if settings.lora is not None and settings.lora.quantize:
        _quantization_config(settings)
    if settings.attention == "flash_attention_2" and not any(map(find_spec, ("flash_attn", "kernels"))):
        raise SettingsError("model.attention: flash_attention_2 needs flash-attn: pip install flash-attn")


def check_weights(settings: ModelSettings) -> None:
    """Raise SettingsError if a file of a model's weights is missing; nothing is loaded."""
    try:
        problem = missing_weights(settings.path, settings.revision) if settings.path else None
    except (OSError, ValueError, LookupError) as error:
        problem = f"the list of its weights cannot be read: {first_line(error)}"
    if problem:
        raise SettingsError(f"model.path: {settings.path} cannot be loaded: {problem}")


@contextmanager
def hide_progress_bars():  # type: ignore[no-untyped-def]
    """Context manager that hides the progress bars of transformers."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def load_pretrained(settings: ModelSettings, path: str) -> Any:
    options: dict[str, Any] = {
        "revision": settings.revision if path == settings.path else "main",
        "dtype": getattr(torch, settings.dtype),
        "attn_implementation": settings.attention,
    }
    if settings.lora is not None and settings.lora.quantize:
        options["quantization_config"] = _quantization_config(settings)
    try:
        with hide_progress_bars():
            return load_from_hub(AutoModelForImageTextToText.from_pretrained, path, **options)
    except Exception as error:  # a truncated file raises various errors of safetensors and torch
        raise SettingsError(f"model.path: {path} cannot be loaded: {first_line(error)}") from error


def with_lora(model: Any, lora: LoraSettings) -> PeftModel:
    if lora.quantize:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.targets)
    try:
        return get_peft_model(model, config)
    except (ValueError, re.error) as error:
        raise SettingsError(f"model.lora.targets: {first_line(error)}") from error


def _quantization_config(settings: ModelSettings) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise SettingsError("model.lora.quantize needs bitsandbytes: pip install bitsandbytes") from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, settings.dtype)
    )


def load_processor(model: Any, path: str, revision: str) -> Any:
    try:
        processor = load_from_hub(tiny.processor_class(model.config).from_pretrained, path, revision=revision)
    except Exception as error:  # each tokenizer raises its own types if files are missing
        raise SettingsError(f"model.path: the processor of {path} cannot be loaded: {first_line(error)}") from error
    if not hasattr(processor, "image_processor"):
        raise SettingsError(f"model.path: {path} has no image processor; it must be an image-text-to-text model")
    return processor


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with the next one if it announces a list."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])
