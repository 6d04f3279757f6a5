"""Coefficients: how much of A * grad log pi each token is worth off policy.

Every algorithm is one function from detached log-ratios to one detached coefficient per token, the factor c in

    grad J = E[ sum_t c_t A grad log pi(y_t) ].

`policy_loss` in loss.py is the only place that is differentiated.  Each function states c and the published surrogate
whose gradient it is.  r is the token's ratio pi / reference, W the product of the ratios of a whole response, T their
number.

Shape key:  S response tokens, N sequences: of one microbatch, or of a whole update where an algorithm needs to see that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vespo.algo import kernel
from megatron_vespo.algo.correction import correction
from megatron_vespo.config import AlgorithmConfig


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """Log importance ratios; nothing here carries gradient."""

    log_ratio_S: Tensor
    """log r_t = log pi(y_t) - log reference(y_t), nats."""
    log_w_N: Tensor
    """float64: log W, the sum of log r over each *whole* response, complete across context-parallel ranks."""
    num_tokens_N: Tensor
    """float64: T of each whole response."""
    seq_S: Tensor
    """int64: the sequence that each token belongs to."""
    log_rho_S: Tensor | None = None
    """log rho_t = log reference(y_t) - log mu(y_t), where the reference is not what sampled."""
    log_rho_N: Tensor | None = None
    """float64: the sum of log rho over each whole response."""
    noise_variance: float = 0.0
    """sigma^2 of one token's log mu by the engine's arithmetic, nats^2."""


def vespo(ratios: Ratios, advantage_N: Tensor, algorithm: AlgorithmConfig) -> Tensor:
    """c = phi(W) of the token's sequence (VESPO, arXiv 2602.10693, eq. 14).

        phi(W) = W^k exp(lam (1 - W))      (k, lam) by the sign of the advantage, A >= 0 first

    The gradient of E_mu[f(W) A], f' = phi / W (`kernel.surrogate`).  W is that of the whole sequence, without any
    normalisation by length.  The caller refuses a log W that is not finite.

    Returns:
        [S] float64.
    """
    cfg = algorithm.vespo
    log_w_N = ratios.log_w_N
    if cfg.noise_aware:
        log_w_N = kernel.denoised(log_w_N, ratios.num_tokens_N, ratios.noise_variance)
    if cfg.length_exponent:
        log_w_N = log_w_N / ratios.num_tokens_N**cfg.length_exponent
    positive_N = advantage_N >= 0
    # Only what has a gradient is adapted to.
    informs_N = (advantage_N != 0) & (ratios.num_tokens_N > 0)
    lam = cfg.lam
    if cfg.budget is not None:
        lam = _solved_lam(log_w_N[informs_N], advantage_N[informs_N], algorithm)
    log_phi_N = kernel.log_phi(log_w_N, _by_sign(cfg.k, positive_N), _by_sign(lam, positive_N))
    if cfg.ess_target is not None and informs_N.any():
        log_phi_N = kernel.tempered(log_phi_N[informs_N], cfg.ess_target) * log_phi_N
    return log_phi_N.exp()[ratios.seq_S]


def reinforce(ratios: Ratios, advantage_N: Tensor, algorithm: AlgorithmConfig) -> Tensor:
    """c = 1: no correction.  With advantage 1 this is the gradient of supervised fine-tuning."""
    return torch.ones_like(ratios.log_ratio_S)


def importance_sampling(ratios: Ratios, advantage_N: Tensor, algorithm: AlgorithmConfig) -> Tensor:
    """c = W: the gradient of E_mu[W A], unbiased, of unbounded variance.

    W ends at exp(600): a sequence without advantage has nothing to multiply infinity with, and sums over its tokens must be
    finite.
    """
    return ratios.log_w_N.clamp(max=600).exp()[ratios.seq_S]


def seq_tis(ratios: Ratios, advantage_N: Tensor, algorithm: AlgorithmConfig) -> Tensor:
    """c = min(W, C): truncated importance sampling of whole sequences (Ionides 2008)."""
    return ratios.log_w_N.exp().clamp(max=algorithm.seq_tis.max_weight)[ratios.seq_S]


def seq_mis(ratios: Ratios, advantage_N: Tensor, algorithm: AlgorithmConfig) -> Tensor:
    """c = W where low <= W <= high, else 0: masked importance sampling of whole sequences."""
    low, high = algorithm.seq_mis.band
    w_N = ratios.log_w_N.exp()
    return torch.where((w_N >= low) & (w_N <= high), w_N, 0.0)[ratios.seq_S]


def topr(ratios: Ratios, advantage_N: Tensor, algorithm: AlgorithmConfig) -> Tensor:
    """c = 1 where A >= 0, min(W, 1) where A < 0 (TOPR, arXiv 2503.14286): negative samples fade as they become unlikely."""
    return torch.where(advantage_N >= 0, 1.0, ratios.log_w_N.exp().clamp(max=1.0))[ratios.seq_S]


def grpo(ratios: Ratios, advantage_N: Tensor, algorithm: AlgorithmConfig) -> Tensor:
    """c = r where the clipped surrogate has a slope, else 0 (PPO's clip; DAPO, arXiv 2503.14476; dual clip, arXiv 1912.09729).

    The gradient of  min(r A, clip(r, 1 - low, 1 + high) A), and of no less than  dual_clip A  where A < 0:
    c = r for r <= 1 + high where A > 0, for 1 - low <= r <= dual_clip where A < 0.
    """
    (low, high), dual_clip = algorithm.grpo.clip, algorithm.grpo.dual_clip
    bounds = (1 - low, 1 + high, dual_clip)
    return _within_clip(ratios.log_ratio_S.exp(), advantage_N[ratios.seq_S], *bounds)


def gspo(ratios: Ratios, advantage_N: Tensor, algorithm: AlgorithmConfig) -> Tensor:
    """c = s = W^(1/T) of the token's sequence where its clipped surrogate has a slope, else 0 (GSPO, arXiv 2507.18071).

    The gradient of  min(s A, clip(s, 1 - low, 1 + high) A)  for each token of the sequence; in W the band grows with T.
    """
    low, high = algorithm.gspo.clip
    s_N = (ratios.log_w_N / ratios.num_tokens_N).exp()
    return _within_clip(s_N, advantage_N, 1 - low, 1 + high, float("inf"))[ratios.seq_S]


def sapo(ratios: Ratios, advantage_N: Tensor, algorithm: AlgorithmConfig) -> Tensor:
    """c = 4 r g (1 - g) with the gate g = sigmoid(tau (r - 1)), tau by the sign of A, A > 0 first (SAPO, arXiv 2511.20347).

    The gradient of  (4 / tau) g A: 1 at r = 1, linear in r near 0, and falling for large r.
    """
    r_S = ratios.log_ratio_S.exp()
    tau_S = _by_sign(algorithm.sapo.tau, advantage_N > 0)[ratios.seq_S]
    # sigmoid(x) sigmoid(-x) = g (1 - g) keeps its digits where g rounds to 1, and is 0 where r overflows.
    x_S = tau_S * torch.expm1(ratios.log_ratio_S)
    gate_S = x_S.sigmoid() * (-x_S).sigmoid()
    return torch.where(gate_S > 0, 4 * r_S * gate_S, 0.0)


def cispo(ratios: Ratios, advantage_N: Tensor, algorithm: AlgorithmConfig) -> Tensor:
    """c = min(r, max_ratio): no token loses its gradient (CISPO of MiniMax-M1, arXiv 2506.13585)."""
    return ratios.log_ratio_S.exp().clamp(max=algorithm.cispo.max_ratio)


def bapo(ratios: Ratios, advantage_N: Tensor, algorithm: AlgorithmConfig) -> Tensor:
    """GRPO's c with the bounds of this update, chosen so that positive samples have their share (BAPO, arXiv 2510.18927).

    While  P / |M| < min_positive  the lower bound is raised, then the upper one, in steps up to their last values, where
    P and M are the sums over all tokens of the update of  min(r, high) A  for A > 0 and  max(r, low) A  for A < 0.
    Tokens count alike in both sums.  M grows with the lower bound, so that this one always ends at its last value before the
    upper one moves.  Must be given the whole update.
    """
    cfg = algorithm.bapo
    r_S, advantage_S = ratios.log_ratio_S.exp(), advantage_N[ratios.seq_S]
    low, high = cfg.low[0], cfg.high[0]

    def unbalanced() -> bool:
        positive = (r_S.clamp(max=high) * advantage_S)[advantage_S > 0].sum()
        negative = (r_S.clamp(min=low) * -advantage_S)[advantage_S < 0].sum()
        return bool(positive < cfg.min_positive * negative)

    while low < cfg.low[1] and unbalanced():
        low = min(low + cfg.step, cfg.low[1])
    while high < cfg.high[1] and unbalanced():
        high = min(high + cfg.step, cfg.high[1])
    return _within_clip(r_S, advantage_S, low, high, cfg.dual_clip)


def m2po(ratios: Ratios, advantage_N: Tensor, algorithm: AlgorithmConfig) -> Tensor:
    """c = r, 0 for the tokens with the largest (log r)^2: as few as leave a mean over the others of at most tau (M2PO,
    arXiv 2510.01161).

    The second moment of log r bounds the variance of r, and one outlier does not silence its sequence.  Must be given
    the whole update.
    """
    square_S = ratios.log_ratio_S.square()
    ascending, order = square_S.sort()
    means = ascending.cumsum(0) / torch.arange(1, len(ascending) + 1, device=ascending.device)
    within = means <= algorithm.m2po.max_second_moment  # means rise: these are the first ones
    counts_S = torch.empty_like(within).scatter_(0, order, within)
    return torch.where(counts_S, ratios.log_ratio_S.exp(), 0.0)


@torch.no_grad()
def coefficient(algorithm: AlgorithmConfig, ratios: Ratios, advantage_N: Tensor) -> Tensor:
    """The configured algorithm's coefficient times the engine's correction, [S], detached, in the dtype of `log_ratio_S`.

    Args:
        ratios: of the whole update where `algorithm.needs_whole_update`.
    """
    c_S = COEFFICIENTS[algorithm.name](ratios, advantage_N, algorithm)
    if algorithm.correction.kind != "none":
        assert ratios.log_rho_S is not None and ratios.log_rho_N is not None
        c_S = c_S * correction(
            algorithm.correction, ratios.log_rho_S, ratios.log_rho_N / ratios.num_tokens_N, ratios.seq_S
        )
    return c_S.to(ratios.log_ratio_S.dtype)


def _by_sign(pair: tuple[float, float], positive_N: Tensor) -> Tensor:
    """float64: pair[0] where positive, else pair[1]."""
    return torch.tensor(pair, dtype=torch.float64, device=positive_N.device)[(~positive_N).long()]


def _within_clip(ratio: Tensor, advantage: Tensor, low: float, high: float, dual_clip: float) -> Tensor:
    """The ratio where the surrogate of PPO's clip has a slope in it, else 0."""
    lives_positive = (advantage > 0) & (ratio <= high)
    lives_negative = (advantage < 0) & (ratio >= low) & (ratio <= dual_clip)
    return torch.where(lives_positive | lives_negative, ratio, 0.0)


def _solved_lam(log_w_N: Tensor, advantage_N: Tensor, algorithm: AlgorithmConfig) -> tuple[float, float]:
    """lam of the budget for A > 0 and A < 0; that of the configuration for a sign without sequences."""
    cfg = algorithm.vespo
    assert cfg.budget is not None
    positive, negative = log_w_N[advantage_N > 0], log_w_N[advantage_N < 0]
    return (
        kernel.solved_lam(positive, cfg.k[0], cfg.budget) if len(positive) else cfg.lam[0],
        kernel.solved_lam(negative, cfg.k[1], cfg.budget) if len(negative) else cfg.lam[1],
    )


COEFFICIENTS: dict[str, Callable[[Ratios, Tensor, AlgorithmConfig], Tensor]] = {
    "vespo": vespo,
    "reinforce": reinforce,
    "importance_sampling": importance_sampling,
    "seq_tis": seq_tis,
    "seq_mis": seq_mis,
    "topr": topr,
    "grpo": grpo,
    "gspo": gspo,
    "sapo": sapo,
    "cispo": cispo,
    "bapo": bapo,
    "m2po": m2po,
}
