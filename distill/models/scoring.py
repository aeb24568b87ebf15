"""Label scoring: probabilities of the labels as the answer to a *classify* or *review* prompt with forced prefix."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from distill.models.backbone import Backbone, capped
from distill.models.encoding import PromptWithAnswers
from distill.models.packing import Features, build_tree_row
from distill.task import prompts
from distill.task.prompts import Template
from distill.task.sample import Sample

_LOGITS = 2**26
"""Largest number of logits that are held at once."""


class ScoredPrefill(NamedTuple):
    """Label scores of B samples, and the prefilled key-value cache of a second prompt about them.

    Attributes:
        probabilities: [B, K], as from `score_labels`.
        mass: [B], as from `score_labels`.
        prompt: inputs with which `generate` continues the second prompt: left-padded `input_ids` and `attention_mask`
            [B, T], `position_ids`, and `past_key_values` of all columns but the last.
        classify_lengths: [B], tokens of the *classify* prompts with forced prefix.
        added_lengths: [B], tokens of the second prompts that are not shared with the *classify* prompts.
    """

    probabilities: torch.Tensor
    mass: torch.Tensor
    prompt: dict[str, Any]
    classify_lengths: torch.Tensor
    added_lengths: torch.Tensor


def score_labels(backbone: Backbone, features: Features) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [B, K] and label mass [B] from right-padded prompts that end with the forced prefix.

    If all labels differ in their first token, only this token is scored; otherwise all tokens of the labels and their
    end tokens.
    """
    if backbone.labels_share_tokens:
        return _normalise_whole_labels(label_log_probabilities(backbone, features))
    logits = next_token_logits(backbone, features)
    return normalise_labels(logits, backbone.label_ids.to(logits.device))


def next_token_logits(backbone: Backbone, features: Features) -> torch.Tensor:
    """Logits [B, V] of the token after right-padded prompts."""
    last = features["attention_mask"].sum(1) - 1
    hidden = backbone.hidden_states(features)[torch.arange(len(last)), last]
    return backbone.logits(hidden)


