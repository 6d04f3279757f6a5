"""How fast, and how long, one batch is learnt from: what to do when off-policy data runs out of weight.

Shape key:  N sequences of one update.
"""

from __future__ import annotations

import numpy as np

from megatron_vespo.algo.statistics import effective_fraction, effective_fraction_of
from megatron_vespo.config import AlgorithmConfig
from megatron_vespo.types import Doubles


def rate_factor(algorithm: AlgorithmConfig, log_w_N: Doubles) -> float:
    """sqrt(ESS / n) of the update's W, or 1: what the learning rate is multiplied by (VCPO, arXiv 2602.17616).

    The variance of the gradient grows like n / ESS, and Adam's steps have the size of the learning rate whatever the gradient's:
    the square root keeps the noise that an update adds to the weights as it is on-policy.

    Args:
        log_w_N: of the sequences that have an advantage; none of them is no reason to slow down.
    """
    if not algorithm.ess_learning_rate or not len(log_w_N):
        return 1.0
    return float(np.sqrt(effective_fraction(log_w_N)))


def is_spent(algorithm: AlgorithmConfig, coefficient_N: Doubles) -> bool:
    """Whether a batch has too little living weight left to go on with: then its later updates are left out.

    A sequence outside of phi's band has no gradient, so nothing pulls a policy back that drifts away from its data: what few
    samples still live move the shared weights, until the next rollouts.  Judged by an update's own coefficients, against
    `min_living_weight`: the smaller of

        mean c          how much of the gradient is left
        ESS_c / n       (sum c)^2 / (n sum c^2): how many sequences share it

    Args:
        coefficient_N: mean over the tokens of each sequence that has an advantage.
    """
    if not algorithm.min_living_weight or not len(coefficient_N):
        return False
    return living_weight(coefficient_N) < algorithm.min_living_weight


def living_weight(coefficient_N: Doubles) -> float:
    """min(mean c, ESS_c / n), 0 where every coefficient is 0."""
    return min(float(coefficient_N.mean()), effective_fraction_of(coefficient_N))
