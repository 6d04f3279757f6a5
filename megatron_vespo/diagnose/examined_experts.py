"""The experts of an Evidence in numbers: flips, loads, margins, blame, places and structure (names in examination.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vespo.algo.decomposition import gap_regression
from megatron_vespo.algo.mismatch import bootstrap, finite_only
from megatron_vespo.algo.routers import (
    NOISE_EDGES,
    MarginCurve,
    RouterGap,
    blame,
    cascade,
    dose_table,
)
from megatron_vespo.algo.structure import (
    SHIFTS,
    best_shift,
    constant_fraction,
    garbage_spans,
    layer_map,
    mispaired,
    misplaced_layers,
    renamed_experts,
    shift_correlation,
    shift_overlap,
    soundness,
)
from megatron_vespo.diagnose.aligned import Aligned, Choices, Pair
from megatron_vespo.diagnose.examined_logprobs import interval_row
from megatron_vespo.types import Doubles, Ints, Mask

Row = dict[str, Any]
Arrays = dict[str, NDArray[Any]]

_MOST_POSITIONS = 4096
_PROMPT_END = (-64, 16)
_LEAST_ROWS = 4
"""Below, a place tells nothing."""
_LEAST_TOKENS = 16
"""Of an expert that may be blamed, and of those that did not use it."""
_NUM_EXPERTS = 32


def router(aligned: Aligned, choices: Choices) -> tuple[dict[str, float], dict[str, list[Row]], Arrays]:
    """Metrics (without prefix), tables and arrays of the router pair."""
    flip_RL, rows = aligned.flips(choices.first, choices.second), choices.rows
    gap = aligned.router_gap
    assert gap is not None, "choices are the router pair"
    layers = gap.layers()
    metrics = gap.statistics() | _by_place(aligned, flip_RL, rows) | _between_columns(aligned, layers)
    arrays = {
        "router/load": gap.load_LE,
        "router/reference_load": gap.reference_load_LE,
        "router/bias": gap.bias_LE,
        "router/layers_per_token": gap.flips,
        "router/first_flip": gap.first_flip[:-1],
    }
    tables: dict[str, list[Row]] = {"layers": layers}
    margins = _margins(aligned, flip_RL, rows, layers)
    if margins is not None:
        metrics |= margins[0]
        tables["margins"], arrays["router/margin_curve"] = margins[1:]
        arrays["router/margin_curve_edges"] = NOISE_EDGES
    return metrics, tables, arrays | _places(aligned, choices, flip_RL)


def errors(aligned: Aligned, pair: Pair) -> tuple[dict[str, float], dict[str, list[Row]], Arrays]:
    """How the error of log-probs hangs on flips, and on single experts of the engine."""
    choices = aligned.router_pair
    column = choices.second if choices else "engine" if "engine" in aligned.experts else "behavior"
    usable = pair.chosen & (aligned.row_S >= 0) & np.isfinite(pair.first) & np.isfinite(pair.second)
    usable &= (column == "engine") | ~aligned.is_stale_S
    if column not in aligned.experts or not usable.any():
        return {}, {}, {}
    row = aligned.row_S[usable]
    d = pair.first[usable].astype(np.float64) - pair.second[usable]
    metrics, tables, arrays = _blamed(aligned, column, row, d)
    if choices is not None:
        num_flips = aligned.flips(choices.first, choices.second)[row].sum(1)
        metrics |= _excess(num_flips > 0, d)
        tables["dose"] = dose_table(num_flips, d)
    return metrics, tables, arrays


def _excess(flipped_S: Mask, d_S: Doubles) -> dict[str, float]:
    """What tokens with a flip have more of."""
    square = np.square(d_S)
    found = {"flip_k2_share": float(square[flipped_S].sum() / square.sum())} if square.any() else {}
    if 0 < flipped_S.sum() < len(d_S):
        excess = np.abs(d_S[flipped_S]).mean() - np.abs(d_S[~flipped_S]).mean()
        found["flip_excess_nats"] = float(flipped_S.mean() * excess)
    return found


def structure(aligned: Aligned) -> tuple[dict[str, float], dict[str, list[Row]], Arrays]:
    """Every structure test that the columns allow; the table `structure` says for each whether it passed."""
    told = _Told()
    rejected = [name for name in aligned.evidence.experts if name not in aligned.experts]
    if aligned.evidence.experts:
        wanted = "one row for every token but the last, of the same layers"
        told.test("row_count_errors", len(rejected), ", ".join(rejected) or "all columns", wanted)
    _test_log_probs(aligned, told)
    for name, experts in aligned.experts.items():
        for key, value in soundness(experts, aligned.num_experts).items():
            told.test(key, value, name)
        other = next((x for key, x in aligned.experts.items() if key != name), None)
        told.test("constant_row_fraction", constant_fraction(experts, aligned.sequence_R, other), name)
    for first, second in _comparable(set(aligned.experts)):
        _test_places(aligned, first, second, told)
    return told.metrics, {"structure": told.rows, **told.tables}, told.arrays


def router_intervals(aligned: Aligned, choices: Choices) -> list[Row]:
    """Of the mismatch, by drawing whole sequences."""
    flip_RL, num = aligned.flips(choices.first, choices.second), len(aligned.evidence.num_response)
    sequence = aligned.sequence_R[choices.rows]
    flips = np.bincount(sequence, flip_RL[choices.rows].mean(1), num)
    sums = np.stack([flips, np.bincount(sequence, minlength=num)], 1)
    sums = sums[sums[:, 1] > 0]
    bounds = bootstrap(sums, lambda drawn: {"router/mismatch": drawn[:, 0] / drawn[:, 1]})
    return [
        interval_row(name, float(sums[:, 0].sum() / sums[:, 1].sum()), bound)
        for name, bound in bounds.items()
    ]


class _Told:
    """Results of structure tests; of several columns the worst counts."""

    INFORMATION = ("sorted_fraction",)

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.rows: list[Row] = []
        self.tables: dict[str, list[Row]] = {}
        self.arrays: Arrays = {}

    def test(self, name: str, value: float | None, source: str, detail: str = "") -> bool:
        """Enter a result, and say whether it passed: 0 passes, None says that there was nothing to test."""
        if value is None:
            return True
        value = float(value)
        if name not in self.metrics or abs(value) > abs(self.metrics[name]):
            self.metrics[name] = value
        passed = value == 0 or name in self.INFORMATION
        self.rows.append({"test": name, "source": source, "value": value, "passed": passed, "detail": detail})
        return passed

    def picture(self, name: str, array: NDArray[Any], passed: bool) -> None:
        """Keep what a test saw: the first, unless a later one fails."""
        if name not in self.arrays or not passed:
            self.arrays[name] = array

    def list(self, name: str, rows: list[Row]) -> None:
        """Enter what a test found."""
        if rows:
            self.tables[name] = self.tables.get(name, []) + rows


def _comparable(columns: set[str]) -> list[tuple[str, str]]:
    """Pairs of columns that should belong to the same rows: the trainer's against each of the engine's."""
    ours = "natural" if "natural" in columns else "shadow"
    theirs = [name for name in ("engine", "behavior") if name in columns]
    return (
        [(ours, name) for name in theirs] if ours in columns else [("engine", "behavior")][: len(theirs) - 1]
    )


def _by_place(aligned: Aligned, flip_RL: Mask, rows: Mask) -> dict[str, float]:
    """Mismatch of prompt and response rows, of all layers and of the first."""
    found: dict[str, float] = {}
    for end, chosen in (
        ("", rows),
        ("_prompt", rows & aligned.is_prompt_R),
        ("_response", rows & ~aligned.is_prompt_R),
    ):
        if chosen.any():
            found[f"mismatch_layer0{end}"] = float(flip_RL[chosen, 0].mean())
            if end:
                found[f"mismatch{end}"] = float(flip_RL[chosen].mean())
    first_RL = flip_RL[:, 0] & rows
    for name, place_R, chosen in (
        ("prompt", aligned.position_R, rows & aligned.is_prompt_R),
        (
            "prompt_end",
            aligned.prompt_end_R,
            rows & aligned.is_prompt_R & (aligned.prompt_end_R >= _PROMPT_END[0]),
        ),
    ):
        places, group = np.unique(place_R[chosen], return_inverse=True)
        num = np.bincount(group, minlength=len(places))
        mean = np.bincount(group, first_RL[chosen], len(places)) / np.maximum(num, 1)
        mean[num < _LEAST_ROWS] = -1
        if len(mean) and mean.max() >= 0:
            found[f"{name}_worst_mismatch"] = float(mean.max())
            found[f"{name}_worst_at"] = float(places[mean.argmax()])
    return found


def _between_columns(aligned: Aligned, layers: list[Row]) -> dict[str, float]:
    """Local against free flips, and the engine against itself; amplification is entered into `layers`."""
    fresh, every = ~aligned.is_stale_R, np.ones(len(aligned.sequence_R), np.bool_)
    found: dict[str, float] = {}
    if {"natural", "shadow", "behavior"} <= set(aligned.experts) and fresh.any():
        free, local = (aligned.gap(Choices(name, "behavior", fresh)) for name in ("natural", "shadow"))
        found, amplification = cascade(free, local)
        for row, a, b, ratio in zip(layers, free.mismatch_L, local.mismatch_L, amplification, strict=True):
            row |= {"free": float(a), "local": float(b)} | finite_only({"amplification": ratio})
    ours = "natural" if "natural" in aligned.experts else "shadow"
    pairs = (
        ("decode_mismatch", "engine", fresh),
        ("stale_mismatch", "engine", ~fresh),
        ("total_mismatch", ours, every),
    )
    for name, first, rows in pairs:
        if {first, "behavior"} <= set(aligned.experts) and rows.any():
            flip_R = aligned.flips(first, "behavior").mean(1)
            found[name] = float(flip_R[rows].mean())
            if name == "total_mismatch":
                found |= _mismatch_by_gap(aligned, flip_R)
    return found


def _mismatch_by_gap(aligned: Aligned, flip_R: Doubles) -> dict[str, float]:
    gap = aligned.evidence.version_gap
    chosen = aligned.row_S >= 0
    if gap is None or not chosen.any():
        return {}
    found = gap_regression(flip_R[aligned.row_S[chosen]], gap[chosen])
    return {f"gap_mismatch_{name}": value for name, value in found.items()}


def _margins(
    aligned: Aligned, flip_RL: Mask, rows: Mask, layers: list[Row]
) -> tuple[dict[str, float], list[Row], Doubles] | None:
    """Metrics, table and curve of flips by margin; the layers' own are entered into `layers`."""
    margin = aligned.evidence.margin
    if margin is None or margin.shape != flip_RL.shape:
        return None
    curve = MarginCurve.of(margin[rows].astype(np.float32), flip_RL[rows])
    for row, f0, noise in zip(layers, curve.f0_L, curve.noise_L, strict=True):
        row |= finite_only({"margin_f0": f0, "implied_noise": noise})
    choices, flips = curve.by_noise()
    rate = np.divide(flips, choices, out=np.full(len(choices), np.nan), where=choices > 0)
    table = [
        {"low": float(low)}
        | ({"high": float(high)} if np.isfinite(high) else {})
        | {"num_choices": int(n), "num_flips": int(k), "flip_rate": float(k / n)}
        for low, high, n, k in zip(NOISE_EDGES, NOISE_EDGES[1:], choices, flips, strict=False)
        if n
    ]
    return curve.statistics(), table, rate


