"""Coefficients: how much of A * grad log pi each token is worth off policy.

Every algorithm is one function from detached log-ratios to one detached coefficient per token;
`policy_loss` in loss.py is the only place that is differentiated.

Shape key:  S response tokens of one microbatch, N its sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vespo.config import AlgorithmConfig


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """Log importance ratios of one microbatch; nothing here carries gradient."""

    log_ratio_S: Tensor
    """log pi(y_t) - log mu(y_t), nats."""
    log_w_N: Tensor
    """float64: sum of log_ratio over each *whole* response, complete across context-parallel ranks."""
    seq_S: Tensor
    """int64: the sequence that each token belongs to."""


def vespo(ratios: Ratios, advantage_N: Tensor, algorithm: AlgorithmConfig) -> Tensor:
    """phi(W) of the token's sequence (VESPO, arXiv 2602.10693, section 3).

        phi(W) = W^k exp(lam (1 - W)),   log phi = k x - lam (exp(x) - 1),   x = log W

    (k, lam) is chosen by the sign of the advantage, A >= 0 first.  The formula stays in log space until the
    last exp: W = exp(+-1e4) gives 0, phi(1) = 1 exactly, and no clamp is needed.  The caller refuses a log W
    that is not finite.

    Returns:
        [S] float64.
    """
    positive_N = advantage_N >= 0
    k_N = _by_sign(algorithm.vespo.k, positive_N)
    lam_N = _by_sign(algorithm.vespo.lam, positive_N)
    log_phi_N = k_N * ratios.log_w_N - lam_N * ratios.log_w_N.expm1()
    return log_phi_N.exp()[ratios.seq_S]


def reinforce(ratios: Ratios, advantage_N: Tensor, algorithm: AlgorithmConfig) -> Tensor:
    """1: no correction. With advantage 1 this is the gradient of supervised fine-tuning."""
    return torch.ones_like(ratios.log_ratio_S)


def coefficient(algorithm: AlgorithmConfig, ratios: Ratios, advantage_N: Tensor) -> Tensor:
    """The configured algorithm's coefficient, [S], detached, in the dtype of `log_ratio_S`."""
    c_S = COEFFICIENTS[algorithm.name](ratios, advantage_N, algorithm)
    return c_S.detach().to(ratios.log_ratio_S.dtype)


def _by_sign(pair: tuple[float, float], positive_N: Tensor) -> Tensor:
    """float64: pair[0] where positive, else pair[1]."""
    return torch.tensor(pair, dtype=torch.float64, device=positive_N.device)[(~positive_N).long()]


COEFFICIENTS: dict[str, Callable[[Ratios, Tensor, AlgorithmConfig], Tensor]] = {
    "vespo": vespo,
    "reinforce": reinforce,
}
