"""Which sequences share a forward pass, and the arrays of that pass: a pure, deterministic plan.

Sequences are packed one after the other (THD), each padded only to what the context axis cuts evenly.  Every rank
computes the same plan from the same lengths; the plan, not its callers, knows about padding.

A sequence of N tokens is N - 1 inputs: the last token is predicted, never processed.  Under context parallelism
each segment is 2 * context equal chunks, of which rank r holds chunks r and 2 * context - 1 - r, segment after
segment: so every rank has as much of the causal attention to do, and Megatron's rotary embedding and Transformer
Engine expect it.

Shape key:  B sequences of the step, n segments of one microbatch, t packed inputs of one context rank,
            S response tokens of the microbatch that this context rank predicts, R of them to be trained on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_vespo.config import LayoutConfig
from megatron_vespo.trainer.hf_config import ModelShape
from megatron_vespo.types import Floats, RunError, TrainSequence

Index = NDArray[np.int64]
Bins = list[list[int]]
"""What each of the step's data * M microbatches holds."""

CROSSOVER = 15_471
"""`crossover_tokens` of Qwen3-30B-A3B."""

UNIFORM_SLACK = 1 / 400
"""Share by which a uniform length may exceed the shortest that works: room in which to even out the cost."""

EVEN = 1 / 1000
"""Microbatches of one turn are even where the most expensive exceeds their mean by at most this share."""

PARTNERS = 8
"""Microbatches with which the most expensive one of a turn tries to exchange sequences."""

EXCHANGES = 8
"""Per microbatch, after which evening out ends in any case: it bounds the time, and is rarely reached."""


@dataclass(frozen=True)
class Microbatch:
    """What one context group's forward pass holds."""

    sequences: tuple[int, ...]
    """Indices into the batch, longest first; empty: a dummy, which contributes zero to numerator and denominator."""
    length: int
    """Packed inputs of all context ranks together, tail padding included."""


def crossover_tokens(shape: ModelShape) -> int:
    """The length A at which a sequence's attention costs as much as all else: cost(L) ~ L * (A + L).

    Matrix products of a forward pass over L tokens, in FLOPs; the backward pass doubles every term:
        weights     2 * L per weight that a token meets (projections, router, its experts or its MLP, LM head)
        attention   2 * 2 * heads * head_dim * L^2 / 2 per layer (scores and values; half of the square is causal)
    so A = weights / (num_layers * heads * head_dim).
    """
    width = shape.num_heads * shape.head_dim
    projections = shape.hidden_size * (2 * width + 2 * shape.num_groups * shape.head_dim)
    if shape.num_experts:
        experts = 3 * shape.experts_per_token * shape.expert_ffn_size
        feed_forward = shape.hidden_size * (experts + shape.num_experts)
    else:
        feed_forward = 3 * shape.hidden_size * shape.ffn_size
    weights = shape.num_layers * (projections + feed_forward) + shape.vocab_size * shape.hidden_size
    return round(weights / (shape.num_layers * width))


def alignment(layout: LayoutConfig) -> int:
    """Inputs of one sequence are padded to a multiple of this."""
    return 2 * layout.context if layout.context > 1 else 1


def padded_length(num_tokens: int, layout: LayoutConfig) -> int:
    """Length of a microbatch that holds one sequence of `num_tokens` tokens and nothing else."""
    return _up(num_tokens - 1, _granule(layout))


def _granule(layout: LayoutConfig) -> int:
    """What divides a microbatch's length: its segments' chunks, and the tensor ranks' slices of each context rank."""
    return math.lcm(alignment(layout), layout.tensor * layout.context)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


# ------------------------------------------------------------------------------------------------- planning


@dataclass(frozen=True)
class _Work:
    """What the sequences of the step ask for, and what a microbatch gives; integers, so no order of sums matters."""

    length: Index
    """[B] padded inputs."""
    budget: int
    """Inputs of one microbatch, a multiple of the granule."""
    uniform: bool
    """Whether every microbatch is padded to the budget."""
    crossover: int
    num_ranks: int
    num_bins: int
    """num_ranks * M"""

    @functools.cached_property
    def cost(self) -> Index:
        """[B] what a sequence adds to its microbatch.

        All but attention costs a uniform microbatch the same, whatever it holds.
        """
        return self.length * (self.length + (0 if self.uniform else self.crossover))

    def tokens(self, bin_: list[int]) -> int:
        return int(self.length[bin_].sum())

    def load(self, bin_: list[int]) -> int:
        """Cost of a microbatch, the attention of its tail padding included."""
        load = int(self.cost[bin_].sum())
        if self.uniform:
            tail = self.budget - self.tokens(bin_)
            last = int(self.length[bin_].min()) if bin_ else 0  # becomes last + tail
            load += self.crossover * self.budget + tail * (tail + 2 * last)
        return load


