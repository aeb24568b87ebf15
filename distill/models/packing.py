"""Sequences that begin alike in one row: what they share is read once, what they do not share stays apart.

A row is a tree of tokens, laid out depth first: the shared beginning, then for every question its own ending and the
answers to it. A token sees what stands before it on its own path from the root, at the position that it would have in a
sequence of its own, so that to the model every path is such a sequence.
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
        inputs: what the model takes; where rows branch, `ends` [B, T] in place of a mask (`tree_mask`), and positions.
        columns: [N], where each answer token is predicted: row · T + column.
        tokens: [N], the answer tokens.
        answers: [N], which answer each belongs to, counted over all rows and questions.
    """

    inputs: Features
    columns: torch.Tensor
    tokens: torch.Tensor
    answers: torch.Tensor


@dataclass
class Layout:
    """One row: its tokens, where the branch of each is closed, how far it is from the root; and what is predicted.

    `predictions` are pairs of a column and the token that it predicts, a list for each answer. The last token of an
    answer predicts nothing and stands in no column. Column -1 is what stands before the row.
    """

    tokens: list[int]
    ends: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    predictions: list[list[tuple[int, int]]] = field(default_factory=list)

    @property
    def branches(self) -> bool:
        """Whether any token does not see all that stand before it."""
        return any(end < len(self.tokens) for end in self.ends)


def lay_out(root: Sequence[int], questions: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> Layout:
    """A row of the tokens that all share, then of each question its own tokens and the answers behind them."""
    row = Layout(list(root), [0] * len(root), list(range(len(root))))

    def write(tokens: Sequence[int], depth: int) -> None:
        row.tokens += tokens
        row.ends += [0] * len(tokens)
        row.depths += range(depth, depth + len(tokens))

    def close(first: int) -> None:
        row.ends[first:] = [end or len(row.tokens) for end in row.ends[first:]]

    for own, answers in questions:
        begin = len(row.tokens)
        write(own, len(root))
        asked = len(row.tokens) - 1 if own else len(root) - 1
        for answer in answers:
            first = len(row.tokens)
            write(answer[:-1], len(root) + len(own))
            row.ends[first:] = [len(row.tokens)] * (len(answer) - 1)
            row.predictions.append(list(zip([asked, *range(first, len(row.tokens))], answer, strict=True)))
        close(begin)
    close(0)
    return row


def shared_length(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False)))


def tree_mask(ends: torch.Tensor) -> torch.Tensor:
    """Which columns each column sees, [B, 1, T, T], from the columns [B, T] at which each one's branch is closed."""
    columns = torch.arange(ends.shape[1], device=ends.device)
    return ((columns[:, None] >= columns) & (columns[:, None] < ends[:, None]))[:, None]


def pad_rows(rows: Sequence[Sequence[int]], padding: int | None = None) -> torch.Tensor:
    """[B, T] of rows padded on the right with `padding`; None: with the columns behind, so that each sees itself."""
    width = max(map(len, rows))
    return torch.tensor([
        [*row, *(range(len(row) + 1, width + 1) if padding is None else [padding] * (width - len(row)))] for row in rows
    ])  # fmt: skip


def tree_positions(shared: Sequence[torch.Tensor], rows: Sequence[Layout]) -> torch.Tensor:
    """Position ids [..., B, T] from those of the tokens [..., L] that each row's questions share: one more with each
    token behind them.
    """
    width, found = max(len(row.tokens) for row in rows), []
    for known, row in zip(shared, rows, strict=True):
        length = known.shape[-1]
        beyond = known[..., -1:] + torch.tensor(row.depths[length:]) - (length - 1)
        found.append(torch.nn.functional.pad(torch.cat([known, beyond], -1), (0, width - len(row.tokens))))
    return torch.stack(found, -2)


def predictions(inputs: Features, rows: Sequence[Layout]) -> Packed:
    """The model's inputs with what is predicted in them."""
    width, answers = inputs["input_ids"].shape[1], [answer for row in rows for answer in row.predictions]
    begins = [index * width for index, row in enumerate(rows) for _ in row.predictions]
    pairs = [(begin + column, token) for begin, answer in zip(begins, answers, strict=True) for column, token in answer]
    columns, tokens = torch.tensor(pairs).T
    sizes = torch.tensor([len(answer) for answer in answers])
    return Packed(inputs, columns, tokens, torch.arange(len(sizes)).repeat_interleave(sizes))
