"""Off-policyness in numbers: how far apart two log-probs of the same tokens are, per token and per sequence.

Tokens are sampled by the reference mu (an engine), and the policy is pi (the trainer), with d = log pi - log mu and the ratio
r = exp(d).  Means over tokens that mu sampled are expectations under mu, which is what the names say:

    k1 = -d    k2 = d^2 / 2    k3 = r - 1 - d >= 0        estimate KL(mu || pi); E k1 = E k3 exactly, k2 to second order
    k3r = r d - r + 1 >= 0                                estimates KL(pi || mu): E_mu[r d] = E_pi[d]
    js = (r d - (1 + r) log((1 + r) / 2)) / 2 >= 0        estimates the Jensen-Shannon divergence
    chi2 = E r^2 - 1, chi2_rev = E 1/r - 1                chi2(pi || mu) and chi2(mu || pi)

Over stale tokens, sampled from older weights, they measure the same gap weighted by where those weights went.  All sums are
float64.  Everything about tokens is made of sums and fixed bins, so that parts of a batch, ranks and steps add up (`TokenGap`).

Shape key:  S tokens, B sequences, X terms that are summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_vespo.algo.kernel import log_phi
from megatron_vespo.algo.statistics import effective_fraction
from megatron_vespo.types import Doubles, Floats, Ints, Mask

Counts = NDArray[np.int64]
Statistic = Callable[[Doubles], Mapping[str, Doubles]]

TAUS = {"1p1": 1.1, "1p5": 1.5, "2": 2.0, "3": 3.0, "5": 5.0, "10": 10.0, "100": 100.0}
"""Of F(tau), the share of tokens with max(r, 1/r) > tau, by the end of the name."""
GRIDS = tuple(range(3, 11))
"""Exponents j of the grids 2^-j on which differences of coarse number formats lie."""
OUTLIER = 2.0
"""A sequence with a larger mult_err is an outlier (NeMo-RL masks it)."""

_TERMS = (
    "num", "nonfinite", "zero", "d", "size", "square", "k3", "k3r", "js", "ratio", "ratio_square", "inverse", "mult",
    "p_gap", "p", "q", "p_square", "q_square", "p_q", *(f"f_{tau}" for tau in TAUS), *(f"grid_{j}" for j in GRIDS),
)  # fmt: skip
_AT = {name: place for place, name in enumerate(_TERMS)}
_CHUNK = 1 << 16
_PER_OCTAVE, _OCTAVES = 32, (-34, 8)
EDGES: Doubles = np.exp2(np.arange(_OCTAVES[0] * _PER_OCTAVE, _OCTAVES[1] * _PER_OCTAVE + 1) / _PER_OCTAVE)
"""Of |d| in the histogram of `TokenGap`, nats; the first and the last bin are open, and d = 0 is in none."""
_TAIL = 0.005
_LEAST_TAIL = 10


def token_gap(logp_S: Floats, reference_S: Floats) -> dict[str, float]:
    """The few statistics of d = logp - reference that every step logs, quantiles exact.

    k1 = -mean d      k3 = mean(exp(d) - 1 - d) >= 0      abs_mean, abs_p99, abs_max of |d|      square_mean = mean d^2
    """
    d = logp_S.astype(np.float64) - reference_S.astype(np.float64)
    size = np.abs(d)
    return {
        "k1_nats": float(-d.mean()),
        "k3_nats": float((np.expm1(d) - d).mean()),
        "abs_mean_nats": float(size.mean()),
        "abs_p99_nats": float(np.quantile(size, 0.99)),
        "abs_max_nats": float(size.max()),
        "square_mean_nats2": float(np.square(d).mean()),
    }


def sequence_nats(logp_B: Sequence[Floats], reference_B: Sequence[Floats]) -> Doubles:
    """[B] sum over each response of logp - reference: what a sequence-level weight sees, nats."""
    return np.array([
        np.sum(logp.astype(np.float64) - reference.astype(np.float64))
        for logp, reference in zip(logp_B, reference_B, strict=True)
    ])  # fmt: skip


def token_sums(logp_S: Floats, reference_S: Floats, sequence_S: Ints, num_sequences: int) -> Doubles:
    """[B, X] sums over the tokens of each sequence, from which `token_statistics` come; sums of sequences add up.

    Args:
        sequence_S: to which sequence each token belongs, in any order.
    """
    sums_BX = np.zeros((num_sequences, len(_TERMS)))
    for start in range(0, len(logp_S), _CHUNK):
        part = slice(start, start + _CHUNK)
        terms_XS = _terms(logp_S[part], reference_S[part])
        for place, term_S in enumerate(terms_XS):
            sums_BX[:, place] += np.bincount(sequence_S[part], term_S, num_sequences)
    return sums_BX


def token_statistics(sums_X: Doubles) -> dict[str, Doubles]:
    """Every statistic that is a function of sums over tokens; leading dimensions of `sums_X` stay.

    num_tokens, nonfinite_fraction (tokens where either log-prob is no finite number: left out of all else)
    k1_nats, k2_nats, k3_nats, k3r_nats, js_nats, chi2, chi2_rev      see above;   renyi2_nats = log(1 + chi2)
    square_mean_nats2 = mean d^2         abs_mean_nats = mean |d|     exact_zero_fraction = mean 1[d = 0]
    ratio_mean = mean r, 1 if both are normalised over the same tokens;  ratio_se its standard error over independent tokens
    ess_token = (sum r)^2 / (n sum r^2)  mult_err = mean exp(|d|)     f_TAU = mean 1[|d| > log TAU]
    prob_abs_mean = mean |exp(log pi) - exp(log mu)|                  pearson = the correlation of these probabilities
    grid_fraction  share of the d != 0 that are multiples of 2^-10: near 1 where log-probs were rounded to a coarse format
    grid_step_nats the coarsest grid 2^-j, j = 3 .. 10, that holds at least half of the d != 0; nan where none does

    Returns:
        nan where a number is not defined, and inf where a sum overflows: |d| beyond 354 nats.
    """
    s = {name: sums_X[..., place] for name, place in _AT.items()}
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        n, moved = s["num"], s["num"] - s["zero"]
        second = s["ratio_square"] / n
        p_var, q_var = s["p_square"] / n - (s["p"] / n) ** 2, s["q_square"] / n - (s["q"] / n) ** 2
        covariance = s["p_q"] / n - s["p"] * s["q"] / n**2
        on_grid = np.stack([s[f"grid_{j}"] / moved for j in GRIDS], -1)
        step = np.exp2(-np.array(GRIDS)[np.argmax(on_grid >= 0.5, -1)].astype(np.float64))
        return {
            "num_tokens": n,
            "nonfinite_fraction": s["nonfinite"] / (n + s["nonfinite"]),
            "k1_nats": -s["d"] / n,
            "k2_nats": s["square"] / n / 2,
            "k3_nats": s["k3"] / n,
            "k3r_nats": s["k3r"] / n,
            "js_nats": s["js"] / n,
            "chi2": second - 1,
            "chi2_rev": s["inverse"] / n - 1,
            "renyi2_nats": np.log(second),
            "square_mean_nats2": s["square"] / n,
            "abs_mean_nats": s["size"] / n,
            "exact_zero_fraction": s["zero"] / n,
            "ratio_mean": s["ratio"] / n,
            "ratio_se": np.sqrt(np.maximum(second - (s["ratio"] / n) ** 2, 0) / n),
            "ess_token": s["ratio"] ** 2 / (n * s["ratio_square"]),
            "mult_err": s["mult"] / n,
            **{f"f_{tau}": s[f"f_{tau}"] / n for tau in TAUS},
            "prob_abs_mean": s["p_gap"] / n,
            "pearson": covariance / np.sqrt(np.where((p_var > 0) & (q_var > 0), p_var * q_var, np.nan)),
            "grid_fraction": on_grid[..., -1],
            "grid_step_nats": np.where(on_grid[..., -1] >= 0.5, step, np.nan),
        }


@dataclass(frozen=True, kw_only=True)
class TokenGap:
    """Sums and bins over tokens: those of two parts add up to those of the whole."""

    sums_X: Doubles
    """The terms of `token_statistics`."""
    abs_max: float
    prob_abs_max: float
    histogram: Counts
    """[2, bins] tokens by |d| (`EDGES`): those with d < 0, and those with d > 0."""

    @classmethod
    def of(cls, logp_S: Floats, reference_S: Floats) -> TokenGap:
        """Of one batch of tokens."""
        finite = np.isfinite(logp_S) & np.isfinite(reference_S)
        p, q = logp_S[finite].astype(np.float64), reference_S[finite].astype(np.float64)
        d = p - q
        bins = _bins(np.abs(d))
        return cls(
            sums_X=token_sums(logp_S, reference_S, np.zeros(len(logp_S), np.int32), 1)[0],
            abs_max=float(np.abs(d).max(initial=0)),
            prob_abs_max=float(np.abs(np.exp(p) - np.exp(q)).max(initial=0)),
            histogram=np.stack(
                [np.bincount(bins[side], minlength=len(EDGES) - 1) for side in (d < 0, d > 0)]
            ),
        )

    def __add__(self, other: TokenGap) -> TokenGap:
        return TokenGap(
            sums_X=self.sums_X + other.sums_X,
            abs_max=max(self.abs_max, other.abs_max),
            prob_abs_max=max(self.prob_abs_max, other.prob_abs_max),
            histogram=self.histogram + other.histogram,
        )

    def quantile(self, q: float) -> float:
        """Of |d|, nats: the ceil(q n)-th smallest, up to a factor of 2^(1/64), 1.1 %, within 2^-34 .. 2^8 nats."""
        rank = max(math.ceil(q * self.sums_X[_AT["num"]]), 1)
        zeros = int(self.sums_X[_AT["zero"]])
        if rank <= zeros:
            return 0.0
        place = int(np.searchsorted(np.cumsum(self.histogram.sum(0)), rank - zeros))
        return min(float(np.sqrt(EDGES[place] * EDGES[place + 1])), self.abs_max)

    def statistics(self) -> dict[str, float]:
        """`token_statistics` as far as they are finite, and of |d| and |exp(log pi) - exp(log mu)|:

        abs_p50_nats, abs_p90_nats, abs_p99_nats, abs_p999_nats (`quantile`), abs_max_nats, prob_abs_max
        tail_index  Hill's estimate on the largest 0.5 %, at least 10: P(|d| > x) ~ x^-index; below 2 a variance means nothing
        """
        found = finite_only({name: float(x) for name, x in token_statistics(self.sums_X).items()})
        if not found["num_tokens"]:
            return found
        quantiles = {
            f"abs_{name}_nats": self.quantile(q)
            for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999))
        }
        ends = {"abs_max_nats": self.abs_max, "prob_abs_max": self.prob_abs_max}
        return found | quantiles | ends | self._tail_index()

    def _tail_index(self) -> dict[str, float]:
        counts = self.histogram.sum(0)[::-1]
        wanted = max(_TAIL * float(self.sums_X[_AT["num"]]), _LEAST_TAIL)
        reached = np.flatnonzero(np.cumsum(counts) >= wanted)
        if not len(reached):
            return {}
        tail = counts[: reached[0] + 1]
        # Of a value in its bin nothing is known but the middle: log(x / x_k) is a number of half bins.
        log_excess = (np.arange(reached[0], -1, -1) + 0.5) * math.log(2) / _PER_OCTAVE
        return {"tail_index": float(tail.sum() / (tail * log_excess).sum())}


def sequence_statistics(sums_BX: Doubles) -> dict[str, float]:
    """What a sequence-level weight W = exp(D) sees, with D = sum of d over the T tokens of a sequence (`token_sums`).

    seq_num; seq_nats_mean, _std, _p05, _p50, _p95, _min, _max, _abs_max          of D
    seq_geo_mean_nats, seq_geo_abs_max_nats   of D / T            ppl_ratio = mean exp(-D / T)      log_ppl_abs_nats = mean |D / T|
    seq_slope_nats     sum D T / sum T^2: of D on T through 0, should be -KL(mu || pi)
    seq_length_p95     of T                 seq_budget_nats    k3 seq_length_p95: expected loss of log W on a long sequence
    ess_seq            (sum W)^2 / (B sum W^2)    renyi2_seq_nats  log(1 + chi2_seq)    chi2_seq  E W^2 - 1, where it has a number
    seq_top_weight     largest share of sum W^2: above 0.5 one sequence alone makes chi2_seq
    seq_outlier_fraction, seq_outlier_k2_share    sequences with mult_err > 2, and their share of sum d^2

    All of W are computed in log space.  Sequences without tokens count for nothing.
    """
    sums_BX = sums_BX[sums_BX[:, _AT["num"]] > 0]
    if not len(sums_BX):
        return {}
    nats, tokens, square = (sums_BX[:, _AT[name]] for name in ("d", "num", "square"))
    geo = nats / tokens
    log_second = _log_mean_exp(2 * nats)
    outlier = sums_BX[:, _AT["mult"]] / tokens > OUTLIER
    length_p95 = float(np.quantile(tokens, 0.95))
    with np.errstate(over="ignore"):
        return finite_only({
            "seq_num": float(len(nats)),
            "seq_nats_mean": float(nats.mean()),
            "seq_nats_std": float(nats.std()),
            **{f"seq_nats_p{p:02}": float(np.quantile(nats, p / 100)) for p in (5, 50, 95)},
            "seq_nats_min": float(nats.min()),
            "seq_nats_max": float(nats.max()),
            "seq_nats_abs_max": float(np.abs(nats).max()),
            "seq_geo_mean_nats": float(geo.mean()),
            "seq_geo_abs_max_nats": float(np.abs(geo).max()),
            "ppl_ratio": float(np.exp(-geo).mean()),
            "log_ppl_abs_nats": float(np.abs(geo).mean()),
            "seq_slope_nats": float((nats * tokens).sum() / np.square(tokens).sum()),
            "seq_length_p95": length_p95,
            "seq_budget_nats": float(sums_BX[:, _AT["k3"]].sum() / tokens.sum() * length_p95),
            "ess_seq": effective_fraction(nats),
            "renyi2_seq_nats": log_second,
            "chi2_seq": float(np.expm1(log_second)),
            "seq_top_weight": float(np.exp(2 * nats.max() - log_second) / len(nats)),
            "seq_outlier_fraction": float(outlier.mean()),
            "seq_outlier_k2_share": _share(square[outlier], square),
        })  # fmt: skip


def phi_statistics(nats_B: Doubles, k: tuple[float, float], lam: tuple[float, float]) -> dict[str, float]:
    """VESPO's kernel where log W is `nats_B` alone: phi_pos_ and phi_neg_ mean, p50, p05, each over all sequences.

    Args:
        k, lam: of A >= 0 and A < 0 (VespoConfig).
    """
    found: dict[str, float] = {}
    for sign, power, rate in zip(("pos", "neg"), k, lam, strict=True):
        phi = log_phi(torch.from_numpy(nats_B), power, rate).exp().numpy()
        found |= {f"phi_{sign}_mean": float(phi.mean())}
        found |= {f"phi_{sign}_p{p:02}": float(np.quantile(phi, p / 100)) for p in (50, 5)}
    return found


def growth_exponent(gap_S: Doubles, num_B: Ints) -> float | None:
    """H of std(sum of the first t gaps) ~ t^H over sequences: 0.5 for independent tokens, 1 for one error per sequence.

    The least-squares slope of log std on log t at t = 1, 2, 4, ... up to the median length, over the sequences that reach it.

    Args:
        gap_S: d of the tokens of all sequences, one after the other.

    Returns:
        None for fewer than 8 sequences of at least 4 tokens, or gaps that do not vary.
    """
    points = (
        2 ** np.arange(int(np.log2(np.median(num_B))) + 1) if len(num_B) and np.median(num_B) >= 1 else []
    )
    chosen = np.flatnonzero(num_B >= points[-1]) if len(points) else np.zeros(0, np.int64)
    if len(points) < 3 or len(chosen) < 8:
        return None
    total = np.concatenate([[0.0], np.cumsum(gap_S)])
    start_B = np.cumsum(num_B) - num_B
    spread = np.array([(total[start_B[chosen] + t] - total[start_B[chosen]]).std() for t in points])
    return float(np.polyfit(np.log(points), np.log(spread), 1)[0]) if (spread > 0).all() else None


def robust_line(x_S: Doubles, y_S: Doubles) -> tuple[float, float] | None:
    """(slope, intercept) of y = intercept + slope x by Huber's loss, its bend at 1.345 robust standard deviations.

    Returns:
        None for fewer than 3 points or x that do not vary.
    """
    if len(x_S) < 3 or np.ptp(x_S) == 0:
        return None
    center = float(x_S.mean())
    x, weight = x_S - center, np.ones(len(x_S))
    slope, middle = 1.0, 0.0
    for _ in range(30):  # iteratively reweighted least squares
        x_mean, y_mean = np.average(x, weights=weight), np.average(y_S, weights=weight)
        before, slope = (
            slope,
            float((weight * (x - x_mean) * (y_S - y_mean)).sum() / (weight * (x - x_mean) ** 2).sum()),
        )
        middle = float(y_mean - slope * x_mean)
        size = np.abs(y_S - middle - slope * x)
        bend = 1.345 * 1.4826 * float(np.median(size))
        if bend == 0 or abs(slope - before) < 1e-9:
            break
        weight = np.minimum(1.0, bend / np.maximum(size, bend))
    return slope, middle - slope * center


def surprise(logp_S: Floats, entropy_S: Floats) -> tuple[float, float]:
    """Mean and standard error of -logp - entropy, nats: 0 if the tokens were sampled from the distribution with that entropy.

    A truncated (top-p) or a colder sampling distribution makes it negative, a hotter one positive, even where both engines
    report the same log-probs.
    """
    excess = -logp_S.astype(np.float64) - entropy_S.astype(np.float64)
    return float(excess.mean()), float(excess.std() / math.sqrt(len(excess)))


def bf16_fraction(logp_S: Floats) -> float | None:
    """Share of the log-probs != 0 that bfloat16 holds exactly: 1 / 65536 by chance, 1 where a log-softmax was rounded to it."""
    moved = logp_S[logp_S != 0].astype(np.float32)
    return float((moved.view(np.uint32) & 0xFFFF == 0).mean()) if len(moved) else None


def correlation(x_N: Doubles, y_N: Doubles) -> float | None:
    """Pearson's, over the pairs where both are finite; None for fewer than 3, or where one side does not vary."""
    both = np.isfinite(x_N) & np.isfinite(y_N)
    x, y = x_N[both], y_N[both]
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def bootstrap(
    sums_BX: Doubles, statistic: Statistic, *, num: int = 200, level: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of statistics of sums, by drawing whole sequences anew: tokens of one are not independent.

    Args:
        sums_BX: what each sequence adds to the sums, in any units.
        statistic: of sums [num, X], one number each (`token_statistics`).

    Returns:
        (low, high) of every statistic whose draws are all finite; empty for fewer than 2 sequences.
    """
    size = len(sums_BX)
    if size < 2:
        return {}
    rng = np.random.default_rng(seed)
    drawn = np.stack(
        [np.bincount(rng.integers(size, size=size), minlength=size) @ sums_BX for _ in range(num)]
    )
    tails = ((1 - level) / 2, (1 + level) / 2)
    return {
        name: (float(low), float(high))
        for name, values in statistic(drawn).items()
        if np.isfinite(values).all()
        for low, high in [np.quantile(values, tails)]
    }


def finite_only(numbers: Mapping[str, float | None]) -> dict[str, float]:
    """Those that are numbers: what is not defined is left out."""
    return {name: float(x) for name, x in numbers.items() if x is not None and math.isfinite(x)}


def _terms(logp_S: Floats, reference_S: Floats) -> list[Doubles]:
    """What each token adds to the sums, in the order of _TERMS."""
    finite: Mask = np.isfinite(logp_S) & np.isfinite(reference_S)
    log_p = np.where(finite, logp_S, 0).astype(np.float64)
    log_q = np.where(finite, reference_S, 0).astype(np.float64)
    d = log_p - log_q
    size, p, q = np.abs(d), np.exp(log_p), np.exp(log_q)
    with np.errstate(over="ignore", invalid="ignore"):
        r, x = np.exp(d), np.expm1(d)
        terms = {
            "num": finite, "zero": d == 0, "d": d, "size": size, "square": d * d,
            "k3": x - d, "k3r": r * d - x, "js": (r * d - (2 + x) * np.log1p(x / 2)) / 2,
            "ratio": r, "ratio_square": r * r, "inverse": np.exp(-d), "mult": np.exp(size),
            "p_gap": np.abs(p - q), "p": p, "q": q, "p_square": p * p, "q_square": q * q, "p_q": p * q,
            **{f"f_{name}": size > math.log(tau) for name, tau in TAUS.items()},
            **{f"grid_{j}": (d != 0) & (np.ldexp(d, j) % 1 == 0) for j in GRIDS},
        }  # fmt: skip
    return [~finite * 1.0 if name == "nonfinite" else np.where(finite, terms[name], 0.0) for name in _TERMS]


def _bins(size_S: Doubles) -> Counts:
    """The bin of each |d|."""
    with np.errstate(divide="ignore"):
        place = np.floor(np.log2(size_S) * _PER_OCTAVE) - _OCTAVES[0] * _PER_OCTAVE
    return np.clip(place, 0, len(EDGES) - 2).astype(np.int64)


def _log_mean_exp(x_N: Doubles) -> float:
    largest = x_N.max()
    return float(largest + np.log(np.exp(x_N - largest).mean()))


def _share(part: Doubles, whole: Doubles) -> float:
    return float(part.sum() / whole.sum()) if whole.any() else 0.0
