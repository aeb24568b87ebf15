"""Processors of published models: the class that a folder names, without its video processor if torchvision is missing.

Video processors need torchvision, and so do the processors of most families, although posts have no videos. Without
torchvision, a processor is loaded with the PIL version of its image processor, and the settings of its video processor
are kept, so that a saved processor loads with torchvision.
"""

from functools import cache
from importlib import import_module
from typing import Any

import torch
from transformers import AutoProcessor, PretrainedConfig
from transformers.models.auto.auto_mappings import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import PushToHubMixin, is_torchvision_available

from distill.errors import SettingsError
from distill.files import read_json
from distill.models.adapters import find_file

_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
"""Files that can name the class of a processor, the first of them first."""


class VideoSettings(PushToHubMixin):  # the base class makes ProcessorMixin save it like a video processor
    """The settings of a video processor that cannot be created without torchvision."""

    _auto_class = None

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._settings.get(name)

    def to_dict(self) -> dict[str, Any]:
        return dict(self._settings)


@cache
def image_only(standard: Any) -> Any:
    """A class like `standard` and of its name, with VideoSettings in place of the video processor.

    Registering such a class with AutoProcessor has no effect: AutoProcessor uses the class that the folder names.
    """

    class Parts(standard):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in standard.get_attributes() if name != "video_processor"]

    class ImageOnly(standard):
        @classmethod
        def _get_arguments_from_pretrained(cls, path: str, processor_dict: Any = None, **options: Any) -> list[Any]:
            values = Parts._get_arguments_from_pretrained(path, processor_dict, **options)
            parts = dict(zip(Parts.get_attributes(), values, strict=True))
            given = (processor_dict or {}).get("video_processor")
            parts["video_processor"] = VideoSettings(given or video_settings(parts["image_processor"]))
            return [parts[name] for name in cls.get_attributes()]

        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            if isinstance(argument, VideoSettings):
                return VideoSettings
            return super().check_argument_for_proper_class(name, argument)

        def __reduce__(self) -> Any:  # a class made by a function cannot be pickled
            return _blank, (standard,), self.__dict__

    for made in (Parts, ImageOnly):
        made.__name__ = made.__qualname__ = standard.__name__
    return ImageOnly


def video_settings(image_processor: Any) -> dict[str, Any]:
    """Settings of the video processor for a folder that has none: the sizes of the image processor.

    They name no class; transformers knows it from the model's config.
    """
    settings: dict[str, Any] = image_processor.to_dict()
    settings.pop("image_processor_type", None)
    return settings


def processor_class(config: PretrainedConfig, path: str, revision: str = "main") -> Any:
    """The class whose `from_pretrained` loads the processor in a folder or of a hub model.

    Args:
        config: of the model; decides if the folder names no class.

    Raises:
        SettingsError: the processor of the model needs torchvision, which is not installed.
    """
    if is_torchvision_available():
        return AutoProcessor
    name = _class_name(path, revision)
    if name not in PROCESSOR_MAPPING_NAMES.values():  # such as the class of an earlier version of this package
        name = PROCESSOR_MAPPING_NAMES.get(config.model_type)
    if name is None:
        return AutoProcessor
    standard = _class_of(name)
    backends = IMAGE_PROCESSOR_MAPPING_NAMES.get(config.model_type)
    if standard is None or (backends and not backends.get("pil")):
        raise SettingsError(
            f"model.path: the processor of {path} needs torchvision, in the version that belongs to torch "
            f"{torch.__version__}: pip install torchvision"
        )
    return image_only(standard) if "video_processor" in standard.get_attributes() else standard


def _class_name(path: str, revision: str) -> str | None:
    """The processor class that a folder names."""
    for name in _FILES:
        file = find_file(path, name, revision)
        if file is not None and (named := read_json(file).get("processor_class")):
            return str(named)
    return None


def _class_of(name: str) -> Any:
    """A processor class of transformers, from its module; None if it cannot be imported without torchvision."""
    for kind in (kind for kind, found in PROCESSOR_MAPPING_NAMES.items() if found == name):
        module = model_type_to_module_name(kind)
        try:
            return getattr(import_module(f"transformers.models.{module}.processing_{module}"), name)
        except (ImportError, AttributeError):  # a family can use the processor of another
            continue
    return None


def _blank(standard: Any) -> Any:
    return object.__new__(image_only(standard))
