"""A smaller model made of some layers of a decoder, with the config of that size."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch

from distill.errors import SettingsError, first_line

Layers = int | Sequence[int]
"""The first so many layers of a decoder, or the indices of layers."""


def problem(layers: Layers) -> str | None:
    """What is wrong with a choice of layers, whatever the model is, as the end of a sentence; None if nothing is."""
    if isinstance(layers, int):
        valid = layers >= 1
    else:
        valid = len(layers) > 0 and layers[0] >= 0 and list(layers) == sorted(set(layers))
    if valid:
        return None
    return f"is {layers}; it takes a number of layers, 1 or more, or a list of their indices from 0, in ascending order"


def keep_layers(model: Any, layers: Layers) -> None:
    """Remove all other layers of a model's decoder, which may be on the meta device, and change its config accordingly.

    The layers keep their weights and are renumbered, so that their positions in the key-value cache are those of a
    model that is built from the config. Embeddings, output head and vision tower stay.

    Raises:
        SettingsError: the model has fewer layers, or its layers depend on others or on their position.
    """
    decoder = model.get_decoder()
    configs = {id(config): config for config in _text_configs(model, type(decoder.config))}
    count = decoder.config.num_hidden_layers
    if (layers if isinstance(layers, int) else layers[-1] + 1) > count:
        raise SettingsError(f"model.keep_layers is {layers}; the model has {count} layers")
    chosen = list(range(layers) if isinstance(layers, int) else layers)
    stacks = [
        (name, child)
        for name, child in decoder.named_children()
        if isinstance(child, torch.nn.ModuleList) and len(child) == count
    ]
    first = len(getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None) or ())
    if chosen[:first] != list(range(first)):
        raise SettingsError(
            f"model.keep_layers is {layers}; the model adds image features to its first {first} layers, which must stay"
        )
    for name, stack in stacks:
        kept = torch.nn.ModuleList(stack[index] for index in chosen)
        for position, layer in enumerate(kept):
            for module in layer.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx = position  # type: ignore[assignment]
        setattr(decoder, name, kept)
    for config in configs.values():
        for name, value in list(vars(config).items()):
            if isinstance(value, list | tuple) and len(value) == count and not name.endswith("token_id"):
                setattr(config, name, type(value)(value[index] for index in chosen))
        config.num_hidden_layers = len(chosen)
    _check(decoder)


def _text_configs(model: Any, kind: type) -> list[Any]:
    """The configs of the decoder that the modules of a model refer to, which may be copies of each other."""
    configs = [model.config, *(module.config for module in model.modules() if hasattr(module, "config"))]
    return [text for config in configs if type(text := config.get_text_config()) is kind]


def _check(decoder: Any) -> None:
    """Raise SettingsError if a decoder is not what its config describes, as the layers of a new model show."""
    try:
        with torch.device("meta"):
            described = _sizes(type(decoder)(deepcopy(decoder.config)))
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"model.keep_layers: the model cannot have fewer layers: {first_line(error)}") from error
    found = _sizes(decoder)
    for name in described.keys() | found.keys():
        ours, theirs = found.get(name), described.get(name)
        if ours is None or theirs is None or any(ours[key] != theirs[key] for key in ours.keys() & theirs.keys()):
            raise SettingsError(
                f"model.keep_layers: the layers of this model depend on their position or on each other: "
                f"{name or 'the decoder'} would be another module; keep other layers, or leave keep_layers out"
            )


def _sizes(decoder: Any) -> dict[str, dict[str, Any]]:
    """Sizes, kinds and other plain attributes of all modules."""
    return {
        name: {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str) and key not in ("training", "gradient_checkpointing")
        }
        for name, module in decoder.named_modules()
    }
