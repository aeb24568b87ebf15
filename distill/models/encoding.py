"""Encoding of prompts and images as model inputs, and of labels as tokens."""

import re
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from distill.data.images import resized
from distill.data.text import clean
from distill.errors import SettingsError
from distill.models.memory import is_out_of_memory
from distill.models.packing import Features, TreeRow, build_tree_row, shared_prefix_length
from distill.task.labels import LabelSpace
from distill.task.sample import NO_MEDIA, Media

IGNORE = -100
"""Label of positions without loss."""

Prompt = tuple[str, Media]
"""A user message: its text, and the media placed before the text."""

Side = Literal["left", "right"]


def token_aligned(features: Features) -> Features:
    """The inputs of shape [B, T] or [B, T, ...] that have a value for each token."""
    shape = features["input_ids"].shape
    return {name: value for name, value in features.items() if value.shape == shape or name == "cross_attention_mask"}


class PromptWithAnswers(NamedTuple):
    """A prompt, the tokens of its forced answer prefix, and its answers as tokens, each with its end token."""

    prompt: Prompt
    prefix: Sequence[int]
    answers: Sequence[Sequence[int]]


_Branch = tuple[PromptWithAnswers, list[int]]
"""A prompt of a packed row, and its tokens without the forced prefix."""


def _tree(branches: Sequence[_Branch]) -> TreeRow:
    return build_tree_row([([*prompt, *item.prefix], item.answers) for item, prompt in branches])


