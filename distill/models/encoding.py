"""Encoding of prompts and images as model inputs, and of labels as tokens."""

import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from distill.data.clips import ClipReader
from distill.data.text import clean
from distill.errors import SettingsError
from distill.models.families import Family
from distill.models.media import Loaded, MediaReader
from distill.models.memory import is_out_of_memory
from distill.models.packing import Features, TreeRow, build_tree_row, shared_prefix_length
from distill.models.pretrained import ModelSettings
from distill.task.labels import LabelSpace
from distill.task.sample import NO_MEDIA, Media

IGNORE = -100
"""Label of positions without loss."""

Prompt = tuple[str, Media]
"""A user message: its text, and the media placed before the text."""

Side = Literal["left", "right"]

_OF_MEDIA = re.compile("audio|feature|image|pixel|video")
"""Names of inputs with a value for each picture or sound: a mask of a spectrogram can have the shape of the tokens."""


def token_aligned(features: Features) -> Features:
    """The inputs of shape [B, T] or [B, T, ...] that have a value for each token."""
    shape = features["input_ids"].shape
    return {
        name: value
        for name, value in features.items()
        if name == "cross_attention_mask" or (value.shape == shape and not _OF_MEDIA.search(name))
    }


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
        processor: tokenizer, chat template, image processor and feature extractor.
        settings: how the model is given images, videos and sounds.
        family: of the model.
        clips: decodes videos and sounds.

    Attributes:
        reads_images: whether the model is given the images of the messages, and can read them.
    """

    def __init__(
        self, processor: Any, settings: ModelSettings, family: Family | None = None, clips: ClipReader | None = None
    ) -> None:
        self.processor = processor
        family = family or Family("")
        self.answer_type = family.answer_type
        self.image_size = settings.image_size
        self.media = MediaReader(processor, settings, family, clips or ClipReader())
        self.reads_images = self.media.images
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
            ImageError, ClipError: an image, a video or a sound cannot be read.
        """
        features = self._process(prompts, self._load(prompts))
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
        """Pack B rows of prompts; the prompts of a row have the same media, and their common prefix is stored once.

        Args:
            width: rows without media are joined to the row before while they have at most this many tokens together.

        Returns:
            The features of each row's first prompt, padded by the processor; at most B packed rows (`build_tree_row`);
            and the lengths of their common prefixes, in tokens.

        Raises:
            ImageError, ClipError: an image, a video or a sound cannot be read.
            SettingsError: the chat template places the media after the common prefix.
        """
        prompts = [item.prompt for row in rows for item in row]
        loaded = self._load(prompts)
        tokens = iter(self._prompt_tokens(prompts, loaded))
        branches = [[(item, next(tokens)) for item in row] for row in rows]
        branches = self._joined(branches, width, loaded) if width else branches
        features = self._process([row[0][0].prompt for row in branches], loaded)
        packed, lengths = [], []
        for row, ids, mask in zip(branches, features["input_ids"], features["attention_mask"], strict=True):
            first = ids[mask.bool()].tolist()  # with the tokens of the media expanded
            shared = shared_prefix_length([prompt for _, prompt in row])
            length = len(first) - len(row[0][1]) + shared
            if first[length:] != row[0][1][shared:]:
                raise SettingsError("packing: the chat template places images after the text; set packing to false")
            packed.append(_tree([(item, [*first[:length], *prompt[shared:]]) for item, prompt in row]))
            lengths.append(length)
        return features, packed, lengths

    def _joined(self, rows: Sequence[list[_Branch]], width: int, loaded: Mapping[Media, Loaded]) -> list[list[_Branch]]:
        """Join neighbouring rows without media that have at most `width` tokens together."""
        joined: list[list[_Branch]] = []
        length = width  # of the last row; no row joins one with media
        for row in rows:
            if loaded[row[0][0].prompt[1]].parts:
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
        """SHA-256 of the preprocessing of texts and images: tokenizer, chat template, image processor and size.

        That of videos and sounds is `media.fingerprint`.
        """
        tokenizer = self.processor.tokenizer.backend_tokenizer
        tokenizer.no_padding(), tokenizer.no_truncation()  # it keeps those of its last call
        parts = [tokenizer.to_str(), str(self.processor.chat_template)]
        if self.reads_images:
            parts += [self.processor.image_processor.to_json_string(), str(self.image_size)]
        return sha256("\0".join(parts).encode()).hexdigest()

    def render(self, text: str, media: Media = NO_MEDIA) -> str:
        """One user message in the chat template, including the generation prompt. Raises ClipError."""
        return self._render(text, self.media.load(media))

    def _render(self, text: str, loaded: Loaded) -> str:
        content = [*loaded.parts, {"type": "text", "text": self._escape(text)}]
        messages = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def _load(self, prompts: Sequence[Prompt]) -> dict[Media, Loaded]:
        """The media of some messages, each loaded once."""
        return {media: self.media.load(media) for media in dict.fromkeys(media for _, media in prompts)}

    def _process(self, prompts: Sequence[Prompt], loaded: Mapping[Media, Loaded]) -> Features:
        """The processor's tensors of B messages, padded to the longest on the processor's padding side.

        Raises:
            ImageError: an image cannot be read.
            SettingsError: the processor refuses the messages, or their media.
        """
        texts = [self._render(text, loaded[media]) for text, media in prompts]
        batch = [loaded[media] for _, media in prompts]
        calls = [{"text": texts[part]} | self.media.arguments(batch[part]) for part in self.media.groups(batch)]
        special = not self.starts_with_bos(texts[0])
        options: dict[str, Any] = {"return_tensors": "pt", "padding": True, "add_special_tokens": special}
        try:
            features = self._joined_features([self.media.process(**call, **options) for call in calls])
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError) as error:
            if is_out_of_memory(error):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            most = max(len(message.pictures) for message in batch)
            raise SettingsError(
                f"model.path: the processor does not take posts with {most} images and image_size "
                f"{self.image_size}: {reason}"
            ) from error
        features.pop("labels", None)  # some processors add labels that ignore all tokens
        return features

    def _joined_features(self, rows: Sequence[Features]) -> Features:
        """The features of single messages as those of a batch; fewer tokens and pictures are padded."""
        if len(rows) == 1:
            return rows[0]
        empty = {name: values[0, :0] for row in rows for name, values in row.items()}
        paddings = {"input_ids": self.processor.tokenizer.pad_token_id}
        return {
            name: torch.nn.utils.rnn.pad_sequence(
                [row[name][0] if name in row else none for row in rows], True, paddings.get(name, 0)
            )
            for name, none in empty.items()
        }

    def _prompt_tokens(self, prompts: Sequence[Prompt], loaded: Mapping[Media, Loaded]) -> list[list[int]]:
        """The tokens of messages before the placeholders of their media are expanded."""
        texts = [self._render(text, loaded[media]) for text, media in prompts]
        special = not self.starts_with_bos(texts[0])
        encoded = self.processor.tokenizer(texts, add_special_tokens=special)["input_ids"]
        return [list(tokens) for tokens in encoded]

    def starts_with_bos(self, text: str) -> bool:
        """Whether the chat template has already written the BOS token."""
        bos = self.processor.tokenizer.bos_token
        return bool(bos) and text.startswith(bos)

    def _escape(self, text: str) -> str:
        return escape(clean(text), self._control_tokens)


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
    named = {
        name
        for name in (*vars(processor), "image_token", "video_token", "audio_token")
        if name.endswith(("_token", "_tag"))
    }
    tokens |= {str(value) for name in named if (value := getattr(processor, name, None))}
    tokens = {token for token in tokens if len(token.strip()) > 1}
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or "(?!)")


def save_processor(processor: Any, folder: Path) -> None:
    """Write a processor. The files do not depend on whether a batch was padded before."""
    if processor.tokenizer.is_fast:
        processor.tokenizer.backend_tokenizer.no_padding()
    processor.save_pretrained(folder)
