"""Coefficients that depend on every sequence of an update: known before its first backward, the same on every rank.

Most algorithms look at one sequence at a time, and find its coefficient where its log-probs are computed.  Some look at
the update as a whole (`AlgorithmConfig.needs_whole_update`): a forward pass surveys it, and what is computed here from
all log-probs replaces what a microbatch could know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_vespo.algo.advantages import zero_mean
from megatron_vespo.algo.coefficients import Ratios, coefficient
from megatron_vespo.config import AlgorithmConfig
from megatron_vespo.types import Doubles, TrainSequence


@dataclass(frozen=True, kw_only=True)
class Shaped:
    """What one update trains with."""

    coefficient: Doubles
    """Of every response token of the update's sequences, one sequence after the other; 0 where it is not trained on."""
    advantage: Doubles
    """Of every sequence of the update."""


def shape(
    algorithm: AlgorithmConfig,
    sequences: Sequence[TrainSequence],
    logp: Doubles,
    start_logp: Doubles | None,
    noise_variance: float,
) -> Shaped:
    """The update's coefficients and advantages.

    Args:
        sequences: those of the update.
        logp: of all their response tokens under the weights before the update.
        start_logp: the same at the start of the batch, where that is the reference; else it is the behavior.
    """
    trained = np.concatenate([s.is_trained for s in sequences])
    num_trained = np.array([s.num_trained_tokens for s in sequences])
    of_token = np.repeat(np.arange(len(sequences)), num_trained)
    behavior = np.concatenate([_behavior(s) for s in sequences])[trained]
    ours, start = logp[trained], None if start_logp is None else start_logp[trained]
    ratio = _difference(ours, behavior if start is None else start)
    rho = np.zeros_like(ratio) if start is None else _difference(start, behavior)

    def whole(values: Doubles) -> torch.Tensor:
        return torch.from_numpy(np.bincount(of_token, values, minlength=len(sequences)))

    ratios = Ratios(
        log_ratio_S=torch.from_numpy(ratio),
        log_w_N=whole(ratio),
        num_tokens_N=torch.from_numpy(num_trained.astype(np.float64)),
        seq_S=torch.from_numpy(of_token),
        log_rho_S=torch.from_numpy(rho),
        log_rho_N=whole(rho),
        noise_variance=noise_variance,
    )
    advantage = np.array([s.advantage for s in sequences], np.float64)
    trained_c = coefficient(algorithm, ratios, torch.from_numpy(advantage)).numpy()
    if algorithm.zero_mean:
        mean = np.bincount(of_token, trained_c, minlength=len(sequences)) / num_trained
        advantage = zero_mean(advantage, mean, np.array([s.group for s in sequences]))
    c = np.zeros(len(trained))
    c[trained] = trained_c
    return Shaped(coefficient=c, advantage=advantage)


def _difference(logp: Doubles, reference: Doubles) -> Doubles:
    """0 where there is no reference (nan): supervised, without a behavior."""
    return np.where(np.isnan(reference), 0.0, logp - reference)


def _behavior(s: TrainSequence) -> Doubles:
    if s.behavior_logp is None:
        return np.full(s.num_response_tokens, np.nan)
    return s.behavior_logp.astype(np.float64)
