"""One update in numbers: how much of its data still counts, for which sign of the advantage, and for how few sequences.

Everything is computed from one log W, one mean coefficient and one advantage of each sequence, which are summed over all
ranks once: exact numbers of the whole update, and no means of means.  Histograms have fixed bins, so that those of
several steps or runs add up.

Shape key:  N sequences of one update, or of all updates on a batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron_vespo.types import Doubles, Ints

HISTOGRAM_EDGES = np.arange(-8.0, 8.01, 0.25)
"""Of log W, nats; the first and the last bin are open."""
DEAD = 0.01
"""A coefficient below this counts for nothing."""
_NUM_TOP = 8

Statistics = dict[str, float | list[float] | list[int]]


def effective_fraction(log_weight_N: Doubles) -> float:
    """ESS / n = (sum w)^2 / (n sum w^2) of weights given by their logarithms, without overflow.

    Returns:
        From 1 / n to 1; 0 where every weight is 0.
    """
    largest = log_weight_N.max()
    if largest == -np.inf:
        return 0.0
    w = np.exp(log_weight_N - largest)
    return float(w.sum() ** 2 / (len(w) * np.square(w).sum()))


def effective_fraction_of(weight_N: Doubles) -> float:
    """The same of weights >= 0 themselves."""
    with np.errstate(divide="ignore"):  # log 0
        return effective_fraction(np.log(weight_N))


def weight_statistics(
    log_w_N: Doubles, coefficient_N: Doubles, advantage_N: Doubles, weight_N: Doubles
) -> Statistics:
    """What the importance weights of some sequences do to their update.

    By sign of the advantage, `pos` A > 0 and `neg` A < 0, where there are any:

        log_w_SIGN_mean, _std, _p01, _p50, _p99, _histogram     of log W, nats
        phi_SIGN_mean, _std                                     of the coefficient c
        tilted_w_SIGN       E_Q[W] = sum c W / sum c, the budget C that this c amounts to (VESPO, section 3)
                            where the kernel takes W itself

    Of all sequences that have an advantage:

        phi_mean            of the coefficient
        ess_fraction        (sum W)^2 / (n sum W^2), in (0, 1]
        ess_phi_fraction    the same of c
        dead_fraction       share with c < 0.01
        net_advantage       sum c A / sum |c A|: 0 on policy, +1 where only reinforcement is left
        top1pct_share       share of sum |g|, g = weight c A, that the largest 1 % of the sequences hold (at least one)
        top_sequences       the places of the 8 largest |g|, in descending order

    Args:
        weight_N: a sequence's share of the update at c = 1: its token weight times its tokens.

    Returns:
        Empty where no sequence has an advantage.
    """
    has_signal = np.flatnonzero(advantage_N)
    if not len(has_signal):
        return {}
    log_w, c, advantage = log_w_N[has_signal], coefficient_N[has_signal], advantage_N[has_signal]
    statistics: Statistics = {}
    for sign, chosen in (("pos", advantage > 0), ("neg", advantage < 0)):
        if chosen.any():  # a mean over no sequence is no number: the key is left out
            statistics |= _of_one_sign(sign, log_w[chosen], c[chosen])
    net = c * advantage
    size = weight_N[has_signal] * np.abs(net)
    descending = np.argsort(-size, kind="stable")
    total = size.sum()
    return statistics | {
        "phi_mean": float(c.mean()),
        "ess_fraction": effective_fraction(log_w),
        "ess_phi_fraction": effective_fraction_of(c),
        "dead_fraction": float((c < DEAD).mean()),
        "net_advantage": float(net.sum() / np.abs(net).sum()) if c.any() else 0.0,
        "top1pct_share": float(size[descending[: -(-len(c) // 100)]].sum() / total) if total else 0.0,
        "top_sequences": [int(i) for i in has_signal[descending[:_NUM_TOP]]],
    }


def _of_one_sign(sign: str, log_w: Doubles, c: Doubles) -> Statistics:
    p01, p50, p99 = np.quantile(log_w, (0.01, 0.5, 0.99))
    bins = np.clip(np.digitize(log_w, HISTOGRAM_EDGES), 1, len(HISTOGRAM_EDGES) - 1) - 1
    statistics: Statistics = {
        f"log_w_{sign}_mean": float(log_w.mean()),
        f"log_w_{sign}_std": float(log_w.std()),
        f"log_w_{sign}_p01": float(p01),
        f"log_w_{sign}_p50": float(p50),
        f"log_w_{sign}_p99": float(p99),
        f"log_w_{sign}_histogram": [int(n) for n in np.bincount(bins, minlength=len(HISTOGRAM_EDGES) - 1)],
        f"phi_{sign}_mean": float(c.mean()),
        f"phi_{sign}_std": float(c.std()),
    }
    lives = c > 0
    if lives.any():
        # c W / c, with the largest W taken out of both sums: W may overflow where c is 0 only.
        scale = log_w[lives].max()
        mean = (c[lives] * np.exp(log_w[lives] - scale)).sum() / c[lives].sum()
        tilted = np.log(mean) + scale
        if tilted < np.log(np.finfo(np.float64).max):
            statistics[f"tilted_w_{sign}"] = float(np.exp(tilted))
    return statistics


def by_lag(log_w_N: Doubles, lag_N: Ints) -> Mapping[str, list[float] | list[int]]:
    """log W of sequences by how many versions old they are, one number for each lag from 0 to the largest.

    Returns:
        count, mean and std (nats) of each lag; 0 where its count is 0.
    """
    count = np.bincount(lag_N)
    divisor = np.maximum(count, 1)
    mean = np.bincount(lag_N, log_w_N) / divisor
    variance = np.bincount(lag_N, np.square(log_w_N - mean[lag_N])) / divisor
    return {
        "log_w_lag_count": [int(n) for n in count],
        "log_w_lag_mean": [float(x) for x in mean],
        "log_w_lag_std": [float(x) for x in np.sqrt(variance)],
    }
