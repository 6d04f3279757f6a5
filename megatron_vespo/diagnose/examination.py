"""Evidence in, numbers out: every metric, table and array that verdicts, reports and comparisons are made of.

Only sampled tokens count.  What was not recorded leaves its entries out; no metric is ever nan or infinite.

Pairs of log-probs.  M = behavior_logp, M' = engine_logp, A = natural_logp, A2 = repeat_logp, B = replayed_logp,
P = policy_logp (A, or B where the trainer repeats the engine's experts):

    mismatch/   P against the engine under the same weights: M' where recorded, else M of tokens whose version gap is 0 or
                unknown.  The engine mismatch.
    total/      P against M, all tokens: what an importance weight sees.
    natural/    A against the engine under the same weights (as in mismatch/).
    replayed/   B against M, tokens whose version gap is 0 or unknown.
    floor/      A against A2: the trainer's own noise.
    stale/      M' against M, tokens whose version gap is above 0.
    decode/     M' against M, tokens whose version gap is 0 or unknown: decode against prefill in the engine.
    routing/    A against B, all tokens: what the choice of experts alone makes.

METRICS of every pair (PAIR/...; d = first minus second; formulas in algo/mismatch.py)
    num_tokens  nonfinite_fraction  exact_zero_fraction
    k1_nats (= -mean d)  k2_nats  k3_nats  k3r_nats  js_nats  chi2  chi2_rev  renyi2_nats  square_mean_nats2
    ratio_mean  ratio_se  mult_err  ess_token
    abs_mean_nats  abs_p50_nats  abs_p90_nats  abs_p99_nats  abs_p999_nats  abs_max_nats  tail_index
    prob_abs_mean  prob_abs_max  pearson
    f_1p1  f_1p5  f_2  f_3  f_5  f_10  f_100        share of tokens with |d| > log tau
    grid_fraction  grid_step_nats                   share of d != 0 on a grid of 2^-10; the coarsest grid that holds half of them

of mismatch/, total/ and stale/ also, with D = sum d of a sequence over its T tokens of the pair
    seq_num  seq_nats_mean  seq_nats_std  seq_nats_p05  seq_nats_p50  seq_nats_p95  seq_nats_min  seq_nats_max  seq_nats_abs_max
    seq_geo_mean_nats  seq_geo_abs_max_nats  ppl_ratio  log_ppl_abs_nats
    seq_slope_nats                                  of D on T through 0: -KL
    seq_growth                                      H of Var(D | T) ~ T^2H: 0.5 independent tokens, 1 one error per sequence
    seq_length_p95  seq_budget_nats                 k3 * length_p95
    ess_seq  chi2_seq  renyi2_seq_nats  seq_top_weight
    seq_outlier_fraction  seq_outlier_k2_share      sequences with mult_err > 2
    phi_pos_mean  phi_pos_p50  phi_pos_p05  phi_neg_mean  phi_neg_p50  phi_neg_p05      VESPO's kernel at W = e^D
    corr_reward  corr_advantage  corr_length        of D

of mismatch/, total/ and natural/ also
    slope  intercept_nats                           robust fit of first = intercept + slope * second

semantics/  of what the engine calls a log-prob (all sampled tokens)
    surprise_nats  surprise_se_nats                 mean(-M) - mean entropy; 0 if the entropy is that of the sampling distribution
    surprise_policy_nats  surprise_policy_se_nats   mean(-P) - mean entropy
    bf16_behavior_fraction  bf16_engine_fraction  bf16_policy_fraction  bf16_natural_fraction   values that bfloat16 holds exactly

cause/      parts of a gap add up token by token (algo/decomposition.py): of P - M
                PART in routing, engine, decode, staleness, rerun, unsplit
    PART_nats  PART_share  PART_square_share        mean; Cov(part, gap) / Var(gap); E[part gap] / E[gap^2]
    PART_seq_nats  PART_seq_share                   mean and share of whole sequences
    natural_PART_...                                            the same of A - M where the trainer repeats the engine's experts
    routing_r                                       R = 1 - E[(B - M)^2] / E[(A - M)^2]
    floor_z                                         Z = k3 of natural/ / k3 of floor/
    gap_square_intercept_nats2  gap_square_slope_nats2  gap_k3_intercept_nats  gap_k3_slope_nats
    gap_square_intercept_se_nats2  gap_square_slope_se_nats2  gap_k3_intercept_se_nats  gap_k3_slope_se_nats
                                                    P - M by version gap: the engine's part, and one version's; standard errors
router/     natural experts (row of a processed token, layer) against the engine's under the same weights: "engine" where recorded,
            else "behavior" of rows whose version gap is 0 or unknown; where the trainer's free choice is not recorded, its
            shadow choice against "behavior"
    num_rows  mismatch  overlap  jaccard  chance  zero_overlap_fraction  slots_mean
    any_flip  layers_per_token  dispersion  persistence
    load_tv  load_tv_max  load_js  load_js_max  directionality  directionality_max  directionality_chance  load_max_over_mean  load_cv
    mismatch_prompt  mismatch_response  mismatch_layer0  mismatch_layer0_prompt  mismatch_layer0_response
    local  free  amplification  cascade_share       shadow and natural against behavior, same weights
    decode_mismatch                                 engine against behavior, version gap 0 or unknown
    stale_mismatch                                  engine against behavior, version gap above 0
    total_mismatch                                  natural (or shadow) against behavior, all rows
    gap_mismatch_intercept  gap_mismatch_slope  gap_mismatch_intercept_se  gap_mismatch_slope_se   total_mismatch by version gap
    prompt_worst_mismatch  prompt_worst_at  prompt_end_worst_mismatch  prompt_end_worst_at
                                                    layer 0 at the prompt's worst place: from its start, and from its last row
    margin_p50  margin_f0  implied_noise  margin_flatness  far_flip_fraction
    flip_excess_nats  flip_k2_share                 P(flip) (E[|d| | flip] - E[|d| | none]); share of sum d^2 of tokens with a flip
    blame_ratio_max  blame_z_max                    the greatest of all experts
    blame_layer  blame_expert  blame_ratio          of the expert with the greatest blame_z

structure/  what noise cannot do; 0 where all is well
    row_count_errors  out_of_range_fraction  sentinel_fraction  duplicate_fraction  zero_row_fraction  zero_layers
    constant_row_fraction  sorted_fraction (no failure: the engine's order is lost)
    token_shift  layer_offset  layer_shift_fraction  permuted_experts  garbage_row_fraction  garbage_sequences
    mispaired_sequences  logp_shift

data/       num_sequences  num_tokens  num_prompt_tokens  num_routed_sequences  num_rows  num_layers  top_k  num_experts
            reward_mean  version_gap_mean  version_gap_max    (what the file says: Evidence.facts)

TABLES (rows of plain numbers and strings)
    intervals     metric, value, low, high (95 %, bootstrap over sequences)
    probability  entropy  position  position_quartile  length  version_gap  token_class
                  low, high or label; num_tokens, token_share, k1_nats, abs_mean_nats, k3_nats, k2_share, f_2    of mismatch/
    quantiles     pair, num_tokens, abs_mean_nats, abs_p50_nats, abs_p90_nats, abs_p99_nats, abs_p999_nats, abs_max_nats, k3_nats
    sequences     index, uid, step, num_tokens, nats, geo_nats, k2_share, mult_err, reward, advantage, is_outlier: the worst 32
    extreme       sequence, uid, position (in the response), token, before, after (ids), gap_nats, behavior, engine, policy, natural,
                  replayed, entropy, version_gap, flipped_layers: the worst 64 tokens of mismatch/
    causes        gap ("policy" or "natural"), part, nats, share, square_share, seq_nats, seq_share, k3_nats
    version_gaps  gap, num_tokens, mean_nats, square_mean_nats2, k3_nats      of total/
    structure     test, source (column of experts, or pair), value, passed, detail
    layers        layer, mismatch, overlap, local, free, amplification, persistence, load_tv, load_js, slot_disagreement,
                  directionality, directionality_chance, load_max_over_mean, load_cv, reference_load_max_over_mean, margin_f0, implied_noise, first_flip_fraction
    experts       layer, expert, load, reference_load, gain, loss, bias, blame_ratio, blame_z, num_tokens: the most blamed 32
    dose          low, high (flipped layers), num_tokens, abs_mean_nats, k3_nats, f_2, k2_share
    margins       low, high (in implied noise), num_choices, num_flips, flip_rate
    garbage       source, sequence, start, length, overlap
    permutation   source, layer, expert, found_as, overlap, found_overlap

ARRAYS (for plots)
    mismatch/gap_histogram [2, bins] of d < 0 and d > 0        mismatch/gap_edges [bins + 1] of |d|
    mismatch/scatter [m, 2] behavior or engine, policy: at most 4096 tokens, evenly taken
    mismatch/seq_nats [B'], mismatch/seq_tokens [B']            total/seq_nats [B'], total/seq_tokens [B']
    mismatch/seq_index [B'], total/seq_index [B'] their sequences
    router/overlap_layer_position [L, bins]   router/position_edges [bins + 1] of the absolute position
    router/position_mismatch [Q, 2] layer 0 and all layers, by absolute position    router/position_rows [Q]
    router/prompt_end_mismatch [W, 2], router/prompt_end_offset [W]: the same by distance to the prompt's last row
    router/layers_per_token [L + 1] histogram                   router/first_flip [L] histogram
    structure/layer_shift [L, L]    structure/token_shift [5]    structure/logp_shift [5], shifts -2 .. 2
    router/margin_curve [bins], router/margin_curve_edges [bins + 1] in units of the implied noise
    router/load [L, E], router/reference_load [L, E], router/bias [L, E], router/blame_ratio [L, E], router/blame_z [L, E]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vespo.algo.mismatch import finite_only
from megatron_vespo.diagnose.aligned import Aligned, Pair
from megatron_vespo.diagnose.examined_experts import errors, router, router_intervals, structure
from megatron_vespo.diagnose.examined_logprobs import (
    PAIRS,
    cause_intervals,
    causes,
    conditioned,
    intervals,
    pair_metrics,
    quantile_row,
    semantics,
    version_gaps,
    worst_sequences,
    worst_tokens,
)
from megatron_vespo.evidence import Evidence

Row = dict[str, Any]
_BOUNDED_PAIRS = ("mismatch", "total", "natural", "floor")


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What the numbers of one Evidence are; names are listed above."""

    metrics: Mapping[str, float]
    tables: Mapping[str, list[Row]]
    arrays: Mapping[str, NDArray[Any]]


