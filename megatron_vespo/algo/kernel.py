"""VESPO's kernel phi: the closed form, its surrogate, and what may be done with it beyond the paper.

The variational problem (arXiv 2602.10693 v3, section 3)

    min_Q  KL(Q || mu) - k E_Q[log W]      subject to  E_Q[W] <= C

has the solution  Q ~ mu W^k exp(-lam W),  with lam the multiplier of the budget C.  As a weight of samples from mu,
scaled to 1 at W = 1, that is

    phi(W) = W^k exp(lam (1 - W)).

The paper fixes (k, lam) by the sign of the advantage; `solved_lam` solves for lam instead, `tempered` flattens phi.

Shape key:  N sequences.  Everything is float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_vespo.algo.statistics import effective_fraction

_LAM_RANGE = (0.1, 20.0)
"""Of a solved lam: below, phi is hardly bounded; above, hardly a sequence lives."""
_LEAST_POWER = 0.1
"""Of a tempered phi: below, it hardly depends on W any more, and at 0 dead sequences would count in full."""
_DRIFT_VARIANCE = 1.0
"""Of log W by the policy's own drift, as `denoised` expects it: the width of the band in which phi lives."""


def log_phi(log_w: Tensor, k: Tensor | float, lam: Tensor | float) -> Tensor:
    """log phi(W) = k x - lam (exp(x) - 1) with x = log W (VESPO, eq. 14).

    It stays in log space, so that no clamp is needed: W = exp(+-1e4) gives phi = 0, and phi(1) = 1 exactly.
    The largest value of phi, (k / lam)^k exp(lam - k), is at W = k / lam.
    """
    return k * log_w - lam * log_w.expm1()


def surrogate(w: Tensor, k: float, lam: float) -> Tensor:
    """f with f'(W) = phi(W) / W: the gradient with coefficient phi is the true gradient of E_mu[f(W) A].

        f(W) = exp(lam) lam^-k gamma(k, lam W)      gamma: the lower incomplete gamma function

    Because grad W = W grad log pi.  It saturates at exp(lam) Gamma(k) / lam^k.  For plots and tests, k > 0.
    """
    shape = torch.as_tensor(k, dtype=w.dtype)
    return math.exp(lam + math.lgamma(k)) * lam**-k * torch.igamma(shape, lam * w)


def solved_lam(log_w_N: Tensor, k: float, budget: float) -> float:
    """The multiplier of the budget: the least lam in [0.1, 20] with E_Q[W] <= C, Q ~ W^k exp(-lam W) over the samples.

    Lam maximises the concave dual g(lam) = -log E_mu[W^k exp(-lam W)] - lam C, whose derivatives are

        g' = E_Q[W] - C      g'' = -Var_Q[W]

    so Newton's step is lam += (E_Q[W] - C) / Var_Q[W]; a bracket that shrinks at every step keeps it from leaving.
    """
    low, high = _LAM_RANGE
    if _tilted_moments(log_w_N, k, low)[0] <= budget:
        return low
    if _tilted_moments(log_w_N, k, high)[0] >= budget:
        return high
    lam = (low + high) / 2
    for _ in range(100):
        mean, variance = _tilted_moments(log_w_N, k, lam)
        low, high = (lam, high) if mean > budget else (low, lam)
        newton = lam + (mean - budget) / variance if variance > 0 else math.inf
        following = newton if low < newton < high else (low + high) / 2
        if abs(following - lam) <= 1e-12 * lam:
            break
        lam = following
    return lam


def _tilted_moments(log_w_N: Tensor, k: float, lam: float) -> tuple[float, float]:
    """E_Q[W] and Var_Q[W] of Q ~ W^k exp(-lam W), lam > 0, without overflow."""
    q_N = torch.softmax(k * log_w_N - lam * log_w_N.exp(), 0)
    lives = q_N > 0  # a W that overflows has none
    q_N, w_N = q_N[lives], log_w_N[lives].exp()
    mean = (q_N * w_N).sum()
    return float(mean), float((q_N * (w_N - mean).square()).sum())


def tempered(log_phi_N: Tensor, ess_target: float) -> float:
    """The greatest s in [0.1, 1] for which phi^s, the kernel of (s k, s lam), keeps an effective sample size of `ess_target`.

        ESS(s) / n = (sum phi^s)^2 / (n sum phi^2s)      falls as s grows

    Where even s = 0.1 keeps less, it is 0.1: so much data has died that no kernel should bring it back.
    """
    log_phi = log_phi_N.cpu().numpy()
    low, high = _LEAST_POWER, 1.0
    if effective_fraction(log_phi) >= ess_target:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        reached = effective_fraction(middle * log_phi) >= ess_target
        low, high = (middle, high) if reached else (low, middle)
    return low


def denoised(log_w_N: Tensor, num_tokens_N: Tensor, noise_variance: float) -> Tensor:
    """log W as it would be without the engine's noise of variance sigma^2 per token, as far as it can be known.

    If two engines differ by independent noise of variance s = sigma^2 T over a sequence that mu sampled, log W contains
    e ~ N(-s / 2, s): the mean is -KL(mu || pi).  With a drift d ~ N(0, 1) of the policy itself, log W = d + e and

        E[d | log W] = (log W + s / 2) / (1 + s).

    Of such a sequence log W + s / 2 is N(0, 1 + s), so that the estimate is N(0, 1 / (1 + s)): as sigma^2 T grows it goes to
    0, and what cannot be known is not corrected.
    """
    noise_N = noise_variance * num_tokens_N
    return _DRIFT_VARIANCE * (log_w_N + noise_N / 2) / (_DRIFT_VARIANCE + noise_N)