class Encoder:
    """Encodes single user messages with a model's processor.

    Args:
        processor: tokenizer, chat template and image processor.
        image_size: images are resized to squares of this many pixels; 0: no resizing.
        images: whether the model is given the images of the messages.
        answer_type: value of `token_type_ids` for appended tokens (`families.py`).

    Attributes:
        reads_images: whether it is, and can read them.
    """

    def __init__(self, processor: Any, image_size: int, images: bool = True, answer_type: int = 0) -> None:
        self.processor = processor
        self.answer_type = answer_type
        self.image_size = image_size
        self.reads_images = images and processor.image_processor is not None
        self._leaves_images_out = not images
        self._control_tokens = control_tokens(processor)

    def encode(
        self,
        prompts: Sequence[Prompt],
        endings: Sequence[Sequence[int]] | None = None,
        *,
        labelled: bool = False,
        padding_side: Side = "right",
    ) -> Features:
        """Tensors of B messages padded to the longest: `input_ids`, `attention_mask` [B, T], and the image tensors.

        Args:
            endings: B token sequences to append to the messages, after the generation prompt.
            labelled: add `labels` [B, T]: the tokens of the endings, IGNORE elsewhere.

        Raises:
            ImageError: an image cannot be read.
        """
        features = self._process(prompts)
        if labelled:
            features["labels"] = torch.full(features["input_ids"].shape, IGNORE)
        return self.append(features, endings or [()] * len(prompts), padding_side)

    def append(
        self,
        features: Features,
        endings: Sequence[Sequence[int]],
        padding_side: Side = "right",
        lengths: Sequence[int] | None = None,
    ) -> Features:
        """Append B token sequences to B messages and pad them to the longest.

        Args:
            features: padded on either side.
            lengths: keep only this many tokens of each message; None: all.
        """
        masks = [mask.nonzero()[:, 0] for mask in features["attention_mask"]]
        kept = masks if lengths is None else [mask[:length] for mask, length in zip(masks, lengths, strict=True)]
        paddings = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": IGNORE}
        longer = {}
        for name, values in token_aligned(features).items():
            rows = [
                torch.cat([row[mask], self._tail(name, row[mask], ending)])
                for row, mask, ending in zip(values, kept, endings, strict=True)
            ]
            longer[name] = torch.nn.utils.rnn.pad_sequence(rows, True, paddings.get(name, 0), padding_side)
        return features | longer

    def _tail(self, name: str, row: torch.Tensor, ending: Sequence[int]) -> torch.Tensor:
        """The values of appended tokens; they are text that sees what the last token sees."""
        if name in ("input_ids", "labels"):
            return row.new_tensor(ending)
        tail = row[-1:].repeat(len(ending), *[1] * (row.dim() - 1))
        return tail.fill_(self.answer_type) if name == "token_type_ids" else tail

    def pack(
        self, rows: Sequence[Sequence[PromptWithAnswers]], width: int = 0
    ) -> tuple[Features, list[TreeRow], list[int]]:
        """Pack B rows of prompts; the prompts of a row have the same images, and their common prefix is stored once.

        Args:
            width: rows without images are joined to the row before while they have at most this many tokens together.

        Returns:
            The features of each row's first prompt, padded by the processor; at most B packed rows (`build_tree_row`);
            and the lengths of their common prefixes, in tokens.

        Raises:
            ImageError: an image cannot be read.
            SettingsError: the chat template places the images after the common prefix.
        """
        tokens = iter(self._prompt_tokens([item.prompt for row in rows for item in row]))
        branches = [[(item, next(tokens)) for item in row] for row in rows]
        branches = self._joined(branches, width) if width else branches
        features = self._process([row[0][0].prompt for row in branches])
        packed, lengths = [], []
        for row, ids, mask in zip(branches, features["input_ids"], features["attention_mask"], strict=True):
            first = ids[mask.bool()].tolist()  # with the image tokens expanded
            shared = shared_prefix_length([prompt for _, prompt in row])
            length = len(first) - len(row[0][1]) + shared
            if first[length:] != row[0][1][shared:]:
                raise SettingsError("packing: the chat template places images after the text; set packing to false")
            packed.append(_tree([(item, [*first[:length], *prompt[shared:]]) for item, prompt in row]))
            lengths.append(length)
        return features, packed, lengths

    def _joined(self, rows: Sequence[list[_Branch]], width: int) -> list[list[_Branch]]:
        """Join neighbouring rows without images that have at most `width` tokens together."""
        joined: list[list[_Branch]] = []
        length = width  # of the last row; no row joins one with images
        for row in rows:
            if self.reads_images and row[0][0].prompt[1]:
                joined.append(row)
                length = width
                continue
            own = len(_tree(row).tokens)
            shared = shared_prefix_length([joined[-1][-1][1], row[0][1]]) if joined else 0
            if shared and length + own - shared <= width:
                joined[-1] = [*joined[-1], *row]
                length += own - shared
            else:
                joined.append(row)
                length = own
        return joined

    def tokens(self, text: str) -> list[int]:
        """Tokenize a text; control tokens in it are escaped."""
        return list(self.processor.tokenizer(self._escape(text), add_special_tokens=False)["input_ids"])

    def fingerprint(self) -> str:
        """SHA-256 of the preprocessing: tokenizer, chat template, image processor and image size."""
        tokenizer = self.processor.tokenizer.backend_tokenizer
        tokenizer.no_padding(), tokenizer.no_truncation()  # it keeps those of its last call
        parts = [tokenizer.to_str(), str(self.processor.chat_template)]
        if self.reads_images:
            parts += [self.processor.image_processor.to_json_string(), str(self.image_size)]
        return sha256("\0".join(parts).encode()).hexdigest()

    def render(self, text: str, media: Media = NO_MEDIA) -> str:
        """One user message in the chat template, including the generation prompt."""
        content = [{"type": "image"} for _ in media.images if self.reads_images]
        content.append({"type": "text", "text": self._escape(text)})
        messages = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def check_images(self, count: int) -> None:
        """Raise SettingsError if a post with this number of images would reach a model that reads none."""
        if count and not self.reads_images and not self._leaves_images_out:
            raise SettingsError(
                "model.images must be false: the model reads text only, and posts have images, which are then left out"
            )

    def load_image(self, path: Path) -> Any:
        """An image, resized to the model's input size. Raises ImageError."""
        return resized(path, self.image_size)

    def _process(self, prompts: Sequence[Prompt]) -> Features:
        """The processor's tensors of B messages, padded to the longest on the processor's padding side.

        Raises:
            ImageError: an image cannot be read.
            SettingsError: the processor refuses the messages, or their images.
        """
        self.check_images(max(len(media.images) for _, media in prompts))
        texts = [self.render(*prompt) for prompt in prompts]
        nested = [[self.load_image(path) for path in media.images if self.reads_images] for _, media in prompts]
        images = nested if any(nested) else None  # a flat list would not say which post an image belongs to
        special = not self.starts_with_bos(texts[0])
        options: dict[str, Any] = {"return_tensors": "pt", "padding": True, "add_special_tokens": special}
        try:
            features = dict(self.processor(text=texts, images=images, **options))
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError) as error:
            if is_out_of_memory(error):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SettingsError(
                f"model.path: the processor does not take posts with {max(map(len, nested))} images and image_size "
                f"{self.image_size}: {reason}"
            ) from error
        features.pop("labels", None)  # some processors add labels that ignore all tokens
        return features

    def _prompt_tokens(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The tokens of messages before their image placeholders are expanded."""
        texts = [self.render(*prompt) for prompt in prompts]
        special = not self.starts_with_bos(texts[0])
        encoded = self.processor.tokenizer(texts, add_special_tokens=special)["input_ids"]
        return [list(tokens) for tokens in encoded]

    def starts_with_bos(self, text: str) -> bool:
        """Whether the chat template has already written the BOS token."""
        bos = self.processor.tokenizer.bos_token
        return bool(bos) and text.startswith(bos)

    def _escape(self, text: str) -> str:
        return escape(clean(text), self._control_tokens)


def use_chat_template(processor: Any, name: str) -> None:
    """Take the chat template of the tokenizer if the processor has none, and check that it renders a post.

    Args:
        name: of the model, for messages.

    Raises:
        SettingsError: there is no chat template, or it does not take a message of images and text.
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
    if reads_images:
        content.append([{"type": "image"}, *content[0]])
    try:
        text, *both = (
            str(processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True))
            for parts in content
        )
    except Exception as error:  # noqa: BLE001 (a template can raise anything; most are errors of jinja2)
        problem = " ".join(str(error).split()) or type(error).__name__
    else:
        if "probe" in text and "'text'" not in text and both != [text]:
            return
        problem = "it takes the text of a message as a string only"
        if both == [text]:
            problem = "it drops the images"
        elif not reads_images:
            problem = "it drops the text"
    post = "a post of images and text" if reads_images else "the text of a post"
    raise SettingsError(f"model.path: the chat template of {name} cannot render {post}: {problem}")