def examine(evidence: Evidence) -> Examination:
    """Compute everything that the columns of `evidence` allow."""
    aligned = Aligned(evidence)
    found = _Collected(_data(aligned), {}, {})
    pairs = {name: pair for name in PAIRS if (pair := aligned.pair(name)) is not None}
    for name, pair in pairs.items():
        metrics, arrays = pair_metrics(aligned, name, pair)
        found.add(name, metrics, {"quantiles": [quantile_row(name, metrics)]}, arrays)
        if name in _BOUNDED_PAIRS:
            found.add(name, {}, {"intervals": intervals(aligned, name, pair)})
    found.add("semantics", semantics(aligned))
    cause_metrics, cause_table = causes(aligned)
    found.add("cause", cause_metrics, {"causes": cause_table, "intervals": cause_intervals(aligned)})
    choices = aligned.router_pair
    if choices is not None:
        found.add("router", *router(aligned, choices))
        found.add("router", {}, {"intervals": router_intervals(aligned, choices)})
    found.add("structure", *structure(aligned))
    if "total" in pairs:
        found.add("total", {}, {"version_gaps": version_gaps(aligned, pairs["total"])})
    if "mismatch" in pairs:
        _add_mismatch(found, aligned, pairs["mismatch"])
    return Examination(metrics=found.metrics, tables=found.tables, arrays=found.arrays)


