"""LoRA: its settings, the layers that it adapts, and the output head with its adapter."""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

from distill.errors import SettingsError, first_line
from distill.settings import Count, Range, Settings

log = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"

EARLIER_TARGETS = r".*(language_model|text_model).*\.(q|k|v|o|gate|up|down)_proj"
"""The default of earlier versions: the same layers of the usual decoders, in models of images and text."""

_NOT_ADAPTED = re.compile(r"(^|\.)(correction_coefs$|embed_tokens_extend\.)")
"""Linear layers of Gemma 3n that are read in training without a call of the layer and its adapter, and the towers of
Phi-4-multimodal, which are part of its decoder."""


@dataclass
class LoraSettings(Settings):
    """LoRA adapter of a pretrained model."""

    r: Count = 16
    """Rank of the adapter."""
    alpha: Count = 32
    """Scaling of the adapter: its update is multiplied by alpha / r."""
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.05
    """Dropout before the adapter; the output head has none."""
    targets: list[str] | str = ALL_LINEAR
    """`all-linear`: every linear layer of the language model except the output head; or names of such layers, as in
    [q_proj, v_proj]; or a regular expression over the names of all modules."""
    quantize: bool = False
    """QLoRA: load the frozen weights in 4 bits; needs bitsandbytes and a GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.targets or not all(self.targets):
            raise SettingsError(f"targets is {self.targets!r}; it takes {ALL_LINEAR}, names, or a regular expression")


def add_lora(model: Any, lora: LoraSettings, revision: str = "main") -> PeftModel:
    """A transformers model, on the meta device perhaps, with a new adapter.

    Args:
        revision: of the model, if it is on the hub.

    Raises:
        SettingsError: as `check_lora`.
    """
    check_lora(model, lora)
    if lora.quantize:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = _config(model, lora)
    config.revision = revision
    separate_head(model, config)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        kind = re.match(r"Target module (\w+)\(", str(error))
        problem = f"a module that it matches, {kind[1]}, is no linear layer" if kind else first_line(error)
        raise SettingsError(f"model.lora.targets: {problem}") from error
    check_head(adapted, "model.lora.targets")
    return adapted


def check_lora(model: Any, lora: LoraSettings) -> None:
    """Check that the targets of an adapter are modules of a model, which may be on the meta device.

    Logs how many linear layers are adapted, and a warning that names those that are not.

    Raises:
        SettingsError: the targets are no regular expression, or match no module.
    """
    config = _config(model, lora)
    try:
        adapted = {name for name, _ in model.named_modules() if check_target_module_exists(config, name)}
    except re.error as error:
        raise SettingsError(f"model.lora.targets is no regular expression: {error}") from None
    if not adapted:
        raise _no_match(model, str(lora.targets))
    linear = _linear_layers(model)[1]
    left_out = [name for name in linear if name not in adapted]
    log.info("LoRA adapts %d of %d linear layers of the language model", len(linear) - len(left_out), len(linear))
    if left_out:
        names = ", ".join(sorted({name.rpartition(".")[2] for name in left_out}))
        log.warning("model.lora.targets leaves out layers of the names %s; %s adapts them, too", names, ALL_LINEAR)


def separate_head(model: Any, config: PeftConfig) -> None:
    """Give the output head its own weights if it shares them with the embeddings and an adapter changes either.

    The model computes the same. Merged into shared weights, an adapter of one would change the other.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return
    saved = getattr(config, "modules_to_save", None) or ()
    for name, module in model.named_modules():
        if module is not head and module is not embeddings:
            continue
        if check_target_module_exists(config, name) or any(f".{name}".endswith(f".{other}") for other in saved):
            log.info("the adapter changes %s: embeddings and output head no longer share their weights", name)
            head.weight = torch.nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
            for settings in (model.config, model.config.get_text_config()):
                settings.tie_word_embeddings = False
            model.tie_weights()  # finds nothing to tie, and forgets what was tied
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
            return


def check_head(model: PeftModel, field: str) -> None:
    """Raise SettingsError if `head_weight` does not know the adapter of the output head."""
    head = model.get_base_model().get_output_embeddings()
    if not isinstance(head, BaseTunerLayer):
        return
    if not isinstance(head, LoraLayer) or head.lora_variant:
        raise SettingsError(f"{field}: the output head can only have a plain LoRA adapter; leave it out")


def head_weight(head: Any) -> torch.Tensor:
    """Weights [V, D] of an output head, including those of its LoRA adapter. Differentiable.

    Label scoring and the training loss multiply by them; the forward pass of the head itself is not used there.
    """
    adapted = isinstance(head, LoraLayer) and not head.merged and not head.disable_adapters
    weight: torch.Tensor = _adapted_weight(head) if adapted else head.weight
    return weight


def merged_weights(model: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of the weights of a model after merging its adapter: W + B A alpha / r where LoRA adapts.

    What another kind of adapter changes, such as DoRA or LoRA of a bias, is left out.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    if isinstance(model, ModulesToSaveWrapper):
        model = model.modules_to_save[model.active_adapter]
    if isinstance(model, LoraLayer):
        layer = model.base_layer
        if isinstance(model, ParamWrapper) or not isinstance(layer, torch.nn.Linear | torch.nn.Embedding):
            return
        if not model.lora_variant:
            yield f"{prefix}weight", _adapted_weight(model)
        if not any(model.lora_bias.values()):
            yield from ((prefix + name, value) for name, value in layer.named_parameters() if name != "weight")
    elif not isinstance(model, BaseTunerLayer | AuxiliaryTrainingWrapper):
        yield from ((prefix + name, value) for name, value in model.named_parameters(recurse=False))
        for name, module in model.named_children():
            yield from merged_weights(module, f"{prefix}{name}.")


def _adapted_weight(layer: LoraLayer) -> torch.Tensor:
    """Weights of a layer, including those of its LoRA adapter. Differentiable."""
    weight: torch.Tensor = layer.weight
    for name in layer.active_adapters:
        if name in layer.lora_A or name in layer.lora_embedding_A:
            weight = weight + layer.get_delta_weight(name).to(weight)
    return weight


def _config(model: Any, lora: LoraSettings) -> LoraConfig:
    targets: str | list[str] = lora.targets
    if targets == ALL_LINEAR:
        targets = _linear_layers(model)[1]
    elif isinstance(targets, list):
        layers = _linear_layers(model)[1]
        found = {target: [name for name in layers if f".{name}".endswith(f".{target}")] for target in targets}
        if missing := [target for target, names in found.items() if not names]:
            raise _no_match(model, ", ".join(missing))
        targets = [name for names in found.values() for name in names]
    return LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)


def _linear_layers(model: Any) -> tuple[str, list[str]]:
    """The name of the language model, and those of its linear layers that can be adapted, without the output head."""
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    return prefix, [
        f"{prefix}.{name}"
        for name, module in decoder.named_modules()
        if isinstance(module, torch.nn.Linear) and not _NOT_ADAPTED.search(name)
    ]


def _no_match(model: Any, targets: str) -> SettingsError:
    prefix, linear = _linear_layers(model)
    names = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
    return SettingsError(
        f"model.lora.targets: {targets} matches no module; the linear layers of the language model are "
        f"{prefix}.*.({names})"
    )