def plan(
    sequences: Sequence[TrainSequence],
    layout: LayoutConfig,
    *,
    max_tokens: int,
    uniform: bool,
    crossover: int = CROSSOVER,
) -> list[list[Microbatch]]:
    """Microbatches of each data rank, [data][M]: as few as first fit finds, the same number M for every rank.

    Turn m of all data ranks together takes as long as its most expensive microbatch (ranks that exchange experts'
    tokens work in lock step), so turns are made even, and then the ranks' sums over all turns.  The plan depends
    on lengths alone.

    Args:
        max_tokens: budget of one microbatch's length.
        uniform: all microbatches of the step get one length, as pipeline stages need; it is the shortest that works
            (within UNIFORM_SLACK), so tokens are balanced before cost.
        crossover: `crossover_tokens` of the model.

    Raises:
        RunError: a sequence alone exceeds the budget.
    """
    if not sequences:
        return [[] for _ in range(layout.data)]
    _refuse_long(sequences, layout, max_tokens)
    granule = _granule(layout)
    length = np.array([_up(len(s.token_ids) - 1, alignment(layout)) for s in sequences], np.int64)
    budget = max_tokens // granule * granule
    # Interleaved pipeline stages work on groups of as many microbatches as there are stages.
    group = layout.pipeline if layout.virtual_pipeline > 1 else 1
    num_bins = _up(len(_first_fit(length, budget)), layout.data * group)
    tightest, packed = _tightest(length, num_bins, budget, granule)
    if uniform:
        budget = min(budget, tightest + int(tightest * UNIFORM_SLACK) // granule * granule)
    work = _Work(length, budget, uniform, crossover, num_ranks=layout.data, num_bins=num_bins)
    ranks = _deal(_best_turns(packed, work), work)
    lengths = [[_up(max(work.tokens(bin_), 1), granule) for bin_ in rank] for rank in ranks]
    if uniform:
        lengths = [[max(map(max, lengths))] * len(rank) for rank in ranks]
    return [
        [Microbatch(_longest_first(bin_, length), num) for bin_, num in zip(rank, own, strict=True)]
        for rank, own in zip(ranks, lengths, strict=True)
    ]


def _refuse_long(sequences: Sequence[TrainSequence], layout: LayoutConfig, max_tokens: int) -> None:
    for s in sequences:
        if (length := padded_length(len(s.token_ids), layout)) > max_tokens:
            raise RunError(
                f"sequence {s.uid}: {length} padded tokens exceed trainer.max_tokens_per_microbatch "
                f"= {max_tokens}, and sequences are never split; raise it, or shorten the sequences"
            )


def _longest_first(indices: Iterable[int], length: Index) -> tuple[int, ...]:
    """Tail padding belongs to the last segment, and costs least behind a short one."""
    return tuple(sorted(indices, key=lambda i: (-length[i], i)))


def _first_fit(length: Index, budget: int) -> Bins:
    """First-fit decreasing: each sequence into the first microbatch that has room."""
    room = np.full(len(length), budget, np.int64)
    bins: Bins = []
    for i in _longest_first(range(len(length)), length):
        first = int((room[: len(bins) + 1] >= length[i]).argmax())
        if first == len(bins):
            bins.append([])
        bins[first].append(i)
        room[first] -= length[i]
    return bins


def _tightest(length: Index, num_bins: int, budget: int, granule: int) -> tuple[int, Bins]:
    """The smallest budget, to a thousandth, with which first-fit decreasing needs `num_bins` at most (MULTIFIT)."""
    low = _up(max(int(length.max()), math.ceil(length.sum() / num_bins)), granule)
    high, packed, tried = budget, _first_fit(length, budget), low
    while high - low > low // 1024:
        bins = _first_fit(length, tried)
        if len(bins) <= num_bins:
            high, packed = tried, bins
        else:
            low = tried + granule
        tried = (low + high) // 2 // granule * granule
    return high, packed


def _best_turns(packed: Bins, work: _Work) -> list[Bins]:
    """[M][data]: the best of three starts, each evened out by exchanges.

    Evening out is a local search.  Equal cost everywhere is the best start where the budget leaves room for it, equal
    tokens where it is tight, and first fit always exists.
    """
    starts = [_spread(work, work.cost), _spread(work, work.length), packed]
    turns = [_turns(start, work) for start in starts if start is not None]
    return min(turns, key=lambda turns: sum(max(work.load(bin_) for bin_ in turn) for turn in turns))


def _spread(work: _Work, load: Index) -> Bins | None:
    """Longest first, each into the microbatch with the least load that has room; None where one finds no room."""
    bins: Bins = [[] for _ in range(work.num_bins)]
    room, loads = np.full(work.num_bins, work.budget, np.int64), np.zeros(work.num_bins, np.int64)
    for i in _longest_first(range(len(work.length)), work.length):
        least = int(np.where(room >= work.length[i], loads, np.iinfo(np.int64).max).argmin())
        if room[least] < work.length[i]:
            return None
        bins[least].append(i)
        room[least] -= work.length[i]
        loads[least] += load[i]
    return bins


def _turns(bins: Bins, work: _Work) -> list[Bins]:
    """Microbatches of similar cost share a turn, most expensive first, and are made more similar."""
    bins = sorted(bins + [[] for _ in range(work.num_bins - len(bins))], key=work.load, reverse=True)
    turns = [bins[i : i + work.num_ranks] for i in range(0, work.num_bins, work.num_ranks)]
    return [_evened(turn, work) for turn in turns]


def _evened(turn: Bins, work: _Work) -> Bins:
    """Exchange sequences of the most expensive microbatch for cheaper ones of others, until it is even or none helps.

    Each exchange lowers the larger cost of the two, so it ends.
    """
    offers = [_Offers(bin_, work) for bin_ in turn]
    mean = sum(offer.cost for offer in offers) / len(turn)
    enough = mean + EVEN * sum(work.load(bin_) for bin_ in turn) / len(turn)
    for _ in range(EXCHANGES * len(turn)):
        by_cost = sorted(range(len(turn)), key=lambda j: offers[j].cost)
        top = by_cost[-1]
        if offers[top].cost <= enough:
            break
        for other in by_cost[:PARTNERS]:  # the cheapest first: it takes the most
            if exchanged := _exchange(offers[top], offers[other], work.budget):
                offers[top], offers[other] = (_Offers(bin_, work) for bin_ in exchanged)
                break
        else:
            break
    return [offer.bin_ for offer in offers]


class _Offers:
    """Sets of sequences that one microbatch may give away in an exchange: none, one or two."""

    def __init__(self, bin_: list[int], work: _Work) -> None:
        self.bin_ = bin_
        self.cost, self.tokens = int(work.cost[bin_].sum()), work.tokens(bin_)
        self._first, self._second = _pairs(len(bin_))
        # The place behind the last sequence is "none".
        cost, length = np.append(work.cost[bin_], 0), np.append(work.length[bin_], 0)
        self.costs = cost[self._first] + cost[self._second]
        self.lengths = length[self._first] + length[self._second]

    def __getitem__(self, number: int) -> list[int]:
        places = int(self._first[number]), int(self._second[number])
        return [self.bin_[place] for place in places if place < len(self.bin_)]


@functools.cache
def _pairs(num: int) -> tuple[Index, Index]:
    """Places 0 .. num - 1 of one or two sequences, `num` for none; a microbatch of many has enough in single ones."""
    if num <= 16:
        first, second = np.triu_indices(num + 1, 1)
        return np.append(first, num), np.append(second, num)
    single = np.unique(np.linspace(0, num, min(num + 1, 128)).astype(np.int64))
    return single, np.full(len(single), num, np.int64)


def _exchange(high: _Offers, low: _Offers, budget: int) -> tuple[list[int], list[int]] | None:
    """Both microbatches after the exchange that most lowers the larger cost; None where none lowers it."""
    tokens = high.lengths[:, None] - low.lengths
    cost = high.costs[:, None] - low.costs
    larger = np.maximum(high.cost - cost, low.cost + cost)
    larger[(high.tokens - tokens > budget) | (low.tokens + tokens > budget)] = high.cost
    give, take = divmod(int(larger.argmin()), len(low.lengths))
    if larger[give, take] >= high.cost:
        return None
    given, taken = high[give], low[take]
    return (
        [i for i in high.bin_ if i not in given] + taken,
        [i for i in low.bin_ if i not in taken] + given,
    )


def _deal(turns: list[Bins], work: _Work) -> list[Bins]:
    """[data][M]: each turn's microbatches over the ranks, the most expensive to the rank with the least so far."""
    spent = [0] * work.num_ranks
    ranks: list[Bins] = [[[] for _ in turns] for _ in range(work.num_ranks)]
    loads = [[work.load(bin_) for bin_ in turn] for turn in turns]
    # Uneven turns first: later ones make up for what they leave.
    for m in sorted(range(len(turns)), key=lambda m: min(loads[m]) - max(loads[m])):
        by_load = sorted(range(work.num_ranks), key=lambda j: -loads[m][j])
        by_need = sorted(range(work.num_ranks), key=lambda rank: spent[rank])
        for rank, j in zip(by_need, by_load, strict=True):
            ranks[rank][m] = turns[m][j]
            spent[rank] += loads[m][j]
    return ranks


# --------------------------------------------------------------------------------------------------- arrays


@dataclass(frozen=True)
class Inputs:
    """One microbatch as one context rank sees it."""

    tokens: Index
    """[1, t]"""
    positions: Index
    """[1, t] within the segment."""
    cu_seqlens: NDArray[np.int32]
    """[n + 1] `boundaries`: of all context ranks together, as Megatron and Transformer Engine want them."""
    max_seqlen: int
    """The longest segment, of all context ranks together."""
    at: Index
    """[S] where a predicted token's hidden state stands, 0 .. t-1."""
    label: Index
    """[S] the predicted token."""
    segment: Index
    """[S] its sequence's place in `Microbatch.sequences`."""
    token: Index
    """[S] its number among all response tokens of the batch (`response_offsets`)."""
    trained: Index
    """[R] which of them carry loss, 0 .. S-1; the environment wrote the others."""
    behavior_logp: Floats
    """[R] nats; nan where the sequence has none."""


def boundaries(sequences: Sequence[TrainSequence], microbatch: Microbatch, layout: LayoutConfig) -> Index:
    """[n + 1]: where each segment begins among the packed inputs of all context ranks, and where the last one ends.

    Tail padding belongs to the last segment; a dummy is one segment of padding.
    """
    lengths = [_up(len(sequences[i].token_ids) - 1, alignment(layout)) for i in microbatch.sequences]
    return np.array([0, *np.cumsum(lengths[:-1]), microbatch.length], np.int64)


def cut(
    sequences: Sequence[TrainSequence], microbatch: Microbatch, layout: LayoutConfig, *, context_rank: int
) -> Inputs:
    """The microbatch's arrays for one context rank; padding is token 0."""
    bounds = boundaries(sequences, microbatch, layout)
    offsets = response_offsets(sequences)
    tokens, label = np.zeros((2, microbatch.length), np.int64)
    token = np.full(microbatch.length, -1, np.int64)
    sampled = np.zeros(microbatch.length, np.bool_)
    behavior = np.full(microbatch.length, np.nan, np.float32)
    for start, index in zip(bounds[:-1], microbatch.sequences, strict=False):  # a dummy has no sequence
        s = sequences[index]
        end = start + len(s.token_ids) - 1
        predicting = slice(start + s.num_prompt_tokens - 1, end)
        tokens[start:end] = s.token_ids[:-1]
        label[predicting] = s.token_ids[s.num_prompt_tokens :]
        token[predicting] = np.arange(offsets[index], offsets[index + 1])
        sampled[predicting] = True if s.sampled is None else s.sampled
        if s.behavior_logp is not None:
            behavior[predicting] = s.behavior_logp
    held = _held(bounds, layout.context, context_rank)
    segment = np.searchsorted(bounds, held, side="right") - 1
    at = np.flatnonzero(token[held] >= 0)
    predicted = held[at]
    trained = np.flatnonzero(sampled[predicted])
    return Inputs(
        tokens=tokens[held][None],
        positions=(held - bounds[segment])[None],
        cu_seqlens=bounds.astype(np.int32),
        max_seqlen=int(np.diff(bounds).max()),
        at=at,
        label=label[predicted],
        segment=segment[at],
        token=token[predicted],
        trained=trained,
        behavior_logp=behavior[predicted[trained]],
    )


def _held(bounds: Index, context: int, context_rank: int) -> Index:
    """[t] which of the packed inputs a context rank holds, in the order in which it holds them."""
    if context == 1:
        return np.arange(bounds[-1])
    chunk = np.diff(bounds) // (2 * context)
    return np.concatenate([
        np.arange(start + number * size, start + (number + 1) * size)
        for start, size in zip(bounds[:-1], chunk, strict=True)
        for number in (context_rank, 2 * context - 1 - context_rank)
    ])  # fmt: skip


def input_numbers(
    sequences: Sequence[TrainSequence], microbatch: Microbatch, layout: LayoutConfig, *, context_rank: int
) -> Index:
    """[t]: which input of the batch (`input_offsets`) each of a context rank's packed inputs is; -1 for padding."""
    bounds = boundaries(sequences, microbatch, layout)
    offsets = input_offsets(sequences)
    numbers = np.full(microbatch.length, -1, np.int64)
    for start, index in zip(bounds[:-1], microbatch.sequences, strict=False):
        numbers[start : start + len(sequences[index].token_ids) - 1] = np.arange(
            offsets[index], offsets[index + 1]
        )
    return numbers[_held(bounds, layout.context, context_rank)]


def response_offsets(sequences: Sequence[TrainSequence]) -> Index:
    """[B + 1]: response tokens of the batch are numbered sequence after sequence; where each one's begin."""
    return np.concatenate([[0], np.cumsum([s.num_response_tokens for s in sequences])]).astype(np.int64)


def input_offsets(sequences: Sequence[TrainSequence]) -> Index:
    """[B + 1]: the same for the N - 1 inputs of each sequence."""
    return np.concatenate([[0], np.cumsum([len(s.token_ids) - 1 for s in sequences])]).astype(np.int64)
