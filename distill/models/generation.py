"""Generation of answers with `generate` of transformers, whose decoding loop is replaced (`decode`).

The cache is written in place; transformers copies it for each token. A row that has ended leaves the batch;
transformers computes it until the last row ends. A token is drawn in two steps, from few values each; a random number
for each token of a large vocabulary takes as long as half of the output head.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, DynamicLayer
from transformers.cache_utils import DynamicSlidingWindowLayer

from distill.models.backbone import Backbone, wide_linear
from distill.models.packing import Features
from distill.models.reasoner import Sampling

Check = Callable[[torch.Tensor, Sequence[int]], None]
"""Called at each step with the logits [N, V] of the model, before temperature is applied, and the indices of their N
rows in the batch."""

Record = Callable[[torch.Tensor, torch.Tensor, Sequence[int]], None]
"""Called after `Check` with the same and, between them, the tokens [N] that were chosen."""


@dataclass(frozen=True)
class Token:
    """One generated token.

    Attributes:
        text: the decoded token.
        logprob: its log-probability.
        top_logprobs: log-probabilities by text of the top-k and the requested tokens at this position, highest first.
    """

    text: str
    logprob: float
    top_logprobs: Mapping[str, float]


_ROOM = 128
"""Tokens for which a cache has room when it is moved to a larger place."""

_BLOCK = 128
"""Tokens in a block of the vocabulary, of which one is drawn first."""

_LOWEST_TEMPERATURE = 1e-4
"""Below it decoding is greedy, its limit: logits divided by a smaller temperature overflow."""


@torch.inference_mode()
def generate(
    backbone: Backbone,
    features: Features,
    sampling: Sampling,
    seed: int,
    check: Check | None = None,
    record: Record | None = None,
) -> list[list[int]]:
    """The tokens of the answers to B left-padded prompts, each with its end token unless it reached the limit.

    The random state of the caller is kept.

    Args:
        features: on the device of the model; they may hold `past_key_values` of all columns but the last.
    """
    options = _options(sampling) | {"eos_token_id": end_tokens(backbone)}
    options["pad_token_id"] = backbone.processor.tokenizer.pad_token_id
    device = backbone.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        answers: list[list[int]] = backbone.model.generate(  # type: ignore[operator]
            **features, **options, custom_generate=decode, check=check, record=record
        )
    return answers


def decode(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Callable[..., torch.Tensor],
    stopping_criteria: Callable[..., torch.Tensor],
    generation_config: Any,
    check: Check | None,
    record: Record | None,
    **state: Any,
) -> list[list[int]]:
    """The decoding loop for greedy decoding and sampling, as a `custom_generate` of transformers.

    Args:
        input_ids: prompts [B, T].
        state: model inputs that `generate` has prepared; each step adds a column to them.
    """
    rows = list(range(len(input_ids)))
    answers: list[list[int]] = [[] for _ in rows]
    with _wide_head(model):
        outputs = model._prefill(input_ids, generation_config, state)
    if isinstance(cache := state.get("past_key_values"), DynamicCache):
        write_in_place(cache)
    with model._optimize_model_for_decode(), _wide_head(model):
        while True:
            state = model._update_model_kwargs_for_generation(outputs, state, is_encoder_decoder=False)
            logits = outputs.logits[:, -1].float()
            if check is not None:
                check(logits, rows)
            scores = logits_processor(input_ids, logits)
            tokens = draw(scores) if generation_config.do_sample else scores.argmax(-1)
            if record is not None:
                record(logits, tokens, rows)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                answers[row].append(token)
            input_ids = torch.cat([input_ids, tokens[:, None]], 1)
            kept = (~stopping_criteria(input_ids, None)).nonzero()[:, 0]
            if not len(kept):
                return answers
            if len(kept) < len(rows):
                state = _select(state, kept, len(rows))
                rows, input_ids = [rows[place] for place in kept.tolist()], input_ids[kept]
            inputs = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=1 if state["use_cache"] else None, **state
            )
            outputs = model(**inputs, return_dict=True)


@contextmanager
def _wide_head(model: Any) -> Iterator[None]:
    """The output head of a model computes `wide_linear`."""
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:  # another kind of layer has its own computation
        yield
        return
    head.forward = lambda hidden: wide_linear(hidden, head.weight, head.bias)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward


def draw(scores: torch.Tensor) -> torch.Tensor:
    """Draw one token per row [B] from softmax(scores) of scores [B, V]: first a block of tokens, then one in it."""
    probabilities = scores.softmax(-1)
    if rest := -scores.shape[1] % _BLOCK:
        probabilities = torch.nn.functional.pad(probabilities, (0, rest))
    blocks = probabilities.view(len(scores), -1, _BLOCK)
    block = blocks.sum(-1).multinomial(1)
    inside = blocks.take_along_dim(block[..., None], 1)[:, 0].multinomial(1)
    return (block * _BLOCK + inside)[:, 0]


def write_in_place(cache: DynamicCache) -> None:
    """Let the layers of a filled cache that grow with each token write in place. Other layers stay as they are."""
    kinds = {DynamicLayer: _InPlaceLayer, DynamicSlidingWindowLayer: _InPlaceSlidingLayer}
    for index, layer in enumerate(cache.layers):
        if (kind := kinds.get(type(layer))) is not None:
            cache.layers[index] = kind.of(layer)


class _InPlace(DynamicLayer):
    """Keys and values [B, H, T, D] are a window on tensors [B, H, T', D] with room for more tokens."""

    keys: torch.Tensor
    values: torch.Tensor
    _spaces: Sequence[torch.Tensor] = ()
    _end = 0  # of the window

    @classmethod
    def of(cls, layer: DynamicLayer) -> "_InPlace":
        """A layer with the states and settings of another."""
        new = cls.__new__(cls)
        new.__dict__.update(layer.__dict__)
        return new

    def append(self, *added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, H, T + N, D] with the keys and values of N more tokens."""
        kept, more = self.keys.shape[-2], added[0].shape[-2]
        if not self._spaces or self._end + more > self._spaces[0].shape[-2]:
            self._spaces = [_with_room(states, more + _ROOM) for states in (self.keys, self.values)]
            self._end = kept
        first, self._end = self._end - kept, self._end + more
        for space, states in zip(self._spaces, added, strict=True):
            space[:, :, self._end - more : self._end] = states
        keys, values = (space[:, :, first : self._end] for space in self._spaces)
        return keys, values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if not self._spaces:
            return super().reorder_cache(beam_idx)
        first = self._end - self.keys.shape[-2]
        self._spaces = [space.index_select(0, beam_idx) for space in self._spaces]
        self.keys, self.values = (space[:, :, first : self._end] for space in self._spaces)
        return None


class _InPlaceLayer(_InPlace):
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = self.append(key_states, value_states)
        return self.keys, self.values


class _InPlaceSlidingLayer(_InPlace, DynamicSlidingWindowLayer):
    """Keeps the states of the last W - 1 tokens of a window of W."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.cumulative_length += key_states.shape[-2]
        keys, values = self.append(key_states, value_states)
        self.keys, self.values = (states[:, :, -self.sliding_window + 1 :] for states in (keys, values))
        return keys, values


def _with_room(states: torch.Tensor, room: int) -> torch.Tensor:
    """States [B, H, T, D] at the beginning of a tensor [B, H, T + room, D]."""
    space = states.new_empty((*states.shape[:2], states.shape[2] + room, states.shape[3]))
    space[:, :, : states.shape[2]] = states
    return space


def _select(state: Mapping[str, Any], kept: torch.Tensor, count: int) -> dict[str, Any]:
    """The rows `kept` [N] of the model inputs and caches of `count` rows."""
    selected = dict(state)
    for name, value in state.items():
        if isinstance(value, Cache):
            value.reorder_cache(kept)
        elif isinstance(value, torch.Tensor) and value.dim() > 1:
            axis = value.dim() - 2 if name == "position_ids" else 0
            if value.shape[axis] == count:
                selected[name] = value.index_select(axis, kept)
    return selected


def _options(sampling: Sampling) -> dict[str, Any]:
    """Sampling options of `generate`; they override the generation config that a published model brings."""
    options: dict[str, Any] = {"max_new_tokens": sampling.max_new_tokens, "repetition_penalty": 1.0}
    if sampling.temperature >= _LOWEST_TEMPERATURE:
        return options | {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    # the defaults of transformers
    return options | {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}


def end_tokens(backbone: Backbone) -> list[int]:
    """Ids of the end tokens: the tokenizer's and those of the generation config."""
    published = backbone.model.generation_config.eos_token_id  # type: ignore[union-attr]
    ids = published if isinstance(published, list) else [published]
    return sorted({backbone.processor.tokenizer.eos_token_id, *ids} - {None})


class LogprobRecorder:
    """A `Record` of the log-probabilities of the tokens at each step.

    Args:
        count: number of most probable tokens per step.
        token_ids: tokens that are always recorded.
    """

    def __init__(self, count: int, token_ids: Sequence[int], device: torch.device) -> None:
        self._count = count
        self._token_ids = torch.tensor(token_ids, dtype=torch.long, device=device)
        self._steps: list[tuple[Sequence[int], torch.Tensor, torch.Tensor]] = []

    def __call__(self, logits: torch.Tensor, tokens: torch.Tensor, rows: Sequence[int]) -> None:
        log_probabilities = logits.log_softmax(-1)
        top = log_probabilities.topk(self._count).indices
        ids = torch.cat([tokens[:, None], top, self._token_ids.expand(len(top), -1)], 1)
        self._steps.append((rows, ids.cpu(), log_probabilities.gather(1, ids).cpu()))

    def tokens(self, row: int, tokenizer: Any) -> tuple[Token, ...]:
        """The generated tokens of one row of the batch."""
        tokens = []
        for rows, ids, values in self._steps:
            if row not in rows:
                break
            place = rows.index(row)
            texts = [tokenizer.decode([token]) for token in ids[place].tolist()]
            pairs = list(zip(texts, values[place].tolist(), strict=True))
            top: dict[str, float] = {}
            for text, value in sorted(pairs[1:], key=lambda pair: -pair[1]):
                top.setdefault(text, value)  # of tokens with the same text, keep the most probable
            tokens.append(Token(*pairs[0], top))
        return tuple(tokens)
