"""Models that read text only: their transformers class, and a tokenizer with the interface of a processor."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from distill.errors import SettingsError
from distill.models import families

TEMPLATE_VARIABLES = {"enable_thinking": False, "date_string": "26 Jul 2024"}
"""Variables of published chat templates: models that can think answer at once, and no prompt has today's date."""


def model_class(config: PretrainedConfig) -> Any:
    """The transformers class that loads a model: of images and text, of sound and text, or of text only.

    Raises:
        SettingsError: the model generates no text.
    """
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    if config.model_type in families.FAMILIES and families.find(config).audio:
        return AutoModelForMultimodalLM
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    name = (config.architectures or [config.model_type])[0]
    raise SettingsError(f"model.path: a model of the architecture {name} does not generate text from a prompt")


def is_text_only(config: PretrainedConfig) -> bool:
    """Whether a model reads no images. Raises SettingsError as `model_class` does."""
    return model_class(config) is AutoModelForCausalLM


class TextProcessor:
    """The processor of a text-only model: its tokenizer with the calls of a transformers processor.

    Attributes:
        image_processor: None, by which callers see that the model reads no images.
        chat_template: that of the tokenizer, or one that was set later.
    """

    image_processor = None

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.chat_template = tokenizer.chat_template

    def __call__(self, text: Sequence[str], images: None = None, **options: Any) -> Any:
        """Tokenize B texts, with the options of the tokenizer."""
        return self.tokenizer(list(text), return_token_type_ids=False, **options)

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        """Render messages whose content is a list of text parts; templates for text take a string as content."""
        plain = [
            message | {"content": "".join(part["text"] for part in message["content"])} for message in messages
        ]  # fmt: skip
        options = TEMPLATE_VARIABLES | options | {"tokenize": False}
        return str(self.tokenizer.apply_chat_template(plain, chat_template=self.chat_template, **options))

    def save_pretrained(self, folder: Path) -> None:
        """Write the tokenizer with its chat template."""
        self.tokenizer.save_pretrained(folder)
