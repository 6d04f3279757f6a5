"""What noise cannot do to a record: tests that tell a bug of plumbing from a difference of engines.

They need nothing but the recorded experts and log-probs.  A test of place (which token, layer, expert or sequence a row belongs
to) compares the overlap where things should be with the overlap elsewhere, and fails only where elsewhere is better by more than
chance makes it.

Shape key:  R rows (processed tokens), L layers, K experts per token, E experts, W words of 64 experts, B sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from megatron_vespo.algo.routers import Bits, bitsets, common
from megatron_vespo.types import Doubles, Experts, Floats, Ints, Mask

SHIFTS = (-2, -1, 0, 1, 2)
_CLEAR = 0.05
"""By how much another place must be better than the right one, in overlap or correlation."""
_RUN = 8
"""Rows in a row that make a span: fewer may be alike, or unlike, by chance."""
_COMPARED = 256
"""Response rows that tell a sequence from another."""
_SAMPLED_ROWS = 4096
"""Rows, evenly taken, that suffice for maps."""


def soundness(experts_RLK: Experts, num_experts: int) -> dict[str, float]:
    """Whether the ids can be sets of experts at all.

    out_of_range_fraction  ids below -1, or E and above        sentinel_fraction   ids of -1: marked as missing
    duplicate_fraction     (row, layer) that hold an expert twice, zero rows and sentinels left out
    zero_row_fraction      rows whose ids are 0 in every layer: never written (K L > 1)
    zero_layers            layers in which every row is 0 (K > 1): another pipeline stage's, or a dense layer's
    sorted_fraction        (row, layer) whose ids ascend: near 1 the engine's order is lost, which only bitwise sums need
    """
    if not experts_RLK.size:
        return {}
    zero_RL = (experts_RLK == 0).all(-1)
    sentinel = experts_RLK == -1
    held_RL = np.bitwise_count(bitsets(experts_RLK, num_experts)).sum(-1)
    in_range = (experts_RLK >= 0) & (experts_RLK < num_experts)
    several = experts_RLK.shape[-1] > 1
    return {
        "out_of_range_fraction": float((~in_range & ~sentinel).mean()),
        "sentinel_fraction": float(sentinel.mean()),
        "duplicate_fraction": float(((held_RL < in_range.sum(-1)) & ~zero_RL).mean()),
        "zero_row_fraction": float(zero_RL.all(-1).mean()) if several or experts_RLK.shape[1] > 1 else 0.0,
        "zero_layers": float(zero_RL.all(0).sum()) if several else 0.0,
        "sorted_fraction": float((experts_RLK[..., 1:] >= experts_RLK[..., :-1]).all(-1).mean()),
    }


def constant_fraction(experts_RLK: Experts, sequence_R: Ints, other_RLK: Experts | None = None) -> float:
    """Share of rows in runs of at least 8 that repeat the row before in every layer: a buffer that nobody wrote.

    Args:
        other_RLK: another engine's record of the same rows; what stands still there too is no failure.
    """
    still = _repeats(experts_RLK, sequence_R)
    if other_RLK is not None:
        still &= ~_repeats(other_RLK, sequence_R)
    lengths, runs = _run_lengths(still)
    return float((still & (lengths[runs] >= _RUN - 1)).mean()) if len(still) else 0.0


def shift_overlap(bits_RLW: Bits, reference_RLW: Bits, sequence_R: Ints, top_k: int) -> Doubles:
    """[5] mean overlap of row r with the reference's row r + s of the same sequence, s = -2 .. 2; nan where there is none."""
    found = np.full(len(SHIFTS), np.nan)
    for place, shift in enumerate(SHIFTS):
        here, there = _pairs(sequence_R, shift)
        if len(here):
            found[place] = common(bits_RLW[here], reference_RLW[there]).mean() / top_k
    return found


