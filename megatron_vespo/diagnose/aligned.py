"""Evidence whose tokens, rows and versions are joined: which engine said what about which token under which weights.

Shape key as in evidence.py:  B sequences, S response tokens, R rows, L layers, K experts per token; W words of 64 experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from megatron_vespo.algo.routers import Bits, RouterGap, bitsets, common, load_counts
from megatron_vespo.evidence import Evidence
from megatron_vespo.types import Doubles, Experts, Floats, Ints, Mask


class Pair(NamedTuple):
    """Two log-probs [S] and the tokens of which both were recorded; d = first - second."""

    first: Floats
    second: Floats
    chosen: Mask


class Choices(NamedTuple):
    """Two columns of experts and the rows [R] whose weights fit."""

    first: str
    second: str
    rows: Mask


@dataclass(frozen=True)
class Aligned:
    """One Evidence with its joins, each made when it is first asked for."""

    evidence: Evidence

    @cached_property
    def sequence_S(self) -> Ints:
        return self.evidence.sequence_of_token

    @cached_property
    def position_S(self) -> Ints:
        """Place of each token in its response."""
        return within(self.evidence.num_response)

    @cached_property
    def is_stale_S(self) -> Mask:
        """Tokens known to be sampled by older weights than the trainer's."""
        gap = self.evidence.version_gap
        return np.zeros(len(self.sequence_S), np.bool_) if gap is None else gap > 0

    @cached_property
    def token_S(self) -> Ints:
        """Place of each response token in `evidence.tokens`."""
        num_prompt, num_response = self.evidence.num_prompt, self.evidence.num_response
        start_B = np.cumsum(num_prompt + num_response) - num_response
        return (start_B[self.sequence_S] + self.position_S).astype(np.int32)

    def pair(self, name: str) -> Pair | None:
        """One of the pairs that examination.py defines; None where nothing of it was recorded."""
        e = self.evidence
        behavior = e.behavior_logp
        every = np.ones(len(behavior), np.bool_)
        found = {
            "mismatch": (e.policy_logp, *self._same_weights_engine),
            "total": (e.policy_logp, behavior, every),
            "natural": (e.natural_logp, *self._same_weights_engine),
            "replayed": (e.replayed_logp, behavior, ~self.is_stale_S),
            "floor": (e.natural_logp, e.repeat_logp, every),
            "stale": (e.engine_logp, behavior, self.is_stale_S),
            "decode": (e.engine_logp, behavior, ~self.is_stale_S),
            "routing": (e.natural_logp, e.replayed_logp, every),
        }
        first, second, chosen = found[name]
        if first is None or second is None:
            return None
        chosen = chosen & e.is_sampled & self.is_recorded(first) & self.is_recorded(second)
        return Pair(first, second, chosen) if chosen.any() else None

    def is_recorded(self, column_S: Floats) -> Mask:
        """[S] tokens of sequences that have the column: those that lack it are nan throughout."""
        known = np.bincount(self.sequence_S, ~np.isnan(column_S), len(self.evidence.num_response)) > 0
        return known[self.sequence_S]

    @cached_property
    def _same_weights_engine(self) -> tuple[Floats, Mask]:
        """[S] M' where it was recorded, else M; and the tokens of which that is under the trainer's weights."""
        e = self.evidence
        if e.engine_logp is None:
            return e.behavior_logp, ~self.is_stale_S
        known = self.is_recorded(e.engine_logp)
        return np.where(known, e.engine_logp, e.behavior_logp), known | ~self.is_stale_S

    @cached_property
    def experts(self) -> dict[str, Experts]:
        """The columns that have as many rows as the tokens ask for, and the same layers and experts per token."""
        columns = {name: x for name, x in self.evidence.experts.items() if len(x) == len(self.sequence_R)}
        shapes = [x.shape for x in columns.values()]
        return {name: x for name, x in columns.items() if x.shape == shapes[0] and x.size}

    @cached_property
    def num_experts(self) -> int:
        """E: as stated, or at least as many as were seen."""
        seen = [int(x.max()) + 1 for x in self.experts.values()]
        return self.evidence.facts.num_experts or max(seen, default=0)

    @cached_property
    def _routed(self) -> Ints:
        """The sequences whose experts are known."""
        return np.flatnonzero(self.evidence.is_routed).astype(np.int32)

    @cached_property
    def _num_rows(self) -> Ints:
        """Of each of them: every token is processed but the last."""
        e = self.evidence
        return np.maximum((e.num_prompt + e.num_response)[self._routed] - 1, 0)

    @cached_property
    def sequence_R(self) -> Ints:
        return np.repeat(self._routed, self._num_rows)

    @cached_property
    def position_R(self) -> Ints:
        """Place in its sequence of the token that each row processed."""
        return within(self._num_rows)

    @cached_property
    def is_prompt_R(self) -> Mask:
        """Rows that processed a token of the prompt."""
        return self.position_R < self.evidence.num_prompt[self.sequence_R]

    @cached_property
    def prompt_end_R(self) -> Ints:
        """Place of each row relative to that of its prompt's last token."""
        return self.position_R - (self.evidence.num_prompt[self.sequence_R] - 1)

    @cached_property
    def row_S(self) -> Ints:
        """[S] the row on which each token's log-prob hangs; -1 where there is none."""
        start_B = np.full(len(self.evidence.num_response), -1, np.int32)
        start_B[self._routed] = np.cumsum(self._num_rows) - self._num_rows
        place = self.evidence.num_prompt[self.sequence_S] - 1 + self.position_S
        start = start_B[self.sequence_S]
        return np.where((start >= 0) & (place >= 0), start + place, -1).astype(np.int32)

    @cached_property
    def is_stale_R(self) -> Mask:
        """Rows that older weights than the trainer's processed: a prompt's by those of its first response token."""
        num_response = self.evidence.num_response
        first_B = np.cumsum(num_response) - num_response
        token = np.clip(self.prompt_end_R, 0, num_response[self.sequence_R] - 1)
        return self.is_stale_S[first_B[self.sequence_R] + token]

    @cached_property
    def router_pair(self) -> Choices | None:
        """The trainer's choice and the engine's under the same weights."""
        every = np.ones(len(self.sequence_R), np.bool_)
        for first, second, rows in (
            ("natural", "engine", every),
            ("natural", "behavior", ~self.is_stale_R),
            ("shadow", "behavior", ~self.is_stale_R),
        ):
            if {first, second} <= set(self.experts) and rows.any():
                return Choices(first, second, rows)
        return None

    @cached_property
    def router_gap(self) -> RouterGap | None:
        """Of the router pair."""
        return None if self.router_pair is None else self.gap(self.router_pair)

    def gap(self, choices: Choices) -> RouterGap:
        """How two columns differ in the rows whose weights fit."""
        first, second = (self.experts[name][choices.rows] for name in (choices.first, choices.second))
        return RouterGap.of(first, second, self.num_experts)

    def bits(self, column: str) -> Bits:
        """[R, L, W] the sets of one column."""
        if column not in self._bits:
            self._bits[column] = bitsets(self.experts[column], self.num_experts)
        return self._bits[column]

    @cached_property
    def _bits(self) -> dict[str, Bits]:
        return {}

    def overlap(self, first: str, second: str) -> Doubles:
        """[R, L] of all rows, whether or not their weights fit."""
        return common(self.bits(first), self.bits(second)) / self.experts[first].shape[-1]

    def flips(self, first: str, second: str) -> Mask:
        """[R, L] of all rows."""
        return self.overlap(first, second) < 1

    def chance(self, first: str, second: str) -> float:
        """Overlap that columns with these loads would have if they had nothing to do with each other."""
        loads = [
            load_counts(self.experts[name], self.num_experts) / len(self.sequence_R)
            for name in (first, second)
        ]
        return float((loads[0] * loads[1]).sum(1).mean() / self.experts[first].shape[-1])


def within(num_N: Ints) -> Ints:
    """0, 1, ... num - 1 for each, one after the other."""
    start = np.repeat(np.cumsum(num_N) - num_N, num_N)
    return (np.arange(len(start)) - start).astype(np.int32)