def label_tokens(tokenizer: Any, labels: LabelSpace) -> list[list[int]]:
    """K token sequences: each label after the forced prefix, with the end token.

    Raises:
        SettingsError: the prefix is tokenized differently before a label, or two labels have the same tokens.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    prefix = ids(labels.wording.prefix)
    names: dict[tuple[int, ...], str] = {}
    for name in labels.names:
        tokens = ids(f"{labels.wording.prefix} {name}")
        if tokens[: len(prefix)] != prefix or len(tokens) == len(prefix):
            raise SettingsError(f"task.labels: the tokenizer merges {name!r} with the text before it; rename it")
        suffix = tuple(tokens[len(prefix) :])
        if suffix in names:
            raise SettingsError(
                f"task.labels: the tokenizer encodes {names[suffix]!r} and {name!r} as the same tokens; rename one"
            )
        names[suffix] = name
    return [[*suffix, tokenizer.eos_token_id] for suffix in names]


def escape(text: str, tokens: re.Pattern[str]) -> str:
    """Insert a space into control tokens, so that `<|im_end|>` in a post does not end the message."""
    return tokens.sub(lambda token: f"{token[0][0]} {token[0][1:]}", text)


USUAL_CONTROL_TOKENS = re.compile(
    r"<[|｜][^<>\s]{1,64}[|｜]>|<[|｜]\w{1,32}>|<\w{1,32}[|｜]>|</?(?:start|end)_of_\w+>|<im_\w+>|<\w+_TOKEN>"
    r"|</?(?:s|bos|eos|pad|unk|mask|cls|sep|image|video|audio|img|think|tool_call|tool_response|sop|eop)>"
    r"|<\w*(?:image|img|video|audio|row_\d|global-img|fake_token|patch)[\w-]*>"
    r"|\[/?(?:INST|IMG|IMG_\w+|CLS|SEP|PAD|[gs]?MASK|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_\w+|THINK|(?:BEGIN_)?AUDIO)\]",
    re.IGNORECASE,
)
"""The control tokens of common model families, for a text whose tokenizer is not known."""

_MARKED = re.compile(r"<[|｜].*[|｜]>|</?\w+_\w+>|</?think>")
"""Added tokens that are control tokens although the tokenizer does not call them special."""


def control_tokens(processor: Any) -> re.Pattern[str]:
    """Pattern of the strings that the tokenizer or the processor treats as control tokens anywhere in a text."""
    tokenizer = processor.tokenizer
    tokens = {
        str(token) for token in tokenizer.added_tokens_decoder.values() if token.special or _MARKED.match(str(token))
    }
    tokens |= {str(token) for token in tokenizer.all_special_tokens}
    named = {name for name in (*vars(processor), "image_token", "video_token") if name.endswith(("_token", "_tag"))}
    tokens |= {str(value) for name in named if (value := getattr(processor, name, None))}
    tokens = {token for token in tokens if len(token.strip()) > 1}
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or "(?!)")


def save_processor(processor: Any, folder: Path) -> None:
    """Write a processor. The files do not depend on whether a batch was padded before."""
    if processor.tokenizer.is_fast:
        processor.tokenizer.backend_tokenizer.no_padding()
    processor.save_pretrained(folder)