def _places(aligned: Aligned, choices: Choices, flip_RL: Mask) -> Arrays:
    """Mismatch by absolute position, by distance to the prompt's end, and overlap by layer and position."""
    rows = choices.rows
    position, flips = aligned.position_R[rows], np.stack([flip_RL[rows, 0], flip_RL[rows].mean(1)], 1)
    inside = position < _MOST_POSITIONS
    by_position, num = _means(position[inside], flips[inside])
    offset = aligned.prompt_end_R[rows]
    near = (offset >= _PROMPT_END[0]) & (offset <= _PROMPT_END[1])
    by_offset, _ = _means(offset[near] - _PROMPT_END[0], flips[near], _PROMPT_END[1] - _PROMPT_END[0] + 1)
    edges = np.array([0, *(2**j for j in range(int(position.max()).bit_length() + 1))])
    group = np.searchsorted(edges, position, "right") - 1
    return {
        "router/position_mismatch": by_position,
        "router/position_rows": num,
        "router/prompt_end_mismatch": by_offset,
        "router/prompt_end_offset": np.arange(_PROMPT_END[0], _PROMPT_END[1] + 1),
        "router/overlap_layer_position": _means(
            group, aligned.overlap(choices.first, choices.second)[rows], len(edges) - 1
        )[0].T,
        "router/position_edges": edges,
    }


