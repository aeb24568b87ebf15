"""A transformers vision-language model with its processor: loaded, adapted, encoded for, saved and merged.

Nothing else in the house knows transformers or peft. A backbone is either pretrained (`path`, usually with LoRA) or
tiny and built from a config (`tiny`, all weights train).
"""

import inspect
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForImageTextToText, Cache
from transformers.utils import logging as transformers_logging

from distill.errors import SettingsError
from distill.models import tiny
from distill.models.encoding import IGNORE, Encoder, Question, Side, label_tokens
from distill.models.packing import Features, Packed, pad_rows, predictions, tree_mask, tree_positions
from distill.models.tiny import TinySettings
from distill.task import prompts
from distill.task.labels import LabelSpace
from distill.task.prompts import EarlierAnswers, Template
from distill.task.sample import Sample

__all__ = ["IGNORE", "Backbone", "Features", "LoraSettings", "ModelSettings", "create", "load", "on_meta", "quiet"]


@dataclass
class LoraSettings:
    """A low-rank adapter on a pretrained model."""

    r: int = 16
    """Rank of the adapter."""
    alpha: int = 32
    """Scale of the adapter: its update is multiplied by alpha / r."""
    dropout: float = 0.05
    """Dropout before the adapter."""
    targets: str = r".*(language_model|text_model).*\.(q|k|v|o|gate|up|down)_proj"
    """Regular expression over module names; the default takes the language model's projections, no vision tower's."""
    quantize: bool = False
    """QLoRA: load the frozen weights in 4 bits; needs bitsandbytes and a GPU."""


@dataclass
class ModelSettings:
    """Which model, and how it is loaded."""

    path: str = ""
    """Folder or hub name of an image-text-to-text model; empty: a tiny model is built."""
    revision: str = "main"
    """Revision of a hub model."""
    tiny: TinySettings = field(default_factory=TinySettings)
    """Size of the tiny model that is built where no path is given."""
    lora: LoraSettings | None = None
    """Adapter trained on top of `path`; null: all weights train."""
    image_size: int = 280
    """Images are resized to squares of this many pixels; 0: the processor's own sizes."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights; the arithmetic follows trainer.precision."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel."""
    batch_size: int = 8
    """Samples scored or generated for at a time."""


