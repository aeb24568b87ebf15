"""The chat template of a processor: where it is found, and whether it renders a post."""

from typing import Any

from distill.errors import SettingsError


def use_chat_template(processor: Any, name: str, audio: bool = False) -> None:
    """Take the chat template of the tokenizer if the processor has none, and check that it renders a post.

    Args:
        name: of the model, for messages.
        audio: whether the model is given sounds.

    Raises:
        SettingsError: there is no chat template, or it does not take a message of its media and text.
    """
    if not getattr(processor, "chat_template", None):
        processor.chat_template = getattr(processor.tokenizer, "chat_template", None)
    if not processor.chat_template:
        raise SettingsError(
            f"model.path: {name} has no chat template; use its instruction-tuned version, "
            "or put a chat_template.jinja into its folder"
        )
    content: list[list[dict[str, str]]] = [[{"type": "text", "text": "probe"}]]
    reads_images = processor.image_processor is not None
    media = [kind for kind, given in (("image", reads_images), ("audio", audio)) if given]
    content += [[{"type": kind}, *content[0]] for kind in media]
    try:
        text, *others = (
            str(processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True))
            for parts in content
        )
    except Exception as error:  # noqa: BLE001 (a template can raise anything; most are errors of jinja2)
        problem = " ".join(str(error).split()) or type(error).__name__
    else:
        if "probe" in text and "'text'" not in text and text not in others:
            return
        problem = "it takes the text of a message as a string only"
        if text in others:
            problem = f"it drops the {'images' if media[others.index(text)] == 'image' else 'sounds'}"
        elif not reads_images:
            problem = "it drops the text"
    post = "a post of images and text" if reads_images else "the text of a post"
    raise SettingsError(f"model.path: the chat template of {name} cannot render {post}: {problem}")