def _means(
    group_R: Ints, value_RX: NDArray[Any], num: int | None = None
) -> tuple[Doubles, NDArray[np.int64]]:
    """[groups, X] means, nan where a group is empty, and [groups] its rows."""
    count = np.bincount(group_R, minlength=num or 0)
    total = np.stack([np.bincount(group_R, column, len(count)) for column in value_RX.T], 1)
    return np.divide(total, count[:, None], out=np.full(total.shape, np.nan), where=count[:, None] > 0), count


def _blamed(
    aligned: Aligned, column: str, row_S: Ints, d_S: Doubles
) -> tuple[dict[str, float], dict[str, list[Row]], Arrays]:
    """Error of the tokens that used an expert against that of the others."""
    found = blame(aligned.experts[column][row_S], d_S, aligned.num_experts)
    known = (found.num >= _LEAST_TOKENS) & (len(d_S) - found.num >= _LEAST_TOKENS) & np.isfinite(found.ratio)
    ratio, z = np.where(known, found.ratio, np.nan), np.where(known, found.z, np.nan)
    arrays: Arrays = {"router/blame_ratio": ratio, "router/blame_z": z}
    if not known.any():
        return {}, {}, arrays
    order = np.argsort(np.where(known, -found.z, np.inf), axis=None, kind="stable")
    worst = [np.unravel_index(int(i), known.shape) for i in order[:_NUM_EXPERTS] if known.flat[i]]
    table = [
        {
            "layer": int(at[0]),
            "expert": int(at[1]),
            "num_tokens": int(found.num[at]),
            "blame_ratio": float(ratio[at]),
            "blame_z": float(z[at]),
            **_balance(aligned.router_gap, at),
        }
        for at in worst
    ]
    metrics = {
        "blame_ratio_max": float(np.nanmax(ratio)),
        "blame_z_max": float(np.nanmax(z)),
        "blame_layer": float(worst[0][0]),
        "blame_expert": float(worst[0][1]),
        "blame_ratio": float(ratio[worst[0]]),
    }
    return metrics, {"experts": table}, arrays