def _add_mismatch(found: _Collected, aligned: Aligned, pair: Pair) -> None:
    """Where the engine mismatch is."""
    choices = aligned.router_pair
    flips = None if choices is None else aligned.flips(choices.first, choices.second)
    found.add("mismatch", {}, conditioned(aligned, pair))
    found.add(
        "mismatch",
        {},
        {"sequences": worst_sequences(aligned, pair), "extreme": worst_tokens(aligned, pair, flips)},
    )
    found.add("router", *errors(aligned, pair))


@dataclass(frozen=True)
class _Collected:
    """An examination under way."""

    metrics: dict[str, float]
    tables: dict[str, list[Row]]
    arrays: dict[str, NDArray[Any]]

    def add(
        self,
        prefix: str,
        metrics: Mapping[str, float],
        tables: Mapping[str, list[Row]] | None = None,
        arrays: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        """Enter numbers under their prefix; rows of a table that is there already come after its own."""
        self.metrics.update({f"{prefix}/{name}": value for name, value in finite_only(metrics).items()})
        for name, rows in (tables or {}).items():
            if rows:
                self.tables[name] = self.tables.get(name, []) + rows
        self.arrays.update(arrays or {})


def _data(aligned: Aligned) -> dict[str, float]:
    """How much there is to judge by."""
    e = aligned.evidence
    found = {
        "num_sequences": len(e.num_response),
        "num_tokens": int(e.is_sampled.sum()),
        "num_prompt_tokens": int(e.num_prompt.sum()),
        "num_routed_sequences": int(e.is_routed.sum()),
        "num_rows": len(aligned.sequence_R),
        "num_experts": aligned.num_experts,
    }
    for experts in list(aligned.experts.values())[:1]:
        found |= {"num_layers": experts.shape[1], "top_k": experts.shape[2]}
    if e.reward is not None and np.isfinite(e.reward).any():
        found["reward_mean"] = float(np.nanmean(e.reward))
    if e.version_gap is not None and e.is_sampled.any():
        gap = e.version_gap[e.is_sampled]
        found |= {"version_gap_mean": float(gap.mean()), "version_gap_max": float(gap.max())}
    return {f"data/{name}": float(value) for name, value in found.items()}
