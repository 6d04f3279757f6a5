"""The log-probs of an Evidence in numbers: pairs, sequences, conditioned tables, causes (names in examination.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vespo.algo.decomposition import (
    Decomposition,
    Passes,
    decompose,
    decompose_natural,
    floor_verdict,
    gap_regression,
    routing_verdict,
)
from megatron_vespo.algo.mismatch import (
    EDGES,
    TokenGap,
    bf16_fraction,
    bootstrap,
    correlation,
    finite_only,
    growth_exponent,
    phi_statistics,
    robust_line,
    sequence_statistics,
    surprise,
    token_statistics,
    token_sums,
)
from megatron_vespo.config import VespoConfig
from megatron_vespo.diagnose.aligned import Aligned, Pair
from megatron_vespo.types import Doubles, Floats, Ints, Mask

Row = dict[str, Any]
Arrays = dict[str, NDArray[Any]]

PAIRS = ("mismatch", "total", "natural", "replayed", "floor", "stale", "decode", "routing")
_OF_SEQUENCES = ("mismatch", "total", "stale")
_FITTED = ("mismatch", "total", "natural")
_QUANTILES = ("num_tokens", "abs_mean_nats", "abs_p50_nats", "abs_p90_nats", "abs_p99_nats", "abs_p999_nats",
              "abs_max_nats", "k3_nats")  # fmt: skip
_BOUNDED = (
    "k1_nats",
    "k3_nats",
    "abs_mean_nats",
    "mult_err",
    "f_2",
    "ratio_mean",
    "ess_token",
    "pearson",
    "exact_zero_fraction",
)
"""Statistics with bootstrap intervals."""
_NUM_SEQUENCES, _NUM_TOKENS, _CONTEXT = 32, 64, 8
_MOST_POINTS = 4096
_LEVEL = 0.95

_PROBABILITY = (0, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.9, 0.99, 1)
_ENTROPY = (0, 0.01, 0.1, 0.5, 1, 2, 4, np.inf)
_DOUBLINGS = (0, *(2**j for j in range(25)))


def pair_metrics(aligned: Aligned, name: str, pair: Pair) -> tuple[dict[str, float], Arrays]:
    """Everything of one pair, without its prefix; arrays are named in full."""
    first, second = pair.first[pair.chosen], pair.second[pair.chosen]
    gap = TokenGap.of(first, second)
    metrics, arrays = gap.statistics(), Arrays()
    if name in _FITTED:
        finite = np.isfinite(first) & np.isfinite(second)
        line = robust_line(second[finite].astype(np.float64), first[finite].astype(np.float64))
        metrics |= {} if line is None else {"slope": line[0], "intercept_nats": line[1]}
    if name in _OF_SEQUENCES:
        more, arrays = _of_sequences(aligned, name, pair)
        metrics |= more
    if name == "mismatch":
        arrays |= {"mismatch/gap_histogram": gap.histogram, "mismatch/gap_edges": EDGES}
        arrays["mismatch/scatter"] = np.stack([second, first], 1)[_evenly(len(first))]
    return metrics, arrays


def semantics(aligned: Aligned) -> dict[str, float]:
    """Of what the engines call a log-prob."""
    e, found = aligned.evidence, dict[str, float | None]()
    for name, column in (
        ("behavior", e.behavior_logp),
        ("engine", e.engine_logp),
        ("policy", e.policy_logp),
        ("natural", e.natural_logp),
    ):
        if column is not None:
            found[f"bf16_{name}_fraction"] = bf16_fraction(column[e.is_sampled & np.isfinite(column)])
    if e.entropy is None:
        return finite_only(found)
    for name, column in (("surprise", e.behavior_logp), ("surprise_policy", e.policy_logp)):
        chosen = e.is_sampled & np.isfinite(column) & np.isfinite(e.entropy)
        if chosen.any():
            found[f"{name}_nats"], found[f"{name}_se_nats"] = surprise(column[chosen], e.entropy[chosen])
    return finite_only(found)


def conditioned(aligned: Aligned, pair: Pair) -> dict[str, list[Row]]:
    """Where the mismatch is: by what the token was, and where it stood."""
    e, chosen = aligned.evidence, pair.chosen
    length_S = e.num_response[aligned.sequence_S]
    position = aligned.position_S[chosen]
    quartile = np.minimum(4 * position // np.maximum(length_S[chosen], 1), 3)
    tables = {
        "probability": _by_bins(pair, np.exp(pair.second[chosen].astype(np.float64)), _PROBABILITY),
        "position": _by_bins(pair, position, _DOUBLINGS),
        "position_quartile": _by_label(pair, quartile, ("first", "second", "third", "last")),
        "length": _by_bins(pair, length_S[chosen], _DOUBLINGS),
        "token_class": _by_label(pair, _classes(aligned)[chosen], _CLASSES),
    }
    if e.entropy is not None and np.isfinite(e.entropy[chosen]).all():
        tables["entropy"] = _by_bins(pair, e.entropy[chosen], _ENTROPY)
    return {name: rows for name, rows in tables.items() if rows}


def worst_sequences(aligned: Aligned, pair: Pair) -> list[Row]:
    """The sequences with the greatest sum of d^2, and what is known of them."""
    e = aligned.evidence
    sums = _sequence_sums(aligned, pair)
    s = token_statistics(sums)
    square = np.nan_to_num(s["square_mean_nats2"] * s["num_tokens"])
    worst = [int(i) for i in np.argsort(-square, kind="stable")[:_NUM_SEQUENCES] if s["num_tokens"][i] > 0]
    return [
        {
            "index": i,
            **({"uid": e.uid[i]} if e.uid else {}),
            **({"step": int(e.step[i])} if e.step is not None else {}),
            **finite_only({
                "num_tokens": s["num_tokens"][i],
                "nats": -s["k1_nats"][i] * s["num_tokens"][i],
                "geo_nats": -s["k1_nats"][i],
                "k2_share": square[i] / max(square.sum(), 1e-300),
                "mult_err": s["mult_err"][i],
                "reward": None if e.reward is None else e.reward[i],
                "advantage": None if e.advantage is None else e.advantage[i],
            }),
            "is_outlier": bool(s["mult_err"][i] > 2),
        }
        for i in worst
    ]  # fmt: skip


def worst_tokens(aligned: Aligned, pair: Pair, flips_RL: Mask | None) -> list[Row]:
    """The tokens with the greatest |d|, and what everybody said about them.

    Args:
        flips_RL: of the router pair, where there is one.
    """
    size = np.where(pair.chosen, np.abs(pair.first.astype(np.float64) - pair.second), -np.inf)
    size[np.isnan(size)] = np.inf  # a log-prob that is no number is worse than any
    return [
        _told(aligned, pair, int(at), flips_RL)
        for at in np.argsort(-size, kind="stable")[:_NUM_TOKENS]
        if pair.chosen[at] and size[at] > 0
    ]


def causes(aligned: Aligned) -> tuple[dict[str, float], list[Row]]:
    """Shares, R, Z and regressions (cause/..., without the prefix), and the table of parts."""
    metrics, table = dict[str, float](), list[Row]()
    for name, prefix, parts, sequence_S in _decompositions(aligned):
        more, rows = _shares(name, parts, sequence_S, len(aligned.evidence.num_response))
        metrics |= {prefix + key: value for key, value in more.items()}
        table += rows
    return metrics | _verdicts(aligned) | _by_gap(aligned), table


def version_gaps(aligned: Aligned, pair: Pair) -> list[Row]:
    """P - M by how many versions old the token is."""
    gap = aligned.evidence.version_gap
    if gap is None:
        return []
    values, group = np.unique(gap[pair.chosen], return_inverse=True)
    s = token_statistics(
        token_sums(pair.first[pair.chosen], pair.second[pair.chosen], group.astype(np.int32), len(values))
    )
    return [
        {"gap": int(value)}
        | finite_only({
            "num_tokens": s["num_tokens"][i], "mean_nats": -s["k1_nats"][i],
            "square_mean_nats2": s["square_mean_nats2"][i], "k3_nats": s["k3_nats"][i],
        })
        for i, value in enumerate(values)
    ]  # fmt: skip


def quantile_row(name: str, metrics: Mapping[str, float]) -> Row:
    """One row of the table `quantiles`."""
    return {"pair": name, **{key: metrics[key] for key in _QUANTILES if key in metrics}}


def intervals(aligned: Aligned, name: str, pair: Pair) -> list[Row]:
    """Of the statistics of one pair, by drawing whole sequences."""
    sums = _sequence_sums(aligned, pair)
    sums = sums[sums.any(1)]
    value = token_statistics(sums.sum(0))
    bounds = bootstrap(
        sums, lambda drawn: {k: v for k, v in token_statistics(drawn).items() if k in _BOUNDED}, level=_LEVEL
    )
    return [interval_row(f"{name}/{key}", float(value[key]), bound) for key, bound in bounds.items()]


def cause_intervals(aligned: Aligned) -> list[Row]:
    """Of R, where its passes were made."""
    columns = _same_weights_passes(aligned)
    if columns is None:
        return []
    natural, replayed, behavior, sequence = columns
    squares = [np.square(x.astype(np.float64) - behavior) for x in (natural, replayed)]
    sums = np.stack([np.bincount(sequence, x, len(aligned.evidence.num_response)) for x in squares], 1)
    value = routing_verdict(natural, replayed, behavior)

    def routing_r(drawn: Doubles) -> dict[str, Doubles]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return {"cause/routing_r": 1 - drawn[:, 1] / drawn[:, 0]}

    bounds = bootstrap(sums[np.bincount(sequence, minlength=len(sums)) > 0], routing_r, level=_LEVEL)
    return [interval_row(key, value, bound) for key, bound in bounds.items() if value is not None]


def interval_row(name: str, value: float, bound: tuple[float, float]) -> Row:
    """One row of the table `intervals`."""
    return {"metric": name, "value": value, "low": bound[0], "high": bound[1]}


_CLASSES = ("first", "after_environment", "middle", "last")


def _classes(aligned: Aligned) -> Ints:
    """[S] place in _CLASSES: the first token of a response, the first after what an environment wrote, the last, any other."""
    e, position = aligned.evidence, aligned.position_S
    resumed = np.zeros(len(position), np.bool_)
    resumed[1:] = ~e.is_sampled[:-1]
    last = position == e.num_response[aligned.sequence_S] - 1
    return np.select([position == 0, resumed, last], [0, 1, 3], 2).astype(np.int32)


def _sequence_sums(aligned: Aligned, pair: Pair) -> Doubles:
    return token_sums(
        pair.first[pair.chosen],
        pair.second[pair.chosen],
        aligned.sequence_S[pair.chosen],
        len(aligned.evidence.num_response),
    )


def _of_sequences(aligned: Aligned, name: str, pair: Pair) -> tuple[dict[str, float], Arrays]:
    e, sums = aligned.evidence, _sequence_sums(aligned, pair)
    s = token_statistics(sums)
    living = np.flatnonzero(s["num_tokens"] > 0)
    num = s["num_tokens"][living]
    nats = -s["k1_nats"][living] * num
    gap = (pair.first.astype(np.float64) - pair.second)[pair.chosen]
    vespo = VespoConfig()
    metrics = sequence_statistics(sums) | phi_statistics(nats, vespo.k, vespo.lam) if len(nats) else {}
    if np.isfinite(gap).all():
        metrics |= finite_only({"seq_growth": growth_exponent(gap, num.astype(np.int32))})
    known = {"reward": e.reward, "advantage": e.advantage, "length": e.num_response.astype(np.float64)}
    metrics |= finite_only(
        {f"corr_{key}": correlation(nats, x[living]) for key, x in known.items() if x is not None}
    )
    if name == "stale":
        return metrics, {}
    arrays: Arrays = {f"{name}/seq_nats": nats, f"{name}/seq_tokens": num, f"{name}/seq_index": living}
    return metrics, arrays


def _by_bins(pair: Pair, value_S: NDArray[Any], edges: Sequence[float]) -> list[Row]:
    """Rows of the tokens by `value`, in [low, high); the last bin holds its upper edge."""
    group = np.clip(np.searchsorted(edges, value_S, "right") - 1, 0, len(edges) - 2)
    labels = [{"low": float(a)} | ({"high": float(b)} if np.isfinite(b) else {}) for a, b in pairwise(edges)]
    return _conditioned_rows(pair, group.astype(np.int32), labels)


def _by_label(pair: Pair, group_S: Ints, labels: Sequence[str]) -> list[Row]:
    return _conditioned_rows(pair, group_S, [{"label": label} for label in labels])


def _conditioned_rows(pair: Pair, group_S: Ints, labels: Sequence[Row]) -> list[Row]:
    s = token_statistics(token_sums(pair.first[pair.chosen], pair.second[pair.chosen], group_S, len(labels)))
    square = np.nan_to_num(s["square_mean_nats2"] * s["num_tokens"])
    return [
        label
        | finite_only({
            "num_tokens": s["num_tokens"][i],
            "token_share": s["num_tokens"][i] / s["num_tokens"].sum(),
            **{key: s[key][i] for key in ("k1_nats", "abs_mean_nats", "k3_nats", "f_2")},
            "k2_share": square[i] / square.sum() if square.any() else None,
        })
        for i, label in enumerate(labels)
        if s["num_tokens"][i] > 0
    ]  # fmt: skip


def _told(aligned: Aligned, pair: Pair, at: int, flips_RL: Mask | None) -> Row:
    """One row of the table `extreme`."""
    e = aligned.evidence
    sequence, place, row = (int(x[at]) for x in (aligned.sequence_S, aligned.token_S, aligned.row_S))
    end = place + int(e.num_response[sequence] - aligned.position_S[at])
    begin = place - int(aligned.position_S[at] + e.num_prompt[sequence])
    columns = {
        "behavior": e.behavior_logp, "engine": e.engine_logp, "policy": e.policy_logp, "natural": e.natural_logp,
        "replayed": e.replayed_logp, "entropy": e.entropy, "version_gap": e.version_gap,
    }  # fmt: skip
    return {
        "sequence": sequence,
        **({"uid": e.uid[sequence]} if e.uid else {}),
        "position": int(aligned.position_S[at]),
        "token": int(e.tokens[place]),
        "before": [int(x) for x in e.tokens[max(begin, place - _CONTEXT) : place]],
        "after": [int(x) for x in e.tokens[place + 1 : min(end, place + 1 + _CONTEXT)]],
        **finite_only({"gap_nats": float(pair.first[at]) - float(pair.second[at])}),
        **finite_only({name: column[at] for name, column in columns.items() if column is not None}),
        **({"flipped_layers": [int(x) for x in np.flatnonzero(flips_RL[row])]} if flips_RL is not None and row >= 0 else {}),
    }  # fmt: skip


def _is_fresh(aligned: Aligned) -> Mask:
    """[S] tokens of sequences without any older token: else the replayed experts are, at their beginning, of older weights."""
    num_stale_B = np.bincount(aligned.sequence_S, aligned.is_stale_S, len(aligned.evidence.num_response))
    return num_stale_B[aligned.sequence_S] == 0


def _decompositions(aligned: Aligned) -> list[tuple[str, str, Decomposition, Ints]]:
    """(gap, prefix, parts, sequence of its tokens) of P - M, and of A - M where that is another gap."""
    e = aligned.evidence
    is_replayed, replayed = e.facts.router_replay == "engine", e.replayed_logp
    if replayed is not None and e.natural_logp is not None and not is_replayed:
        # Experts of older weights say nothing of the router: for their sequences routing stays a part of the engine.
        replayed = np.where(_is_fresh(aligned), replayed, e.natural_logp)
    columns = {"engine": e.engine_logp, "replayed": replayed, "natural": e.natural_logp}
    present = {name: x for name, x in columns.items() if x is not None}
    chosen = e.is_sampled & np.isfinite(e.behavior_logp) & np.isfinite(e.policy_logp)
    for x in present.values():
        chosen = chosen & np.isfinite(x)
    if not chosen.any():
        return []
    passes = Passes(
        behavior=e.behavior_logp[chosen],
        policy=e.policy_logp[chosen],
        version_gap=None if e.version_gap is None else e.version_gap[chosen],
        is_replayed=is_replayed,
        **{name: x[chosen] for name, x in present.items()},
    )
    sequence = aligned.sequence_S[chosen]
    found = [("policy", "", decompose(passes), sequence)]
    natural = decompose_natural(passes) if passes.is_replayed else None
    return found if natural is None else [*found, ("natural", "natural_", natural, sequence)]


def _shares(
    gap: str, tokens: Decomposition, sequence_S: Ints, num: int
) -> tuple[dict[str, float], list[Row]]:
    living = np.bincount(sequence_S, minlength=num) > 0
    whole = tokens.by_sequence(sequence_S, num)
    whole = Decomposition(total=whole.total[living], parts={k: v[living] for k, v in whole.parts.items()})
    columns = {
        "nats": tokens.means(), "share": tokens.shares(), "square_share": tokens.square_shares(),
        "seq_nats": whole.means(), "seq_share": whole.shares(),
    }  # fmt: skip
    metrics = {f"{part}_{key}": value for key, column in columns.items() for part, value in column.items()}
    rows = [
        {"gap": gap, "part": part, "k3_nats": float((np.expm1(value) - value).mean())}
        | {key: column[part] for key, column in columns.items() if part in column}
        for part, value in tokens.parts.items()
    ]
    return metrics, rows


def _same_weights_passes(aligned: Aligned) -> tuple[Floats, Floats, Floats, Ints] | None:
    """A, B, M and the sequences of the tokens that all three scored under the same weights."""
    e = aligned.evidence
    if e.natural_logp is None or e.replayed_logp is None:
        return None
    columns = (e.natural_logp, e.replayed_logp, e.behavior_logp)
    chosen = e.is_sampled & _is_fresh(aligned) & np.all([np.isfinite(x) for x in columns], axis=0)
    if not chosen.any():
        return None
    return columns[0][chosen], columns[1][chosen], columns[2][chosen], aligned.sequence_S[chosen]


def _verdicts(aligned: Aligned) -> dict[str, float]:
    columns, natural, floor = _same_weights_passes(aligned), aligned.pair("natural"), aligned.pair("floor")
    found: dict[str, float | None] = {}
    if columns is not None:
        found["routing_r"] = routing_verdict(*columns[:3])
    if natural is not None and floor is not None:
        k3 = [
            TokenGap.of(x.first[x.chosen], x.second[x.chosen]).statistics().get("k3_nats")
            for x in (natural, floor)
        ]
        if k3[0] is not None and k3[1] is not None:
            found["floor_z"] = floor_verdict(k3[0], k3[1])
    return finite_only(found)


def _by_gap(aligned: Aligned) -> dict[str, float]:
    gap, pair = aligned.evidence.version_gap, aligned.pair("total")
    if gap is None or pair is None:
        return {}
    chosen = pair.chosen & np.isfinite(pair.first) & np.isfinite(pair.second) & (gap >= 0)
    d = pair.first[chosen].astype(np.float64) - pair.second[chosen]
    found: dict[str, float] = {}
    with np.errstate(over="ignore"):
        values = {("gap_square", "_nats2"): np.square(d), ("gap_k3", "_nats"): np.expm1(d) - d}
    for (name, unit), value in values.items():
        found |= {f"{name}_{key}{unit}": x for key, x in gap_regression(value, gap[chosen]).items()}
    return finite_only(found)


def _evenly(num: int) -> Ints:
    return np.unique(np.linspace(0, num - 1, min(num, _MOST_POINTS)).astype(np.int32))