def _balance(gap: RouterGap | None, at: tuple[np.intp, ...]) -> Row:
    """How often the trainer chose one expert, and how often the engine did."""
    if gap is None:
        return {}
    load, reference, kept = int(gap.load_LE[at]), int(gap.reference_load_LE[at]), int(gap.kept_LE[at])
    return {
        "load": load, "reference_load": reference, "gain": load - kept, "loss": reference - kept,
        "bias": float(gap.bias_LE[at]),
    }  # fmt: skip


def _test_log_probs(aligned: Aligned, told: _Told) -> None:
    """Whether both log-probs belong to the same token."""
    e = aligned.evidence
    found = shift_correlation(e.policy_logp, e.behavior_logp, aligned.sequence_S, e.is_sampled)
    shift = best_shift(found, int(e.is_sampled.sum()))
    if shift is not None:
        passed = told.test("logp_shift", shift, "policy against behavior", _by_shift(found))
        told.picture("structure/logp_shift", found, passed)


def _test_places(aligned: Aligned, first: str, second: str, told: _Told) -> None:
    """Token, layer, expert and sequence that the rows of two columns belong to, whatever their weights."""
    source, sequence = f"{first} against {second}", aligned.sequence_R
    bits, reference = aligned.bits(first), aligned.bits(second)
    top_k, num_experts = aligned.experts[first].shape[-1], aligned.num_experts
    shifts = shift_overlap(bits, reference, sequence, top_k)
    passed = told.test(
        "token_shift", best_shift(shifts, bits.shape[0] * bits.shape[1]), source, _by_shift(shifts)
    )
    told.picture("structure/token_shift", shifts, passed)
    mapped = layer_map(bits, reference, top_k)
    share, offset = misplaced_layers(mapped)
    told.test("layer_offset", offset, source)
    told.picture("structure/layer_shift", mapped, told.test("layer_shift_fraction", share, source))
    renamed = renamed_experts(aligned.experts[first], aligned.experts[second], num_experts)
    told.test("permuted_experts", len(renamed), source)
    told.list("permutation", [{"source": source, **x._asdict()} for x in renamed])
    chance = aligned.chance(first, second)
    overlap_R = aligned.overlap(first, second).mean(1)
    spans = garbage_spans(overlap_R, sequence, chance)
    told.test("garbage_row_fraction", sum(span.length for span in spans) / len(overlap_R), source)
    told.test("garbage_sequences", len({span.sequence for span in spans}), source)
    told.list("garbage", [{"source": source, **span._asdict()} for span in spans])
    wrong = mispaired(bits, reference, sequence, ~aligned.is_prompt_R, top_k=top_k, chance=chance)
    detail = "; ".join(f"{x.sequence} has the rows of {x.found_in}" for x in wrong[:8])
    told.test("mispaired_sequences", len(wrong), source, detail)


def _by_shift(agreement_5: Doubles) -> str:
    return ", ".join(
        f"{shift:+d}: {x:.3f}" for shift, x in zip(SHIFTS, agreement_5, strict=True) if np.isfinite(x)
    )