def shift_correlation(logp_S: Floats, reference_S: Floats, sequence_S: Ints, is_sampled_S: Mask) -> Doubles:
    """[5] correlation of the log-prob of token t with the reference's of token t + s, s = -2 .. 2; nan where undefined."""
    found = np.full(len(SHIFTS), np.nan)
    usable = is_sampled_S & np.isfinite(logp_S) & np.isfinite(reference_S)
    for place, shift in enumerate(SHIFTS):
        here, there = _pairs(sequence_S, shift)
        both = usable[here] & usable[there]
        x, y = logp_S[here[both]].astype(np.float64), reference_S[there[both]].astype(np.float64)
        if len(x) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0:
            found[place] = np.corrcoef(x, y)[0, 1]
    return found


def best_shift(agreement_5: Doubles, num: int) -> int | None:
    """The shift at which two records agree best; 0 unless another one is clearly better.

    Args:
        num: observations behind each number; a correlation of n tokens may be off by some 1 / sqrt(n).

    Returns:
        None where there is nothing to compare.
    """
    if np.isnan(agreement_5).all() or np.isnan(agreement_5[SHIFTS.index(0)]):
        return None
    best = int(np.nanargmax(agreement_5))
    clear = max(_CLEAR, 4 / np.sqrt(max(num, 1)))
    return SHIFTS[best] if agreement_5[best] > agreement_5[SHIFTS.index(0)] + clear else 0


def layer_map(bits_RLW: Bits, reference_RLW: Bits, top_k: int) -> Doubles:
    """[L, L] mean overlap of layer a with the reference's layer b, over at most 4,096 rows: should be diagonal."""
    rows = _evenly(len(bits_RLW))
    bits, reference = bits_RLW[rows], reference_RLW[rows]
    return np.stack([
        common(bits[:, layer : layer + 1], reference).mean(0) / top_k for layer in range(bits.shape[1])
    ])  # fmt: skip


def misplaced_layers(map_LL: Doubles) -> tuple[float, int]:
    """Share of layers that agree clearly better with another layer of the reference, and their most frequent offset, b - a."""
    best = map_LL.argmax(1)
    own = np.arange(len(best))
    moved = np.flatnonzero(map_LL[own, best] > map_LL[own, own] + _CLEAR)
    if not len(moved):
        return 0.0, 0
    offsets, counts = np.unique(best[moved] - moved, return_counts=True)
    return len(moved) / len(best), int(offsets[counts.argmax()])


class Renamed(NamedTuple):
    """An expert that the reference knows by another id."""

    layer: int
    expert: int
    found_as: int
    overlap: float
    """Share of its rows in which the reference holds the same id,"""
    found_overlap: float
    """and in which it holds the other."""


def renamed_experts(experts_RLK: Experts, reference_RLK: Experts, num_experts: int) -> list[Renamed]:
    """Experts whose rows hold another expert of the reference far more often than themselves.

    In each layer, the assignment of ids to ids that makes the overlap greatest (Hungarian method over co-occurrences) should be the
    identity.  An expert counts as renamed where its new id holds more than half of what chance leaves open, and clearly
    more than its own.
    """
    rows = _evenly(len(experts_RLK))
    found = list[Renamed]()
    for layer in range(experts_RLK.shape[1]):
        mine = _one_hot(experts_RLK[rows, layer], num_experts)
        theirs = _one_hot(reference_RLK[rows, layer], num_experts)
        together = (mine.T @ theirs).astype(np.float64)
        load = mine.sum(0).astype(np.float64)
        for expert, other in zip(*linear_sum_assignment(-together), strict=True):
            own, new = together[expert, expert], together[expert, other]
            open_share = (1 + theirs[:, other].mean()) / 2
            if expert != other and new > own + 3 * np.sqrt(own + new) and new > open_share * load[expert]:
                found.append(Renamed(layer, int(expert), int(other), own / load[expert], new / load[expert]))
    return found


class Span(NamedTuple):
    """Rows [start, start + length) of a sequence that have nothing to do with its tokens."""

    sequence: int
    start: int
    length: int
    overlap: float


