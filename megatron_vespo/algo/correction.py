"""The engine's part of the gap between pi and mu, as a factor of each token that a band bounds.

Trainer and engine compute the log-probs of one policy differently: rho_t = pi_start(y_t) / mu(y_t) is 1 but for rounding,
routing and staleness at the start of the batch.  It is kept apart from the ratios of the algorithm, bounded, and applied
token by token: folded into a sequence's weight it would grow with the square root of its length.

Shape key:  S response tokens, N sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vespo.config import CorrectionConfig

PUBLISHED = {"token_tis": (0.0, 2.0), "icepop": (0.5, 5.0), "sequence_mask": (0.999, 1.002)}
"""Band of rho by kind."""


def correction(cfg: CorrectionConfig, log_rho_S: Tensor, mean_log_rho_N: Tensor, seq_S: Tensor) -> Tensor:
    """m(rho) of each token, detached.

        token_tis      min(max(rho, low), high)                        (Yao et al. 2025; slime, verl)
        icepop         rho where low <= rho <= high, else 0            (IcePop, Ring-1T)
        sequence_mask  rho where low <= g <= high, else 0, g the geometric mean of rho over the response   (NeMo-RL);
                       a single token's rho is not bounded

    Args:
        mean_log_rho_N: float64, log g of each whole response.

    Returns:
        [S]
    """
    low, high = cfg.band or PUBLISHED[cfg.kind]
    rho_S = log_rho_S.exp()
    if cfg.kind == "token_tis":
        return rho_S.clamp(low, high)
    judged_S = rho_S if cfg.kind == "icepop" else mean_log_rho_N.exp()[seq_S]
    return torch.where((judged_S >= low) & (judged_S <= high), rho_S, 0.0)
