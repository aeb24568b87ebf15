"""Settings of a model, and loading of pretrained ones: what must be there first, config, weights, processor."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from distill.errors import SettingsError, first_line
from distill.models import families, layers, tiny
from distill.models.adapters import Source, find_source
from distill.models.hub import load_from_hub, missing_weights
from distill.models.kinds import attention_problem, check_kind
from distill.models.lora import LoraSettings
from distill.models.processors import processor_class
from distill.models.text_models import TextProcessor, is_text_only, model_class
from distill.models.tiny import TinySettings
from distill.settings import Count, Range, Settings


@dataclass
class ModelSettings(Settings):
    """Choice and loading of a model."""

    path: str = ""
    """Folder or hub name of a model of images and text or of text only, or of a peft adapter (LoRA or IA3), which is
    loaded with the base model that it names; empty: build a tiny model."""
    revision: str = "main"
    """Revision of a hub model or adapter."""
    tiny: TinySettings = field(default_factory=TinySettings)
    """Size of the tiny model that is built if `path` is empty."""
    keep_layers: int | list[int] | None = None
    """Make a smaller model of `path`: its first so many decoder layers, or those with the given indices, counted from
    0, such as `[0, 4, 8, 12]`; null: all. Embeddings, output head and vision tower stay."""
    lora: LoraSettings | None = None
    """LoRA adapter trained on top of `path`; null: train all weights. If `path` is an adapter, that adapter is trained
    further, with its own rank, scaling, dropout and targets; without `lora`, it is merged first."""
    images: bool = True
    """Give the model the images of the posts. false: their texts only, which a text-only model needs if posts have
    images."""
    video: Literal["auto", "frames", "video", "ignore"] = "auto"
    """How the model is given videos: `frames`, as pictures with their times; `video`, as its family takes videos;
    ignore: not at all; auto: what the table of families says, `frames` for a tiny model."""
    audio: Literal["auto", "ignore"] = "auto"
    """auto: the model hears the sound of posts; ignore: it does not, which a model that cannot hear needs if posts have
    sound."""
    frames: Count | None = None
    """Maximum number of frames of a video that the model is given; null: as many as `data.video`
    samples."""
    image_size: Annotated[int, Range(0, 8192)] = 280
    """Images and frames are resized to squares of this many pixels; 0: the processor chooses the size."""
    min_pixels: Count | None = None
    """Images of fewer pixels are enlarged, if `image_size` is 0 and the processor keeps the proportions of images, as
    those of the Qwen-VL models do; null: what the processor has."""
    max_pixels: Count | None = None
    """Images of more pixels are reduced, on the same conditions as for `min_pixels`."""
    gradient_checkpointing: bool | None = None
    """Compute the activations of each layer anew in the backward pass: less memory, about a third more time; null: only
    with `lora.quantize`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the weights; `trainer.precision` sets that of the computation."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation."""
    batch_size: Count = 8
    """Samples per batch of label scoring and generation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_layers is not None:
            if problem := layers.problem(self.keep_layers):
                raise SettingsError(f"keep_layers {problem}")
            if not self.path:
                raise SettingsError("keep_layers needs path; set tiny.layers for a tiny model")


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
            hears = settings.tiny.audio_hidden is not None
            tokenizer = tiny.train_tokenizer(["negative neutral positive"], settings.tiny.vocabulary, audio=hears)
            config = tiny.build_config(settings.tiny, tokenizer)
            return model_class(config).from_config(config)
        source = find_source(settings.path, settings.revision)
        check_kind(source.path, source.revision)
        try:
            config = _load_config(source)
            model = model_class(config).from_config(config, attn_implementation=attention_of_shapes(settings))
        except SettingsError:
            raise
        except Exception as error:  # a broken config raises various errors of transformers
            if problem := attention_problem(error, settings.attention):
                raise SettingsError(problem) from error
            raise _not_loaded(source, first_line(error)) from error
        return _keep_layers(model, settings, source)


def check_libraries(settings: ModelSettings) -> None:
    """Raise SettingsError if a library that the settings of a model need is not installed."""
    if settings.lora is not None and settings.lora.quantize:
        _quantization_config(settings)
    if settings.attention == "flash_attention_2" and not any(map(find_spec, ("flash_attn", "kernels"))):
        raise SettingsError("model.attention: flash_attention_2 needs flash-attn: pip install flash-attn")


def check_weights(settings: ModelSettings) -> None:
    """Raise SettingsError if files of a model's weights are missing or damaged, or lack some weights.

    Of a folder, names and shapes are compared with the model; no weights are read.
    """
    if not settings.path:
        return
    source = find_source(settings.path, settings.revision)
    try:
        problem = missing_weights(source.path, source.revision)
        if not problem and Path(source.path).is_dir():
            with _quiet():
                _load_weights(source, device_map="meta")
        if source.adapter and not problem:
            problem = missing_weights(source.adapter, source.adapter_revision, adapter=True)
            source = Source(source.adapter, source.adapter_revision)
    except Exception as error:  # noqa: BLE001 (damaged files and other shapes raise various errors)
        problem = first_line(error)
    if problem:
        raise _not_loaded(source, problem)


@contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    """Context manager without the progress bars and the reports of transformers."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with hide_progress_bars():
            yield
    finally:
        transformers_logging.set_verbosity(level)


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