def garbage_spans(overlap_R: Doubles, sequence_R: Ints, chance: float) -> list[Span]:
    """Runs of rows whose overlap is at chance: every window of 8 rows whose mean is nearer to chance than to 1.

    Evicted and reloaded caches, reused slots, a buffer of another request.  Sequences shorter than a window are one.

    Args:
        overlap_R: mean over layers.
        chance: overlap of choices that have nothing to do with each other (RouterGap.statistics).
    """
    bound, found = (1 + chance) / 2, list[Span]()
    starts = np.flatnonzero(np.diff(sequence_R, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(sequence_R)], strict=True):
        window = min(_RUN, end - start)
        total = np.concatenate([[0.0], np.cumsum(overlap_R[start:end])])
        low = np.flatnonzero((total[window:] - total[:-window]) / window < bound)
        covered = np.zeros(end - start, np.bool_)
        for first in low:
            covered[first : first + window] = True
        edges = np.flatnonzero(np.diff(covered, prepend=False, append=False)).reshape(-1, 2)
        found += [
            Span(int(sequence_R[start]), int(a), int(b - a), float(overlap_R[start + a : start + b].mean()))
            for a, b in edges
        ]
    return found


class Mispaired(NamedTuple):
    """A sequence whose experts are those of another one."""

    sequence: int
    found_in: int
    overlap: float
    found_overlap: float


def mispaired(
    bits_RLW: Bits, reference_RLW: Bits, sequence_R: Ints, is_response_R: Mask, *, top_k: int, chance: float
) -> list[Mispaired]:
    """Sequences whose response rows agree clearly better with the same positions of another sequence of the reference.

    Only those are looked for whose overlap is nearer to chance than to 1; prompts do not count, since groups share them.
    """
    starts = np.flatnonzero(np.diff(sequence_R, prepend=-1))
    ends = np.append(starts[1:], len(sequence_R))
    found = list[Mispaired]()
    for start, end in zip(starts, ends, strict=True):
        places = np.flatnonzero(is_response_R[start:end])[:_COMPARED]

        def overlap_with(
            begin: int, stop: int, start: int = start, places: NDArray[np.intp] = places
        ) -> float:
            inside = places[places < stop - begin]
            if not len(inside) or 2 * len(inside) < len(places):
                return -1.0
            return float(common(bits_RLW[start + inside], reference_RLW[begin + inside]).mean() / top_k)

        own = overlap_with(start, end)
        if not len(places) or own > (1 + chance) / 2:
            continue
        overlaps = [overlap_with(*extent) for extent in zip(starts, ends, strict=True)]
        best = int(np.argmax(overlaps))
        if overlaps[best] > own + 2 * _CLEAR:
            pair = int(sequence_R[start]), int(sequence_R[starts[best]])
            found.append(Mispaired(*pair, own, overlaps[best]))
    return found


def _pairs(sequence_N: Ints, shift: int) -> tuple[Ints, Ints]:
    """Places n and n + shift that lie in the same sequence."""
    here = np.arange(max(-shift, 0), len(sequence_N) - max(shift, 0))
    here = here[sequence_N[here] == sequence_N[here + shift]]
    return here.astype(np.int32), (here + shift).astype(np.int32)


def _repeats(experts_RLK: Experts, sequence_R: Ints) -> Mask:
    """[R] rows equal to the one before in the same sequence."""
    same = np.zeros(len(sequence_R), np.bool_)
    same[1:] = (experts_RLK[1:] == experts_RLK[:-1]).all((1, 2)) & (sequence_R[1:] == sequence_R[:-1])
    return same


def _run_lengths(flag_R: Mask) -> tuple[Ints, Ints]:
    """Lengths of the runs of equal flags, and the run of each place."""
    run = (
        np.concatenate([[0], np.cumsum(np.diff(flag_R))]).astype(np.int32)
        if len(flag_R)
        else np.zeros(0, np.int32)
    )
    return np.bincount(run).astype(np.int32), run


def _evenly(num: int) -> Ints:
    """At most _SAMPLED_ROWS places, evenly taken."""
    return np.unique(np.linspace(0, num - 1, min(num, _SAMPLED_ROWS)).astype(np.int32))


def _one_hot(experts_RK: Experts, num_experts: int) -> Floats:
    """[R, E]; ids out of range are nowhere."""
    hot = np.zeros((len(experts_RK), num_experts), np.float32)
    row, slot = np.nonzero((experts_RK >= 0) & (experts_RK < num_experts))
    hot[row, experts_RK[row, slot]] = 1
    return hot
