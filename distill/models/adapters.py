"""A model given as an adapter of peft: a folder without the weights of its base model, which it names."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from peft import PeftConfig, PeftModel, PeftType, prepare_model_for_kbit_training

from distill.digests import ADAPTER, adapter_base
from distill.errors import SettingsError, first_line
from distill.models.hub import load_from_hub
from distill.models.lora import LoraSettings, check_head, separate_head

log = logging.getLogger(__name__)

_SUPPORTED = (PeftType.LORA, PeftType.IA3)
_UNSUPPORTED_OPTIONS = (
    "layer_replication", "lora_bias", "trainable_token_indices", "alora_invocation_tokens", "ensure_weight_tying",
    "arrow_config",
)  # fmt: skip
"""Options that act in the forward pass of peft's wrapper, or that cannot be merged."""

_PROCESSOR = ("processor_config.json", "preprocessor_config.json")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Source:
    """What `model.path` stands for.

    Attributes:
        path, revision: a model with its weights.
        adapter: folder or hub name of the adapter of that model; empty if there is none.
        adapter_revision: its revision, if it is on the hub.
    """

    path: str
    revision: str
    adapter: str = ""
    adapter_revision: str = "main"

    @property
    def processor(self) -> tuple[str, str]:
        """Path and revision of the model that brings the processor: the adapter, if it has one."""
        return self._first(_PROCESSOR)

    @property
    def tokenizer(self) -> tuple[str, str]:
        """Path and revision of the model that brings the tokenizer: the adapter, if it has one."""
        return self._first(_TOKENIZER)

    def _first(self, files: tuple[str, ...]) -> tuple[str, str]:
        own = self.adapter and any(find_file(self.adapter, name, self.adapter_revision) for name in files)
        return (self.adapter, self.adapter_revision) if own else (self.path, self.revision)


def find_source(path: str, revision: str = "main") -> Source:
    """What a folder or the name of a hub model stands for.

    Raises:
        SettingsError: an adapter names no base model, or one that is an adapter itself.
    """
    config = find_file(path, ADAPTER, revision)
    if config is None or (base := adapter_base(config.parent)) is None:
        return Source(path, revision)
    if not base[0]:
        raise SettingsError(f"model.path: the adapter in {path} names no base model in {ADAPTER}")
    if find_file(base[0], ADAPTER, base[1]) is not None:
        raise SettingsError(
            f"model.path: the base model {base[0]} of the adapter in {path} is an adapter itself; "
            "merge it into its own base first"
        )
    return Source(*base, path, revision)


def load_adapter(
    base: Any, source: Source, *, lora: LoraSettings | None = None, train: bool = False, weights: bool = True
) -> PeftModel:
    """Apply the adapter of `source` to its loaded base model.

    Args:
        lora: settings of the recipe, which the adapter's own replace.
        train: whether the adapter is trained further.
        weights: False for a base on the meta device: no weights are read.

    Raises:
        SettingsError: the adapter is damaged, was made for another model, or is of a kind that is not supported.
    """
    path, options = source.adapter, {"revision": source.adapter_revision}
    where = f"model.path: the adapter in {path}"
    try:
        config = load_from_hub(PeftConfig.from_pretrained, path, **options)
    except Exception as error:  # peft raises various errors for a damaged file
        raise SettingsError(f"the adapter in {path} cannot be loaded: {first_line(error)}") from error
    _check(config, where)
    config.inference_mode = not train
    config.base_model_name_or_path, config.revision = source.path, source.revision  # is saved elsewhere when trained
    if train and lora is not None:
        _log_difference(config, lora, path)
    if train and lora is not None and lora.quantize:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    separate_head(base, config)
    try:
        model = PeftModel(base, config)
        if weights:
            load = partial(_load_weights, model, train=train)
            missing = load_from_hub(load, path, **options)
        else:
            missing = []
    except Exception as error:  # of a truncated file, other shapes, or targets that the model does not have
        raise SettingsError(f"the adapter in {path} cannot be loaded: {first_line(error)}") from error
    if missing:
        raise SettingsError(
            f"the adapter in {path} cannot be loaded: it was made for other module names than those of {source.path}; "
            f"{len(missing)} weights are not in it, the first is {missing[0]}"
        )
    check_head(model, where)
    return model


def merge(model: PeftModel) -> Any:
    """The transformers model with the adapter merged into its weights, all of which can be trained."""
    merged = model.merge_and_unload()
    return merged.requires_grad_(True)


def _load_weights(model: PeftModel, path: str, *, train: bool, **options: Any) -> list[str]:
    """Read the weights of an adapter; returns the names of those that are not in the file."""
    result = model.load_adapter(path, "default", is_trainable=train, torch_device="cpu", **options)
    return list(result.missing_keys)


def _check(config: PeftConfig, where: str) -> None:
    if config.peft_type not in _SUPPORTED:
        kind = getattr(config.peft_type, "value", config.peft_type)
        supported = " and ".join(kind.value for kind in _SUPPORTED)
        raise SettingsError(f"{where} is of the type {kind}; only {supported} are supported")
    for option in _UNSUPPORTED_OPTIONS:
        if getattr(config, option, None):
            raise SettingsError(f"{where} has {option}, which is not supported")


def _log_difference(config: PeftConfig, lora: LoraSettings, path: str) -> None:
    names = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout"}
    own = {ours: getattr(config, theirs) for theirs, ours in names.items() if hasattr(config, theirs)}
    if any(value != getattr(lora, name) for name, value in own.items()) or not own:
        values = ", ".join(f"{name} {value}" for name, value in own.items())
        log.warning(
            "the training continues the adapter in %s with its own settings (%s) instead of model.lora",
            path,
            values or config.peft_type.value,
        )


def find_file(path: str, name: str, revision: str) -> Path | None:
    """A file of a model in a folder, the cache, or on the hub; None if it has none, or the hub cannot be asked."""
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.exists() else None
    try:
        if isinstance(try_to_load_from_cache(path, "config.json", revision=revision), str):  # as a rule no adapter
            cached = try_to_load_from_cache(path, name, revision=revision)
            return Path(cached) if isinstance(cached, str) else None
        return Path(load_from_hub(partial(hf_hub_download, filename=name), path, revision=revision))
    except (OSError, ValueError):
        return None