def load_pretrained(settings: ModelSettings, source: Source) -> Any:
    """Load a model with its weights, without an adapter. Raises SettingsError."""
    options: dict[str, Any] = {
        "dtype": getattr(torch, settings.dtype),
        "attn_implementation": settings.attention,
    }
    if settings.lora is not None and settings.lora.quantize:
        options["quantization_config"] = _quantization_config(settings)
    try:
        with hide_progress_bars():
            model = _load_weights(source, **options)
    except SettingsError:
        raise
    except Exception as error:  # a truncated file raises various errors of safetensors and torch
        raise _not_loaded(source, first_line(error)) from error
    return _keep_layers(model, settings, source)


def _load_weights(source: Source, **options: Any) -> Any:
    """A model with the weights of its files. Raises ValueError if they lack some, which would be random values."""
    config = _load_config(source)
    load = model_class(config).from_pretrained
    if hasattr(config, "audio_config"):
        options["config"] = config  # not that of the folder
    options |= {"revision": source.revision, "output_loading_info": True}
    model, found = load_from_hub(load, source.path, **options)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"its files lack {len(missing)} of its weights, such as {missing[0]}")
    return model


def _keep_layers(model: Any, settings: ModelSettings, source: Source) -> Any:
    if settings.keep_layers is not None:
        if source.adapter:
            raise SettingsError(
                f"model.keep_layers: model.path {source.adapter} is an adapter, which was made for all layers of its "
                "base; merge it first"
            )
        layers.keep_layers(model, settings.keep_layers)
    return model


def _load_config(source: Source) -> Any:
    """The config of a model; of Qwen2.5-Omni that of its thinker, which writes text, without the talker."""
    config = load_from_hub(AutoConfig.from_pretrained, source.path, revision=source.revision)
    return getattr(config, "thinker_config", config)


def _not_loaded(source: Source, problem: str) -> SettingsError:
    if source.adapter:
        return SettingsError(
            f"model.path: the base model {source.path} of the adapter in {source.adapter} cannot be loaded: {problem}"
        )
    return SettingsError(f"model.path: {source.path} cannot be loaded: {problem}")


def _quantization_config(settings: ModelSettings) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise SettingsError("model.lora.quantize needs bitsandbytes: pip install bitsandbytes") from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, settings.dtype)
    )


def load_processor(model: Any, source: Source) -> Any:
    """Load the processor of a model, with the tokenizer of its adapter if that has one. Raises SettingsError."""
    path, revision = source.processor
    try:
        if is_text_only(model.config):
            path, revision = source.tokenizer
            return TextProcessor(load_from_hub(AutoTokenizer.from_pretrained, path, revision=revision))
        processor = load_from_hub(
            processor_class(model.config, path, revision).from_pretrained, path, revision=revision
        )
        if (tokenizer := source.tokenizer) != (path, revision):
            processor.tokenizer = load_from_hub(AutoTokenizer.from_pretrained, tokenizer[0], revision=tokenizer[1])
            processor.chat_template = processor.tokenizer.chat_template or processor.chat_template
    except SettingsError:
        raise
    except Exception as error:  # each tokenizer raises its own types if files are missing
        raise SettingsError(f"model.path: the processor of {path} cannot be loaded: {first_line(error)}") from error
    if not hasattr(processor, "image_processor") and families.find(model.config).audio:
        processor.image_processor = None  # hears and reads
    if not hasattr(processor, "image_processor"):
        raise SettingsError(f"model.path: {path} has no image processor, which a model of its architecture needs")
    return processor


def limit_pixels(processor: Any, settings: ModelSettings) -> None:
    """Set the smallest and the largest number of pixels of a processor that keeps the proportions of images.

    Raises:
        SettingsError: it resizes images in another way, `image_size` is set, or the smallest number is the larger one.
    """
    limits = {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}  # their names in transformers
    if not any(limits.values()):
        return
    field = "model.min_pixels" if settings.min_pixels else "model.max_pixels"
    if settings.image_size:
        raise SettingsError(
            f"{field} needs model.image_size 0: now images become squares of {settings.image_size} pixels"
        )
    images = processor.image_processor
    if "min_pixels" not in getattr(images.valid_kwargs, "__annotations__", {}):
        raise SettingsError(f"{field}: {type(images).__name__} does not take a number of pixels; remove it")
    size = {name: given or images.size[name] for name, given in limits.items()}
    if size["shortest_edge"] > size["longest_edge"]:
        raise SettingsError(
            f"model.min_pixels: {size['shortest_edge']} is more than model.max_pixels, {size['longest_edge']}"
        )
    images.size = type(images.size)(**size) if not isinstance(images.size, dict) else size


def set_checkpointing(model: Any, settings: ModelSettings, *, train: bool) -> None:
    """Enable gradient checkpointing in a model that is trained, if the settings say so.

    Raises:
        SettingsError: the model does not support it.
    """
    wanted = settings.gradient_checkpointing
    if wanted is None:
        wanted = settings.lora is not None and settings.lora.quantize
    if not (train and wanted):
        return
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise SettingsError(f"model.gradient_checkpointing: {first_line(error)}; set it to false") from error
