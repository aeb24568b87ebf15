"""From questions and pictures to a model's input tensors, and from labels to their tokens."""

import re
import sys
from collections.abc import Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from distill.data.images import decode
from distill.errors import SettingsError
from distill.models.packing import Features, Layout, lay_out, shared_length
from distill.task.labels import LabelSpace
from distill.task.prompts import CLASSIFY_PREFIX

IGNORE = -100
"""The label of positions that carry no loss."""

Prompt = tuple[str, tuple[Path, ...]]
"""A user's message: its text, and the images that go before it."""

Side = Literal["left", "right"]


class Question(NamedTuple):
    """A message, the tokens that close it, and the answers to it as tokens, each with its end token."""

    prompt: Prompt
    closing: Sequence[int]
    answers: Sequence[Sequence[int]]


class Encoder:
    """A processor that is asked for single messages; `image_size` is the side of its pictures, 0: their own sizes."""

    def __init__(self, processor: Any, image_size: int) -> None:
        self.processor = processor
        self.image_size = image_size
        self._control = _control_tokens(processor)

    def encode(
        self,
        prompts: Sequence[Prompt],
        endings: Sequence[Sequence[int]] | None = None,
        *,
        labelled: bool = False,
        padding_side: Side = "right",
    ) -> Features:
        """Tensors of B messages padded to the longest: `input_ids`, `attention_mask` [B, T], and what pictures need.

        Args:
            endings: tokens that go behind each message and the opening of the answer.
            labelled: add `labels` [B, T], which mark the endings, IGNORE elsewhere.

        Raises:
            ImageError: a picture cannot be read.
        """
        tokenizer = self.processor.tokenizer
        features = self._process(prompts)
        rows = [mask.bool() for mask in features["attention_mask"]]
        shape = features["input_ids"].shape
        endings = endings or [()] * len(prompts)

        def extended(name: str, tail: Sequence[Sequence[int]], padding: int) -> torch.Tensor:
            parts = [
                torch.cat([line[row], line.new_tensor(end)])
                for line, row, end in zip(features[name], rows, tail, strict=True)
            ]
            return torch.nn.utils.rnn.pad_sequence(parts, True, padding, padding_side)

        if labelled:
            features["labels"] = torch.full(shape, IGNORE)
        aligned = {name: value for name, value in features.items() if value.shape == shape}
        for name in aligned:
            if name in ("input_ids", "labels"):
                tail, padding = endings, IGNORE if name == "labels" else tokenizer.pad_token_id
            else:  # mm_token_type_ids marks pictures, of which an ending has none
                tail, padding = [[int(name == "attention_mask")] * len(end) for end in endings], 0
            aligned[name] = extended(name, tail, padding)
        return features | aligned

    def pack(self, rows: Sequence[Sequence[Question]]) -> tuple[Features, list[Layout], list[int]]:
        """B rows of questions about the same pictures: what they begin with is laid out once (`packing.lay_out`).

        Returns:
            the features of each row's first prompt as the processor pads them, the rows, and how many of the first
            tokens of each row all its questions share.

        Raises:
            ImageError: a picture cannot be read.
            SettingsError: the chat template puts pictures behind what the questions share.
        """
        features = self._process([row[0].prompt for row in rows])
        tokens = iter(self._prompt_tokens([question.prompt for row in rows for question in row]))
        found, lengths = [], []
        for row, ids, mask in zip(rows, features["input_ids"], features["attention_mask"], strict=True):
            whole = ids[mask.bool()].tolist()
            alone = list(islice(tokens, len(row)))
            shared = shared_length(alone)
            length = len(whole) - len(alone[0]) + shared
            if whole[length:] != alone[0][shared:]:
                raise SettingsError("packing: the chat template puts pictures behind the text; take false")
            questions = [
                ([*prompt[shared:], *question.closing], question.answers)
                for prompt, question in zip(alone, row, strict=True)
            ]
            found.append(lay_out(whole[:length], questions))
            lengths.append(length)
        return features, found, lengths

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text, none of them a control token."""
        return list(self.processor.tokenizer(self._plain(text), add_special_tokens=False)["input_ids"])

    def fingerprint(self) -> str:
        """A hash of all that turns a message into tensors: tokenizer, chat template and image processor."""
        parts = (
            self.processor.tokenizer.backend_tokenizer.to_str(),
            str(self.processor.chat_template),
            self.processor.image_processor.to_json_string(),
            str(self.image_size),
        )
        return sha256("\0".join(parts).encode()).hexdigest()

    def render(self, text: str, images: Sequence[Path] = ()) -> str:
        """One message of the user in the chat template, up to where the answer begins."""
        content = [{"type": "image"} for _ in images]
        content.append({"type": "text", "text": self._plain(text)})
        messages = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def picture(self, path: Path) -> Any:
        """A picture in the model's size. Raises ImageError."""
        image = decode(path, sys.maxsize)  # the reader of the corpus applied the user's limit
        size = self.image_size
        return image.resize((size, size)) if size and image.size != (size, size) else image

    def _process(self, prompts: Sequence[Prompt]) -> Features:
        """The processor's tensors of B messages, padded to the longest on its own side."""
        texts = [self.render(*prompt) for prompt in prompts]
        pictures = [[self.picture(path) for path in images] for _, images in prompts]
        images = pictures if all(pictures) else [image for row in pictures for image in row] or None
        special = not self._begins(texts[0])
        return dict(
            self.processor(text=texts, images=images, return_tensors="pt", padding=True, add_special_tokens=special)
        )

    def _prompt_tokens(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The tokens of messages before their pictures are filled in."""
        texts = [self.render(*prompt) for prompt in prompts]
        found = self.processor.tokenizer(texts, add_special_tokens=not self._begins(texts[0]))["input_ids"]
        return [list(tokens) for tokens in found]

    def _begins(self, text: str) -> bool:
        """Whether the chat template wrote the token that a text begins with."""
        begin = self.processor.tokenizer.bos_token
        return bool(begin) and text.startswith(begin)

    def _plain(self, text: str) -> str:
        """Text in which nothing is a control token: a post that says `<|im_end|>` must end no message."""
        return self._control.sub(lambda token: f"{token[0][0]} {token[0][1:]}", text)


def label_tokens(tokenizer: Any, labels: LabelSpace) -> list[list[int]]:
    """The tokens of each label after the forced prefix, its end token included (DESIGN section 6).

    Raises:
        SettingsError: the prefix is tokenised differently before a label, or two labels have the same tokens.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    prefix = ids(CLASSIFY_PREFIX)
    found: dict[tuple[int, ...], str] = {}
    for name in labels.names:
        tokens = ids(f"{CLASSIFY_PREFIX} {name}")
        if tokens[: len(prefix)] != prefix or len(tokens) == len(prefix):
            raise SettingsError(f"task.labels: the tokenizer joins {name!r} with the text before it; name it otherwise")
        written = tuple(tokens[len(prefix) :])
        if written in found:
            raise SettingsError(
                f"task.labels: the tokenizer writes {found[written]!r} and {name!r} with the same tokens"
            )
        found[written] = name
    return [[*written, tokenizer.eos_token_id] for written in found]


def _control_tokens(processor: Any) -> re.Pattern[str]:
    """What the tokenizer, or the processor before it, takes for a control token wherever it stands in a text."""
    tokens = {str(token) for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
    tokens |= {getattr(processor, name) for name in ("image_token", "video_token") if hasattr(processor, name)}
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or "(?!)")
