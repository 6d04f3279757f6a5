"""Which sequences share a forward pass, and the arrays of that pass: a pure, deterministic plan.

Rows are right-padded to the longest of their microbatch (rows of similar length share one).  Every rank computes
the same plan from the same batch; the plan, not its callers, knows about padding, so that packing without padding
(THD) can replace it.

A sequence of N tokens is N - 1 inputs: the last token is predicted, never processed.

Shape key:  B sequences of the step, b rows of one microbatch, s padded inputs per row (s / context on one rank),
            S response tokens of the microbatch that this context rank predicts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_vespo.config import LayoutConfig
from megatron_vespo.types import Floats, RunError, TrainSequence

Index = NDArray[np.int64]

DUMMY = -1
"""A row without a sequence; it fills the grid and contributes zero."""


@dataclass(frozen=True)
class Microbatch:
    """What one rank's forward pass holds."""

    rows: tuple[int, ...]
    """Indices into the batch, longest first; DUMMY where a row is empty."""
    length: int
    """Padded inputs per row, before the context axis divides them."""


def padded_length(num_tokens: int, layout: LayoutConfig) -> int:
    """Padded inputs of a sequence of `num_tokens` tokens, which the tensor and context axes divide evenly."""
    multiple = layout.tensor * (2 * layout.context if layout.context > 1 else 1)
    return math.ceil((num_tokens - 1) / multiple) * multiple


def plan(
    sequences: Sequence[TrainSequence], layout: LayoutConfig, *, max_tokens: int
) -> list[list[Microbatch]]:
    """Microbatches of each data rank: the same number, with the same shapes, for every rank.

    Sequences are sorted by length and cut greedily where padded tokens reach `max_tokens`; those of one cut are
    dealt out over the data ranks, so that ranks which exchange experts' tokens work on equally long rows.

    Args:
        max_tokens: budget of padded inputs of one rank's microbatch.

    Raises:
        RunError: a sequence alone exceeds the budget.
    """
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i].token_ids), i))
    microbatches: list[list[Microbatch]] = [[] for _ in range(layout.data)]
    while order:
        length = padded_length(len(sequences[order[0]].token_ids), layout)
        if length > max_tokens:
            raise RunError(
                f"sequence {sequences[order[0]].uid}: {length} padded tokens exceed trainer.max_tokens_per_microbatch "
                f"= {max_tokens}, and sequences are never split; raise it, or shorten the sequences"
            )
        num_rows = min(max_tokens // length, math.ceil(len(order) / layout.data))
        taken, order = order[: num_rows * layout.data], order[num_rows * layout.data :]
        taken += [DUMMY] * (num_rows * layout.data - len(taken))
        for data_rank, microbatch in enumerate(microbatches):
            microbatch.append(Microbatch(tuple(taken[data_rank :: layout.data]), length))
    return microbatches


@dataclass(frozen=True)
class Inputs:
    """One microbatch as one context rank sees it."""

    tokens: Index
    """[b, s / context]"""
    positions: Index
    """[b, s / context]"""
    at: Index
    """[S] where a predicted token's hidden state stands in the flattened [s / context, b] output."""
    label: Index
    """[S] the predicted token."""
    row: Index
    """[S] its row, 0 .. b-1."""
    token: Index
    """[S] its number among all response tokens of the batch (`response_offsets`)."""
    behavior_logp: Floats
    """[S] nats; nan where the sequence has none."""


def cut(
    sequences: Sequence[TrainSequence], microbatch: Microbatch, *, context: int, context_rank: int
) -> Inputs:
    """The microbatch's arrays for one context rank (zig-zag: it holds chunks r and 2 * context - 1 - r)."""
    columns = zigzag(microbatch.length, context, context_rank)
    offsets = response_offsets(sequences)
    tokens = np.zeros((len(microbatch.rows), microbatch.length), np.int64)
    parts: list[tuple[Index, ...]] = []
    behavior = [np.zeros(0, np.float32)]
    for row, index in enumerate(microbatch.rows):
        if index == DUMMY:
            continue
        sequence = sequences[index]
        tokens[row, : len(sequence.token_ids) - 1] = sequence.token_ids[:-1]
        column = np.flatnonzero(
            (columns >= sequence.num_prompt_tokens - 1) & (columns < len(sequence.token_ids) - 1)
        )
        response = columns[column] + 1 - sequence.num_prompt_tokens  # 0 .. T-1
        parts.append((
            column * len(microbatch.rows) + row,
            sequence.token_ids[columns[column] + 1].astype(np.int64),
            np.full(len(column), row, np.int64),
            offsets[index] + response,
        ))  # fmt: skip
        known = sequence.behavior_logp
        behavior.append(np.full(len(column), np.nan, np.float32) if known is None else known[response])
    at, label, row_S, token = (
        (np.concatenate(part) for part in zip(*parts, strict=True)) if parts else _nothing(4)
    )
    return Inputs(
        tokens[:, columns], np.broadcast_to(columns, (len(microbatch.rows), len(columns))).copy(),
        at, label, row_S, token, np.concatenate(behavior),
    )  # fmt: skip


def zigzag(length: int, context: int, context_rank: int) -> Index:
    """The columns of a padded row that a context rank holds, in the order in which it holds them."""
    chunks = np.arange(length).reshape(2 * context, -1) if context > 1 else np.arange(length)[None]
    mine = (context_rank, 2 * context - 1 - context_rank) if context > 1 else (0,)
    return np.concatenate([chunks[i] for i in mine])


def response_offsets(sequences: Sequence[TrainSequence]) -> Index:
    """[B + 1]: response tokens of the batch are numbered sequence after sequence; where each one's begin."""
    return np.concatenate([[0], np.cumsum([s.num_response_tokens for s in sequences])]).astype(np.int64)


def input_offsets(sequences: Sequence[TrainSequence]) -> Index:
    """[B + 1]: the same for the N - 1 inputs of each sequence."""
    return np.concatenate([[0], np.cumsum([len(s.token_ids) - 1 for s in sequences])]).astype(np.int64)


def input_numbers(sequences: Sequence[TrainSequence], microbatch: Microbatch, columns: Index) -> Index:
    """[len(columns) * b]: for router rows in [s, b] order, the number of the input; -1 for padding."""
    offsets = input_offsets(sequences)
    numbers = np.full((len(columns), len(microbatch.rows)), -1, np.int64)
    for row, index in enumerate(microbatch.rows):
        if index != DUMMY:
            real = columns < len(sequences[index].token_ids) - 1
            numbers[real, row] = offsets[index] + columns[real]
    return numbers.reshape(-1)


def _nothing(num: int) -> list[Index]:
    return [np.zeros(0, np.int64)] * num