class Backbone:
    """A model, its processor and the label space it speaks of.

    Attributes:
        label_tokens: K lists, the tokens of each label after the forced prefix, its end token included.
        label_ids: [K], the first of them; where `labels_share_tokens`, two or more labels begin with one token.
    """

    def __init__(self, model: torch.nn.Module, processor: Any, labels: LabelSpace, settings: ModelSettings) -> None:
        self.model = model
        self.processor = processor
        self.labels = labels
        self.settings = settings
        if not getattr(processor, "chat_template", None):
            raise SettingsError(f"model.path: {settings.path or 'the tiny model'} has no chat template to ask it with")
        tokenizer = processor.tokenizer
        if tokenizer.eos_token is None:
            raise SettingsError(f"model.path: the tokenizer of {settings.path} has no end token")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.encoder = Encoder(processor, settings.image_size)
        self.label_tokens = label_tokens(tokenizer, labels)
        self.label_ids = torch.tensor([tokens[0] for tokens in self.label_tokens])
        if self.labels_share_tokens and settings.attention == "flash_attention_2":
            raise SettingsError(
                "model.attention: flash_attention_2 cannot score labels that begin with one token; take sdpa or eager"
            )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def labels_share_tokens(self) -> bool:
        """Whether the first token alone does not tell the labels apart."""
        return len(set(self.label_ids.tolist())) < len(self.labels)

    def encode(
        self,
        samples: Sequence[Sample],
        template: Template,
        answers: Sequence[str] | None = None,
        *,
        earlier: Sequence[EarlierAnswers] | None = None,
        padding_side: Side = "right",
    ) -> Features:
        """Tensors of B samples padded to the longest: `input_ids`, `attention_mask` [B, T], and what pictures need.

        With `answers`, each is appended with its end token and `labels` [B, T] marks it, IGNORE elsewhere. Without
        answers, *classify* and *review* are closed with the forced prefix, so that the next token is the label's.

        Args:
            earlier: B pairs of earlier answers, which *review* asks about.

        Raises:
            ValueError: *review* without earlier answers.
        """
        said = earlier if earlier is not None else (None,) * len(samples)
        questions = [
            (prompts.render(template, sample, self.labels, before), sample.images)
            for sample, before in zip(samples, said, strict=True)
        ]
        if answers is not None:
            endings = [self.answer_tokens(answer) for answer in answers]
        else:
            closing = self.encoder.tokens(prompts.CLASSIFY_PREFIX) if template in prompts.SCORED else []
            endings = [closing] * len(questions)
        return self.encoder.encode(questions, endings, labelled=answers is not None, padding_side=padding_side)

    def answer_tokens(self, text: str) -> list[int]:
        """The tokens of an answer with the one that ends it."""
        return [*self.encoder.tokens(text), self.processor.tokenizer.eos_token_id]

    def pack(self, rows: Sequence[Sequence[Question]]) -> Packed:
        """B rows of questions about the same pictures, each row one sequence (`models/packing.py`).

        Raises:
            ImageError: a picture cannot be read.
            SettingsError: the chat template does not let the questions share their pictures.
        """
        first, layouts, lengths = self.encoder.pack(rows)
        seen = first["attention_mask"].bool()
        inputs = {name: value for name, value in first.items() if value.shape != first["input_ids"].shape}
        for name in first.keys() - inputs.keys() - {"input_ids", "attention_mask"}:  # of pictures, which are shared
            inputs[name] = pad_rows([
                (row[mask].tolist()[:length] + [0] * len(layout.tokens))[: len(layout.tokens)]
                for row, mask, layout, length in zip(first[name], seen, layouts, lengths, strict=True)
            ], 0)  # fmt: skip
        inputs["input_ids"] = pad_rows([row.tokens for row in layouts], self.processor.tokenizer.pad_token_id)
        if any(row.branches for row in layouts):
            inputs["ends"] = pad_rows([row.ends for row in layouts])
            alone = self.positions(first)
            shared = [alone[..., row, mask][..., : lengths[row]] for row, mask in enumerate(seen)]
            inputs["position_ids"] = tree_positions(shared, layouts)
        else:
            inputs["attention_mask"] = pad_rows([[1] * len(row.tokens) for row in layouts], 0)
        return predictions(inputs, layouts)

    def hidden_states(self, inputs: Features, cache: Cache | None = None) -> torch.Tensor:
        """Last hidden states [B, T, D]: what the output head turns into logits. Differentiable.

        Args:
            cache: takes the keys and values of all columns, for what is to be generated behind them.
        """
        if "ends" in inputs:
            mask = tree_mask(inputs["ends"])
            if self.settings.attention == "eager":  # which adds its mask
                plain = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
                mask = plain.masked_fill(~mask, torch.finfo(torch.float32).min)
            inputs = {name: value for name, value in inputs.items() if name != "ends"} | {"attention_mask": mask}
        output = self._plain.base_model(**inputs, past_key_values=cache, use_cache=cache is not None)
        found: torch.Tensor = output.last_hidden_state
        return found

    @property
    def head(self) -> torch.Tensor:
        """Weights [V, D] of the output head; it has no bias."""
        return self._plain.get_output_embeddings().weight

    def positions(self, features: Features) -> torch.Tensor:
        """Position ids [..., B, T] of padded prompts: multimodal ones where the model has them, plain otherwise."""
        index = getattr(self._plain.base_model, "get_rope_index", None)
        if index is None:
            return (features["attention_mask"].cumsum(1) - 1).clamp(min=0)
        known = inspect.signature(index).parameters
        found: torch.Tensor = index(**{name: value for name, value in features.items() if name in known})[0]
        return found

    def save(self, folder: Path) -> None:
        """Write the trained weights (the adapter alone under LoRA) and the processor."""
        with quiet():
            self.model.save_pretrained(folder)  # type: ignore[operator]
            self.processor.save_pretrained(folder)

    @property
    def _plain(self) -> Any:
        """The model without its adapter's wrapping; the adapter itself stays in it."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def merged(self) -> torch.nn.Module:
        """The model as plain transformers weights, its adapter merged in."""
        return self.model.merge_and_unload() if isinstance(self.model, PeftModel) else self.model


def create(
    settings: ModelSettings, labels: LabelSpace, tokenizer: Path, *, train: bool = True, weights: bool = True
) -> Backbone:
    """A model before training: pretrained with a fresh adapter, or tiny with random weights.

    Args:
        tokenizer: folder of the tokenizer that the chain's tiny models share.
        train: False for a ready model that only answers; it gets no adapter.
        weights: False for its shapes alone: a pretrained one is then on the meta device, and no weights are read.

    Raises:
        SettingsError: the model cannot be loaded, lacks a chat template, or its tokenizer splits a label strangely.
    """
    if not settings.path:
        if settings.lora is not None:
            raise SettingsError("model.lora needs model.path: a tiny model has no pretrained weights to adapt")
        try:
            words = tiny.load_tokenizer(tokenizer)
        except (OSError, ValueError) as error:
            raise SettingsError(f"the tokenizer in {tokenizer} cannot be loaded: {_first_line(error)}") from error
        model: Any = AutoModelForImageTextToText.from_config(
            tiny.build_config(settings.tiny, words), attn_implementation=settings.attention
        )
        return Backbone(model, tiny.build_processor(words), labels, settings)
    model = _pretrained(settings, settings.path) if weights else on_meta(settings)
    if train and settings.lora is not None:
        model = _with_lora(model, settings.lora)
    return Backbone(model.train(train), _processor(model, settings.path, settings.revision), labels, settings)


def load(settings: ModelSettings, labels: LabelSpace, adapter: Path) -> Backbone:
    """A model after training, from the folder that `Backbone.save` wrote.

    Raises:
        SettingsError: the folder is missing or broken, or `settings.path` cannot be loaded.
    """
    if settings.path and settings.lora is not None:
        base = _pretrained(settings, settings.path)
        try:
            with quiet():
                model = PeftModel.from_pretrained(base, adapter)
        except Exception as error:  # a torn file raises what safetensors, torch and peft please
            raise SettingsError(f"the adapter in {adapter} cannot be loaded: {_first_line(error)}") from error
    else:
        model = _pretrained(settings, str(adapter))
    return Backbone(model.eval(), _processor(model, str(adapter), "main"), labels, settings)


def on_meta(settings: ModelSettings) -> torch.nn.Module:
    """The model on the meta device, for its shapes and size alone; no weights are read.

    Raises:
        SettingsError: the model's config cannot be had.
    """
    with torch.device("meta"):
        if not settings.path:
            words = tiny.train_tokenizer(["negative neutral positive"], settings.tiny.vocabulary)
            return AutoModelForImageTextToText.from_config(tiny.build_config(settings.tiny, words))
        try:
            config = AutoConfig.from_pretrained(settings.path, revision=settings.revision)
            return AutoModelForImageTextToText.from_config(config)
        except (OSError, ValueError) as error:
            raise SettingsError(f"model.path: {settings.path} cannot be loaded: {_first_line(error)}") from error


@contextmanager
def quiet():  # type: ignore[no-untyped-def]
    """Loading and saving without transformers' own progress bars."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _pretrained(settings: ModelSettings, path: str) -> Any:
    extra: dict[str, Any] = {}
    if settings.lora is not None and settings.lora.quantize:
        extra["quantization_config"] = _four_bits(settings)
    try:
        with quiet():
            return AutoModelForImageTextToText.from_pretrained(
                path,
                revision=settings.revision if path == settings.path else "main",
                dtype=getattr(torch, settings.dtype),
                attn_implementation=settings.attention,
                **extra,
            )
    except Exception as error:  # a torn file raises what safetensors and torch please
        raise SettingsError(f"model.path: {path} cannot be loaded: {_first_line(error)}") from error


def _with_lora(model: Any, lora: LoraSettings) -> PeftModel:
    if lora.quantize:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.targets)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise SettingsError(f"model.lora.targets: {_first_line(error)}") from error


def _four_bits(settings: ModelSettings) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise SettingsError("model.lora.quantize needs bitsandbytes: pip install bitsandbytes") from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, settings.dtype)
    )


def _processor(model: Any, path: str, revision: str) -> Any:
    try:
        processor = tiny.processor_class(model.config).from_pretrained(path, revision=revision)
    except (OSError, ValueError, ImportError) as error:
        raise SettingsError(f"model.path: the processor of {path} cannot be loaded: {_first_line(error)}") from error
    if not hasattr(processor, "image_processor"):
        raise SettingsError(f"model.path: {path} has no image processor; it must be an image-text-to-text model")
    return processor


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
