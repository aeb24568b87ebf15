"""A transformers model of text, with images and sound or without, with its processor: loading, encoding, saving.

A backbone is either pretrained (`path`, usually with LoRA) or tiny and built from a config (`tiny`, all weights train).
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, Cache

from distill.data.clips import ClipReader
from distill.errors import SettingsError, first_line
from distill.models import families, tiny
from distill.models.adapters import Source, find_source, load_adapter, merge
from distill.models.chat_template import use_chat_template
from distill.models.encoding import (
    IGNORE,
    Encoder,
    PromptWithAnswers,
    Side,
    label_tokens,
    save_processor,
)
from distill.models.lora import LoraSettings, add_lora, head_weight
from distill.models.packing import Features, Packed, TreeRow, packed_batch, pad_rows, tree_positions
from distill.models.pretrained import (
    ModelSettings,
    attention_of_shapes,
    hide_progress_bars,
    limit_pixels,
    load_pretrained,
    load_processor,
    on_meta,
    set_checkpointing,
)
from distill.models.tree_attention import attention_mask
from distill.task import prompts
from distill.task.labels import LabelSpace
from distill.task.prompts import EarlierAnswers, Template
from distill.task.sample import Sample

__all__ = [
    "IGNORE", "Backbone", "Features", "LoraSettings", "ModelSettings", "create", "hide_progress_bars", "load",
    "on_meta",
]  # fmt: skip


_HEAD_BLOCK = 1024
"""Tokens of the vocabulary in a block of `wide_linear`."""


class Backbone:
    """A model with its processor and label space.

    Attributes:
        label_tokens: K lists, the tokens of each label after the forced prefix, with the end token.
        label_ids: [K], the first token of each label; not unique if `labels_share_tokens`.
        family: the row of the model in `families.py`.
        packs: whether packed rows are computed exactly; False: one sequence per prompt and answer.
        cap: of the logits (`families.logit_cap`).

    Raises:
        SettingsError: the processor has no chat template, the tokenizer has no end token or cannot encode the labels,
            or the attention implementation cannot score them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        processor: Any,
        labels: LabelSpace,
        settings: ModelSettings,
        clips: ClipReader | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.labels = labels
        self.settings = settings
        tokenizer = processor.tokenizer
        if tokenizer.eos_token is None:
            raise SettingsError(f"model.path: the tokenizer of {settings.path} has no end token")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.family, self.packs = families.find(model.config), families.packs(model.config)
        hears = self.family.audio and settings.audio != "ignore"
        use_chat_template(processor, settings.path or "the tiny model", hears)
        limit_pixels(processor, settings)
        self.cap, self._scale = families.logit_cap(model.config), families.logit_scale(model.config)
        self.encoder = Encoder(processor, settings, self.family, clips)
        self.label_tokens = label_tokens(tokenizer, labels)
        self.label_ids = torch.tensor([tokens[0] for tokens in self.label_tokens])
        if self.labels_share_tokens and settings.attention == "flash_attention_2":
            raise SettingsError(
                "model.attention: flash_attention_2 cannot score labels that share their first token; use sdpa or eager"
            )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def labels_share_tokens(self) -> bool:
        """Whether two or more labels have the same first token."""
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
        """Tensors of B samples padded to the longest: `input_ids`, `attention_mask` [B, T], and those of the media.

        Args:
            answers: B answers; each is appended with its end token, and `labels` [B, T] holds its tokens, IGNORE
                elsewhere. None: *classify* and *review* prompts end with the forced prefix, so that the model predicts
                the label next.
            earlier: B earlier answers of student and teacher, for *review*.

        Raises:
            ImageError, ClipError: an image, a video or a sound cannot be read.
            ValueError: *review* without earlier answers.
        """
        reviewed = earlier if earlier is not None else (None,) * len(samples)
        messages = [
            (prompts.render(template, sample, self.labels, pair), sample.media)
            for sample, pair in zip(samples, reviewed, strict=True)
        ]
        if answers is not None:
            endings = [self.answer_tokens(answer) for answer in answers]
        else:
            prefix = self.encoder.tokens(self.labels.wording.prefix) if template in prompts.SCORED else []
            endings = [prefix] * len(messages)
        return self.encoder.encode(messages, endings, labelled=answers is not None, padding_side=padding_side)

    def answer_tokens(self, text: str) -> list[int]:
        """The tokens of an answer with the end token."""
        return [*self.encoder.tokens(text), self.processor.tokenizer.eos_token_id]

    def pack(self, rows: Sequence[Sequence[PromptWithAnswers]], width: int = 0) -> Packed:
        """Pack B rows into one sequence each (`models/packing.py`); the prompts of a row have the same media.

        Args:
            width: rows without media are joined up to this many tokens; 0: they are not.

        Raises:
            ImageError, ClipError: an image, a video or a sound cannot be read.
            SettingsError: the chat template places the media where the prompts cannot share them.
        """
        return self.branch(*self.encoder.pack(rows, width))

    def branch(self, first: Features, rows: Sequence[TreeRow], lengths: Sequence[int]) -> Packed:
        """Continue B prompts as packed rows.

        Args:
            first: padded prompts, from `encode`.
            rows: each begins with a prompt.
            lengths: how many tokens of each prompt are in its row.
        """
        tails = [row.tokens[length:] for row, length in zip(rows, lengths, strict=True)]
        inputs = self.encoder.append(first, tails, lengths=lengths)
        if any(row.branches for row in rows):
            del inputs["attention_mask"]
            inputs["ends"] = pad_rows([row.ends for row in rows]).to(inputs["input_ids"].device)
            positions, masks = self.positions(first), first["attention_mask"].bool()
            shared = [positions[..., row, mask][..., : lengths[row]] for row, mask in enumerate(masks)]
            inputs["position_ids"] = tree_positions(shared, rows)
        return packed_batch(inputs, rows)

    def hidden_states(self, inputs: Features, cache: Cache | None = None) -> torch.Tensor:
        """Last hidden states [B, T, D], scaled such that the logits are their product with `head`. Differentiable.

        Args:
            cache: stores the keys and values of all columns, for generation.
        """
        given: dict[str, Any] = dict(inputs)
        if (ends := given.pop("ends", None)) is not None:
            config = self._base_model.config.get_text_config()
            given["attention_mask"] = attention_mask(ends, self.settings.attention, config)
        output = self._base_model.base_model(**given, past_key_values=cache, use_cache=cache is not None)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden * self._scale if self._scale != 1 else hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] from `hidden_states` [..., D], as the model computes them."""
        return capped(wide_linear(hidden, self.head), self.cap)

    @property
    def head(self) -> torch.Tensor:
        """Weights [V, D] of the output head with its adapter, if it has one; it has no bias."""
        return head_weight(self._base_model.get_output_embeddings())

    def positions(self, features: Features) -> torch.Tensor:
        """Position ids [..., B, T] of padded prompts: multimodal if the model defines them, otherwise one per token."""
        rope_index = getattr(self._base_model.base_model, "get_rope_index", None)
        if rope_index is None:
            return (features["attention_mask"].cumsum(1) - 1).clamp(min=0)
        given = dict(features)
        if (mask := features.get("feature_attention_mask")) is not None:
            given["audio_seqlens"] = mask.sum(1)  # the names of Qwen2.5-Omni
        if (seconds := features.get("video_second_per_grid")) is not None:
            given["second_per_grids"] = seconds
        accepted = inspect.signature(rope_index).parameters
        positions: torch.Tensor = rope_index(**{name: value for name, value in given.items() if name in accepted})[0]
        return positions

    def save(self, folder: Path) -> None:
        """Write the trained weights (with LoRA only the adapter) and the processor."""
        for weights in folder.glob("*.safetensors"):  # not overwritten in place: it may have hard links
            weights.unlink()
        with hide_progress_bars():
            self.model.save_pretrained(folder)  # type: ignore[operator]
            save_processor(self.processor, folder)

    @property
    def _base_model(self) -> Any:
        """The transformers model without peft's wrapper; the adapter stays active."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def merged(self) -> torch.nn.Module:
        """The transformers model with the adapter merged into its weights."""
        return self.model.merge_and_unload() if isinstance(self.model, PeftModel) else self.model