def normalise_labels(logits: torch.Tensor, label_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over K labels [B, K] and their total probability [B], from next-token logits [B, V] and token ids [K]."""
    log_probabilities = torch.log_softmax(logits.float(), -1)[:, label_ids]
    return log_probabilities.softmax(-1), log_probabilities.exp().sum(-1)


def label_log_probabilities(backbone: Backbone, features: Features) -> torch.Tensor:
    """Log-probabilities [B, K] of all tokens of each label with its end token; differentiable.

    All labels are scored in one forward pass, as branches after the prompt that do not attend to each other; if the
    model does not pack, in one forward pass per label.

    Args:
        features: right-padded prompts that end with the forced prefix, from `Backbone.encode`.
    """
    if not backbone.packs:
        parts = [_one_label_log_probabilities(backbone, features, label) for label in backbone.label_tokens]
        return torch.stack(parts, 1)
    unpadded = [
        ids[mask].tolist() for ids, mask in zip(features["input_ids"], features["attention_mask"].bool(), strict=True)
    ]
    rows = [build_tree_row([(ids, backbone.label_tokens)]) for ids in unpadded]
    inputs, columns, *_ = backbone.branch(features, rows, [len(ids) for ids in unpadded])
    columns = (columns % inputs["input_ids"].shape[1]).view(len(rows), -1).to(backbone.device)
    return _whole_label_log_probabilities(backbone, _at(backbone.hidden_states(inputs), columns))


def _one_label_log_probabilities(backbone: Backbone, features: Features, label: Sequence[int]) -> torch.Tensor:
    """Log-probabilities [B] of all tokens of a label, appended to right-padded prompts."""
    lengths = features["attention_mask"].sum(1, keepdim=True)
    inputs = backbone.encoder.append(features, [label[:-1]] * len(lengths))
    columns = lengths - 1 + torch.arange(len(label), device=lengths.device)
    hidden = _at(backbone.hidden_states(inputs), columns)
    return _token_log_probabilities(backbone, hidden, range(len(label)), label).sum(1)


def score_and_prefill(backbone: Backbone, samples: Sequence[Sample], template: Template) -> ScoredPrefill:
    """Score the labels of B samples and prefill a second prompt about them, in one forward pass.

    A packed row (`models/packing.py`) holds the common prefix of both prompts and two branches that do not attend to
    each other: the rest of the second prompt, and the rest of the *classify* prompt with the forced prefix and labels.

    For models that pack (`Backbone.packs`); `classify_then_reason` does the same for others, in two passes.

    Args:
        template: template of the second prompt.

    Raises:
        ImageError, ClipError: an image, a video or a sound cannot be read.
        SettingsError: the chat template places the media where the prompts cannot share them.
    """
    labels = backbone.labels
    placeholder = [[backbone.processor.tokenizer.eos_token_id]]  # any first token: it has no column of its own
    packed = backbone.pack([
        [
            PromptWithAnswers((prompts.render(template, sample, labels), sample.media), [], placeholder),
            label_prompt(backbone, sample),
        ]
        for sample in samples
    ])  # fmt: skip
    inputs = {name: value.to(backbone.device) for name, value in packed.inputs.items()}
    width = inputs["input_ids"].shape[1]
    columns = (packed.columns % width).view(len(samples), -1).to(backbone.device)
    second_end, scored = columns[:, 0], columns[:, 1:]
    cache = DynamicCache()
    hidden = backbone.hidden_states(inputs, cache)
    if backbone.labels_share_tokens:
        scores = _normalise_whole_labels(_whole_label_log_probabilities(backbone, _at(hidden, scored)))
    else:
        last = hidden[torch.arange(len(samples)), scored[:, 0]]
        scores = normalise_labels(backbone.logits(last), backbone.label_ids.to(last.device))
    classify_end = scored[:, :1]
    every = torch.arange(width, device=classify_end.device)
    lengths = ((every <= classify_end) & (inputs["ends"] > classify_end)).sum(1)  # tokens that the last one attends to
    prompt = _leading_tokens(inputs, cache, second_end + 1, backbone.processor.tokenizer.pad_token_id)
    return ScoredPrefill(*scores, prompt, lengths, classify_end[:, 0] + 1 - lengths)


def _leading_tokens(inputs: Features, cache: DynamicCache, lengths: torch.Tensor, padding: int) -> dict[str, Any]:
    """The first `lengths` [B] tokens of each row, left-padded, with the cached keys and values of all but the last."""
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


def label_prompt(backbone: Backbone, sample: Sample) -> PromptWithAnswers:
    """The *classify* prompt with forced prefix, and the answers whose columns `label_scores` takes when it is packed.

    If all labels differ in their first token, it has one answer of one token, which stands for all.
    """
    answers = backbone.label_tokens if backbone.labels_share_tokens else [backbone.label_tokens[0][:1]]
    text = prompts.render("classify", sample, backbone.labels)
    return PromptWithAnswers((text, sample.media), backbone.encoder.tokens(backbone.labels.wording.prefix), answers)


def label_scores(backbone: Backbone, hidden: torch.Tensor) -> torch.Tensor:
    """Scores [B, K] whose softmax gives the label probabilities; differentiable.

    Args:
        hidden: hidden states [B, N, D] at the N columns that predict the answers of `label_prompt`.
    """
    if backbone.labels_share_tokens:
        return _whole_label_log_probabilities(backbone, hidden)
    with torch.autocast(hidden.device.type, enabled=False):  # a few logits: their rounding would cost more than time
        rows = backbone.head[backbone.label_ids.to(hidden.device)]
        return capped(hidden[:, 0].float() @ rows.float().T, backbone.cap)


def _at(hidden: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The hidden states [B, N, D] at columns [B, N] of [B, T, D]."""
    return hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))


def _whole_label_log_probabilities(backbone: Backbone, hidden: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [B, K] of each label, summed over its tokens.

    Columns after the same tokens, such as those of the first tokens of all labels, have the same logits, which are
    computed once.

    Args:
        hidden: hidden states [B, N, D] that predict the N tokens of all labels.
    """
    first: dict[tuple[int, ...], int] = {}  # of the columns after some tokens of a label
    columns: list[int] = []
    tokens: list[int] = []
    for label in backbone.label_tokens:
        for position, token in enumerate(label):
            columns.append(first.setdefault(tuple(label[:position]), len(tokens)))
            tokens.append(token)
    distinct = list(first.values())
    scores = _token_log_probabilities(backbone, hidden[:, distinct], [distinct.index(n) for n in columns], tokens)
    return torch.stack([part.sum(1) for part in scores.split([len(label) for label in backbone.label_tokens], 1)], 1)


def _token_log_probabilities(
    backbone: Backbone, hidden: torch.Tensor, columns: Sequence[int], tokens: Sequence[int]
) -> torch.Tensor:
    """Log-probabilities [B, N] of N tokens, each predicted by one of the hidden states [B, U, D].

    Args:
        columns: N indices below U.
    """
    rows = max(1, _LOGITS // (hidden.shape[1] * len(backbone.head)))
    scores = []
    for states in hidden.split(rows):
        logits = backbone.logits(states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores.append(logits[:, list(columns), list(tokens)] - logits.logsumexp(-1)[:, list(columns)])
    return torch.cat(scores)


def _normalise_whole_labels(log_probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [B, K] and mass [B] from the log-probabilities [B, K] of whole labels."""
    mass = log_probabilities.exp().sum(-1)
    # the sum can underflow, but a mass of 0 means that there is no answer
    return log_probabilities.softmax(-1), mass.clamp(min=torch.finfo(mass.dtype).tiny)
