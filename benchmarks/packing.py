"""What packing saves: padding, imbalance and planning time of this project's plan and of the naive ones.

    python benchmarks/packing.py [--seed 0] [--sequences 2048] [--data 8 32] [--budget 16384 32768]

Lengths are drawn as RL of a reasoning model has them: responses log-normal, median 2,000 tokens, sigma 1, cut at
16,000 (about 2 % are); prompts of 100 to 300 tokens.  All plans are made from one draw, for one Qwen3-30B-A3B
(cost of a segment of L inputs: L * (15,471 + L)), tensor = context = 1.  Columns:

    M         microbatches of each data rank
    waste     inputs that are padding, of all
    ranks     cost of the most expensive data rank / mean over ranks: what data parallelism waits for at the step's end
    turns     sum over turns m of the most expensive m-th microbatch / mean: ranks that exchange experts' tokens wait
              for each other at every turn
    vs ideal  that same sum / what the real inputs would cost without padding, split evenly: the whole price
    plan s    seconds to plan
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from megatron_vespo.config import LayoutConfig
from megatron_vespo.trainer.packing import CROSSOVER, Index, Microbatch, boundaries, plan
from megatron_vespo.types import TrainSequence

Segments = list[list[Index]]
"""[data rank][microbatch]: lengths of the segments, or of the padded rows, of one forward pass."""

DUMMY = np.ones(1, np.int64)
"""What a rank runs where the plan has nothing for it."""


def draw_lengths(rng: np.random.Generator, num: int) -> Index:
    """[num] inputs of each sequence."""
    response = np.clip(np.exp(rng.normal(math.log(2000), 1.0, num)), 1, 16000).astype(np.int64)
    return rng.integers(100, 301, num) + response - 1


def cost(segments: Index) -> int:
    return int((segments * (CROSSOVER + segments)).sum())


def padding_waste(ranks: Segments, num_real: int) -> float:
    """Share of the inputs that are padding."""
    return 1 - num_real / sum(int(mb.sum()) for rank in ranks for mb in rank)


def cost_ratios(ranks: Segments) -> tuple[float, float]:
    """Most expensive rank / mean rank, and sum of the turns' most expensive microbatches / mean rank."""
    costs = np.array([[cost(mb) for mb in rank] for rank in ranks], np.float64)
    mean = costs.sum(1).mean()
    return costs.sum(1).max() / mean, costs.max(0).sum() / mean


def price(ranks: Segments, lengths: Index) -> float:
    """Cost of all turns, each as long as its most expensive microbatch / cost of the real inputs, split evenly."""
    spent = sum(max(cost(mb) for mb in turn) for turn in zip(*ranks, strict=True))
    return spent * len(ranks) / cost(lengths)


def segments_of(
    ranks: list[list[Microbatch]], sequences: Sequence[TrainSequence], layout: LayoutConfig
) -> Segments:
    return [[np.diff(boundaries(sequences, mb, layout)) for mb in rank] for rank in ranks]


def sorted_rows(lengths: Index, num_ranks: int, budget: int) -> Segments:
    """Rows padded to the longest of their microbatch; sorted by length, cut greedily, dealt over the ranks."""
    order, ranks = np.sort(lengths)[::-1], [[] for _ in range(num_ranks)]
    while len(order):
        rows = min(budget // int(order[0]), math.ceil(len(order) / num_ranks))
        for rank in ranks:
            rank.append(np.full(rows, order[0]))
        order = order[rows * num_ranks :]
    return ranks


def rows_in_order(lengths: Index, num_ranks: int, budget: int) -> Segments:
    """Rows padded to the longest of their microbatch; each rank cuts its share of the batch as it comes."""
    ranks = []
    for rank in range(num_ranks):
        cuts: list[list[int]] = [[]]
        for length in lengths[rank::num_ranks].tolist():
            if max([*cuts[-1], length]) * (len(cuts[-1]) + 1) > budget:
                cuts.append([])
            cuts[-1].append(length)
        ranks.append([np.full(len(rows), max(rows)) for rows in cuts])
    return _filled(ranks)


def packed_in_order(lengths: Index, num_ranks: int, budget: int) -> Segments:
    """Packed as they come, a new microbatch where the next sequence does not fit; dealt round robin."""
    bins: list[list[int]] = [[]]
    for length in lengths.tolist():
        if sum(bins[-1]) + length > budget:
            bins.append([])
        bins[-1].append(length)
    return _filled([[np.array(bin_) for bin_ in bins[rank::num_ranks]] for rank in range(num_ranks)])


def _filled(ranks: Segments) -> Segments:
    most = max(len(rank) for rank in ranks)
    return [rank + [DUMMY] * (most - len(rank)) for rank in ranks]


def ours(lengths: Index, num_ranks: int, budget: int, *, uniform: bool) -> tuple[Segments, float]:
    # Planning reads lengths alone, so all tokens may be one.
    batch = [
        TrainSequence(uid=str(i), token_ids=np.broadcast_to(np.int32(0), n + 1), num_prompt_tokens=1)
        for i, n in enumerate(lengths.tolist())
    ]
    layout = LayoutConfig(data=num_ranks)
    began = time.perf_counter()
    ranks = plan(batch, layout, max_tokens=budget, uniform=uniform)
    took_s = time.perf_counter() - began
    return segments_of(ranks, batch, layout), took_s


NAIVE: dict[str, Callable[[Index, int, int], Segments]] = {
    "padded rows, in order": rows_in_order,
    "padded rows, sorted": sorted_rows,
    "packed in order, round robin": packed_in_order,
}


def line(name: str, ranks: Segments, lengths: Index, took_s: float) -> str:
    worst_rank, turns = cost_ratios(ranks)
    return (
        f"  {name:30s} {len(ranks[0]):4d} {padding_waste(ranks, int(lengths.sum())):8.2%} {worst_rank:7.4f} {turns:7.4f} "
        f"{price(ranks, lengths):9.3f} {took_s:7.2f}\n"
    )


def table(lengths: Index, num_ranks: int, budget: int) -> str:
    text = f"data = {num_ranks}, budget = {budget}\n"
    text += (
        f"  {'':30s} {'M':>4s} {'waste':>8s} {'ranks':>7s} {'turns':>7s} {'vs ideal':>9s} {'plan s':>7s}\n"
    )
    for name, make in NAIVE.items():
        began = time.perf_counter()
        ranks = make(lengths, num_ranks, budget)
        text += line(name, ranks, lengths, time.perf_counter() - began)
    for uniform in (False, True):
        ranks, took_s = ours(lengths, num_ranks, budget, uniform=uniform)
        text += line(f"plan(uniform={uniform})", ranks, lengths, took_s)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sequences", type=int, default=2048)
    parser.add_argument("--data", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--budget", type=int, nargs="+", default=[16384, 32768])
    args = parser.parse_args()
    lengths = draw_lengths(np.random.default_rng(args.seed), args.sequences)
    sys.stdout.write(
        f"{len(lengths)} sequences, {lengths.sum()} inputs: median {np.median(lengths):.0f}, mean {lengths.mean():.0f}, "
        f"longest {lengths.max()} (seed {args.seed})\n"
    )
    for num_ranks in args.data:
        for budget in args.budget:
            sys.stdout.write("\n" + table(lengths, num_ranks, budget))


if __name__ == "__main__":
    main()