def wide_linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`linear` of [..., D] with [V, D] and [V]; on a CPU in float32 for a block of the V outputs at a time.

    The hidden states are made contiguous: the product of a slice, such as the last position of each row, with weights
    in bfloat16 copies the weights for each row (32 rows and 262,144 outputs: 57 s and 10 GB instead of .09 s).

    With a vocabulary of 262,144 the matrix product of up to some hundred rows then takes about two thirds of the time
    (AMD EPYC, MKL): a block of the weights stays in the cache.
    """
    hidden = hidden.contiguous()
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or len(weight) < 16 * _HEAD_BLOCK:
        return torch.nn.functional.linear(hidden, weight, bias)
    parts = torch.cat([torch.nn.functional.linear(hidden, block) for block in weight.split(_HEAD_BLOCK)], -1)
    return parts if bias is None else parts + bias


def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """c · tanh(z / c) of logits z; the logits themselves without a cap c."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def create(
    settings: ModelSettings,
    labels: LabelSpace,
    tokenizer: Path,
    *,
    train: bool = True,
    weights: bool = True,
    clips: ClipReader | None = None,
) -> Backbone:
    """Create a model before training: pretrained with a new adapter or its own one, or tiny with random weights.

    Args:
        tokenizer: folder of the tokenizer that all tiny models of a chain share.
        train: False for inference only; no adapter is added.
        weights: False for shapes only: a pretrained model is then on the meta device, and no weights are read.
        clips: decodes videos and sounds; None: with the default settings.

    Raises:
        SettingsError: the model cannot be loaded, has no chat template, or its tokenizer cannot encode the labels.
    """
    if not settings.path:
        if settings.lora is not None:
            raise SettingsError("model.lora needs model.path: a tiny model has no pretrained weights to adapt")
        try:
            tiny_tokenizer = tiny.load_tokenizer(tokenizer)
        except (OSError, ValueError) as error:
            raise SettingsError(f"the tokenizer in {tokenizer} cannot be loaded: {first_line(error)}") from error
        attention = settings.attention if weights else attention_of_shapes(settings)
        model: Any = AutoModelForImageTextToText.from_config(
            tiny.build_config(settings.tiny, tiny_tokenizer), attn_implementation=attention
        )
        set_checkpointing(model, settings, train=train)
        return Backbone(model, tiny.build_processor(tiny_tokenizer, settings.tiny), labels, settings, clips)
    source = find_source(settings.path, settings.revision)
    model = load_pretrained(settings, source) if weights else on_meta(settings)
    if source.adapter:
        model = load_adapter(model, source, lora=settings.lora, train=train, weights=weights)
        if train and settings.lora is None:
            model = merge(model)
    elif train and settings.lora is not None:
        model = add_lora(model, settings.lora, source.revision)
    set_checkpointing(model, settings, train=train)
    return Backbone(model.train(train), load_processor(model, source), labels, settings, clips)


def load(
    settings: ModelSettings,
    labels: LabelSpace,
    adapter: Path,
    *,
    train: bool = False,
    clips: ClipReader | None = None,
) -> Backbone:
    """Load a trained model from the folder that `Backbone.save` wrote.

    Args:
        train: whether it is trained further.
        clips: as for `create`.

    Raises:
        SettingsError: the folder is missing or broken, or `settings.path` cannot be loaded.
    """
    trained = Source(str(adapter), "main")
    if settings.path and settings.lora is not None:
        source = find_source(settings.path, settings.revision)
        model = load_pretrained(settings, source)
        trained_adapter = replace(source, adapter=str(adapter), adapter_revision="main")
        model = load_adapter(model, trained_adapter, lora=settings.lora, train=train)
    else:
        model = load_pretrained(replace(settings, keep_layers=None), trained)  # has no other layers
    set_checkpointing(model, settings, train=train)
    return Backbone(model.eval(), load_processor(model, trained), labels, settings, clips)
