"""Packing of sequences with a common prefix into one row (tree attention), so that the prefix is computed once.

A row is a token tree in depth-first order: the tokens that all its prompts share, then for each prompt its own tokens
and the tree of its answers. A token attends only to its ancestors and has the position id it would have in a separate
sequence. Each path from the root to a leaf is therefore equivalent to a separate sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple

import torch

Features = dict[str, torch.Tensor]


class Packed(NamedTuple):
    """B rows of T columns, and the N answer tokens that they predict.

    Attributes:
        inputs: model inputs; if a row branches, `ends` [B, T] replaces the mask (`tree_mask`) and positions are given.
        columns: [N], flat index row · T + column of the hidden state that predicts each answer token.
        tokens: [N], the answer tokens.
        answers: [N], index of the answer of each token, counted over all rows and prompts.
    """

    inputs: Features
    columns: torch.Tensor
    tokens: torch.Tensor
    answers: torch.Tensor


@dataclass
class TreeRow:
    """One packed row of T tokens.

    Attributes:
        tokens: T token ids.
        ends: T columns, the end (exclusive) of the subtree of each token: no later column attends to the token.
        depths: T distances from the root.
        predictions: per answer, pairs of a column and the token that it predicts. The last token of an answer predicts
            nothing and has no column. Column -1 is the last column before the row.
    """

    tokens: list[int]
    ends: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    predictions: list[list[tuple[int, int]]] = field(default_factory=list)

    @property
    def branches(self) -> bool:
        """Whether any token does not attend to all tokens before it."""
        return any(end < len(self.tokens) for end in self.ends)


def build_tree_row(prompts: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> TreeRow:
    """Build a row in which each sequence of a prompt and an answer shares its common prefix with the one before it.

    Args:
        prompts: pairs of the tokens of a prompt, and the answers to it, each with its end token.
    """
    row = TreeRow([])
    path: list[int] = []  # columns of the last sequence
    for prompt, answers in prompts:
        for answer in answers:
            sequence = [*prompt, *answer[:-1]]
            shared = shared_prefix_length([[row.tokens[column] for column in path], sequence])
            _end_at(row, path[shared:])
            path = [*path[:shared], *range(len(row.tokens), len(row.tokens) + len(sequence) - shared)]
            row.tokens += sequence[shared:]
            row.ends += [0] * (len(sequence) - shared)
            row.depths += range(shared, len(sequence))
            before = path[len(prompt) - 1 :] if prompt else [-1, *path]
            row.predictions.append(list(zip(before, answer, strict=True)))
    _end_at(row, path)
    return row


def _end_at(row: TreeRow, columns: Sequence[int]) -> None:
    """End the subtrees of some columns at the current end of the row."""
    for column in columns:
        row.ends[column] = len(row.tokens)


def shared_prefix_length(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix of the sequences, in tokens."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False)))


def tree_mask(ends: torch.Tensor) -> torch.Tensor:
    """Boolean attention mask [B, 1, T, T] from `ends` [B, T]: column i attends to j if j <= i < ends[j]."""
    columns = torch.arange(ends.shape[1], device=ends.device)
    return ((columns[:, None] >= columns) & (columns[:, None] < ends[:, None]))[:, None]


def pad_rows(rows: Sequence[Sequence[int]], padding: int | None = None) -> torch.Tensor:
    """[B, T] of rows padded on the right with `padding`; None: as `ends`, such that padding attends only to itself."""
    width = max(map(len, rows))
    return torch.tensor([
        [*row, *(range(len(row) + 1, width + 1) if padding is None else [padding] * (width - len(row)))] for row in rows
    ])  # fmt: skip


def tree_positions(shared: Sequence[torch.Tensor], rows: Sequence[TreeRow]) -> torch.Tensor:
    """Position ids [..., B, T] of packed rows; after the shared prefix they grow by one per token of a path.

    Args:
        shared: B tensors [..., L], the position ids of each row's shared prefix of L tokens.
    """
    width, padded = max(len(row.tokens) for row in rows), []
    for prefix, row in zip(shared, rows, strict=True):
        length = prefix.shape[-1]
        suffix = prefix[..., -1:] + torch.tensor(row.depths[length:], device=prefix.device) - (length - 1)
        padded.append(torch.nn.functional.pad(torch.cat([prefix, suffix], -1), (0, width - len(row.tokens))))
    return torch.stack(padded, -2)


def packed_batch(inputs: Features, rows: Sequence[TreeRow]) -> Packed:
    """Combine model inputs [B, T] with the predictions of their rows."""
    width, answers = inputs["input_ids"].shape[1], [answer for row in rows for answer in row.predictions]
    begins = [index * width for index, row in enumerate(rows) for _ in row.predictions]
    pairs = [(begin + column, token) for begin, answer in zip(begins, answers, strict=True) for column, token in answer]
    columns, tokens = torch.tensor(pairs).T
    sizes = torch.tensor([len(answer) for answer in answers])
    return Packed(inputs, columns, tokens, torch.arange(len(sizes)).repeat_interleave(sizes))
