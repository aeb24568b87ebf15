"""Label scoring: the probability of each label as the answer to a closed *classify* or *review* prompt."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from distill.models.backbone import Backbone
from distill.models.encoding import Question
from distill.models.packing import Features, lay_out
from distill.task import prompts
from distill.task.prompts import Template
from distill.task.sample import Sample


class Reading(NamedTuple):
    """B samples read once for two questions: their labels, and from where a model goes on to answer the other one.

    Attributes:
        probabilities, mass: [B, K] and [B], as `score_labels` gives them.
        prompt: what `generate` takes to go on: left-padded `input_ids` and `attention_mask` [B, T], `position_ids`, and
            `past_key_values` of all columns but the last.
        lengths: [B], tokens of the closed *classify* prompts.
        added: [B], tokens of the other prompts that are not in the first ones.
    """

    probabilities: torch.Tensor
    mass: torch.Tensor
    prompt: dict[str, Any]
    lengths: torch.Tensor
    added: torch.Tensor


def score_labels(backbone: Backbone, features: Features) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [B, K] and label mass [B] of right-padded prompts closed with the forced prefix (DESIGN section 6).

    Labels that differ in their first token are told apart by it; others are scored whole, with their end tokens.
    """
    if backbone.labels_share_tokens:
        return _normalised(label_log_probabilities(backbone, features))
    last = features["attention_mask"].sum(1) - 1
    hidden = backbone.hidden_states(features)[torch.arange(len(last)), last]
    return normalise_labels(hidden @ backbone.head.T, backbone.label_ids.to(hidden.device))


def normalise_labels(logits: torch.Tensor, label_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the K labels alone and the mass they held, from next-token logits [B, V] and token ids [K]."""
    log_probabilities = torch.log_softmax(logits.float(), -1)[:, label_ids]
    return log_probabilities.softmax(-1), log_probabilities.exp().sum(-1)


def label_log_probabilities(backbone: Backbone, features: Features) -> torch.Tensor:
    """Log-probabilities [B, K] of the whole labels with their end tokens; differentiable.

    All labels are scored in one forward pass behind one prompt, as branches that cannot see each other.

    Args:
        features: right-padded prompts closed with the forced prefix, as `Backbone.encode` makes them.
    """
    ids, mask = features["input_ids"], features["attention_mask"].bool()
    branches = lay_out([], [([], backbone.label_tokens)])
    width, size = ids.shape[1], len(branches.tokens)

    def behind(row: torch.Tensor, values: Sequence[int]) -> torch.Tensor:
        return torch.cat([row, torch.tensor(values).to(row).expand(len(ids), -1)], 1)

    inputs = {
        name: torch.nn.functional.pad(value, (0, size)) if value.shape == ids.shape else value
        for name, value in features.items()
        if name != "attention_mask"
    }
    inputs["input_ids"] = behind(ids, branches.tokens)
    itself = torch.arange(1, width + 1, device=ids.device)  # what padding sees
    inputs["ends"] = behind(torch.where(mask, width + size, itself), [width + end for end in branches.ends])
    positions = backbone.positions(features)
    last = mask.sum(1, keepdim=True) - 1
    depths = torch.tensor(branches.depths, device=ids.device)
    root = positions.gather(-1, last.expand(*positions.shape[:-1], 1))
    inputs["position_ids"] = torch.cat([positions, root + 1 + depths], -1)

    columns = torch.tensor([column for label in branches.predictions for column, _ in label], device=ids.device)
    columns = torch.where(columns < 0, last, width + columns)
    return _whole_labels(backbone, backbone.hidden_states(inputs), columns)


def read_both(backbone: Backbone, samples: Sequence[Sample], template: Template) -> Reading:
    """Label scoring of B samples and the reading of another question about them, in one forward pass.

    A row holds what the questions share, the other question's own tokens, and the closed *classify* prompt's with the
    labels, as branches that cannot see each other (`models/packing.py`).

    Raises:
        ImageError: a picture cannot be read.
        SettingsError: the chat template does not let the questions share their pictures.
    """
    labels, closing = backbone.labels, backbone.encoder.tokens(prompts.CLASSIFY_PREFIX)
    answers = backbone.label_tokens if backbone.labels_share_tokens else [backbone.label_tokens[0][:1]]
    unwritten = [[backbone.processor.tokenizer.eos_token_id]]  # whatever it begins with
    packed = backbone.pack([
        [
            Question((prompts.render(template, sample, labels), sample.images), [], unwritten),
            Question((prompts.render("classify", sample, labels), sample.images), closing, answers),
        ]
        for sample in samples
    ])  # fmt: skip
    inputs = {name: value.to(backbone.device) for name, value in packed.inputs.items()}
    width = inputs["input_ids"].shape[1]
    columns = (packed.columns % width).view(len(samples), -1).to(backbone.device)
    asked, scored = columns[:, 0], columns[:, 1:]
    cache = DynamicCache()
    hidden = backbone.hidden_states(inputs, cache)
    if backbone.labels_share_tokens:
        found = _normalised(_whole_labels(backbone, hidden, scored))
    else:
        last = hidden[torch.arange(len(samples)), scored[:, 0]]
        found = normalise_labels(last @ backbone.head.T, backbone.label_ids.to(last.device))
    closed = scored[:, :1]
    every = torch.arange(width, device=closed.device)
    lengths = ((every <= closed) & (inputs["ends"] > closed)).sum(1)  # what the last token of the prompt sees
    prompt = _first_tokens(inputs, cache, asked + 1, backbone.processor.tokenizer.pad_token_id)
    return Reading(*found, prompt, lengths, closed[:, 0] + 1 - lengths)


def _first_tokens(inputs: Features, cache: DynamicCache, lengths: torch.Tensor, padding: int) -> dict[str, Any]:
    """The first `lengths` [B] tokens of rows, padded on the left, with what a cache holds of all but the last."""
    width = int(lengths.max())
    columns = torch.arange(width, device=lengths.device) - (width - lengths)[:, None]
    mask, columns = columns >= 0, columns.clamp(min=0)
    kept = columns[:, None, :-1, None]
    for layer in cache.layers:
        layer.keys, layer.values = (
            states.gather(2, kept.expand(-1, states.shape[1], -1, states.shape[3]))
            for states in (layer.keys, layer.values)
        )
    positions = inputs["position_ids"]
    return {
        "input_ids": inputs["input_ids"].gather(1, columns).masked_fill(~mask, padding),
        "attention_mask": mask.long(),
        "position_ids": positions.gather(-1, columns.expand(*positions.shape[:-2], -1, -1)),
        "past_key_values": cache,
    }


def _whole_labels(backbone: Backbone, hidden: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [B, K] of all tokens of each label, which hidden states [B, T, D] predict at columns [B, N]."""
    tokens = torch.tensor([token for label in backbone.label_tokens for token in label], device=columns.device)
    logits = hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1])) @ backbone.head.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    found = logits.gather(-1, tokens.expand(len(columns), -1)[..., None])[..., 0] - logits.logsumexp(-1)
    return torch.stack([part.sum(1) for part in found.split([len(label) for label in backbone.label_tokens], 1)], 1)


def _normalised(log_probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [B, K] and mass [B] of whole labels."""
    mass = log_probabilities.exp().sum(-1)
    # too small for a float, perhaps, but 0 would say that there is no answer
    return log_probabilities.softmax(-1), mass.clamp(min=torch.finfo(mass.dtype).tiny)
