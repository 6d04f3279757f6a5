"""Advantages: a reward made relative within its own prompt's group, and to the batch.

Shape key:  G responses of one prompt, B sequences of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from megatron_vespo.types import Doubles, Ints

_STD_FLOOR = 1e-6
"""Added to the standard deviation, as in GRPO; only matters where rewards are nearly equal."""


def group_advantages(
    reward_G: Sequence[float],
    *,
    scale: Literal["none", "std"],
    baseline: Literal["mean", "leave_one_out"] = "mean",
) -> Doubles:
    """Advantage of each response relative to its own group.

        A[g] = (R[g] - b[g]) / s

        mean            b = mean R                      (GRPO, VESPO eq. 20)
        leave_one_out   b[g] = mean of the others       (RLOO, arXiv 2402.14740):  A = G / (G - 1) (R - mean R)
        none            s = 1, reward units             (VESPO eq. 20, Dr. GRPO)
        std             s = std(R) + 1e-6, the unbiased (G - 1) estimator, dimensionless   (GRPO; VESPO's released code)

    Args:
        reward_G: one verifier reward per response of one prompt, G >= 2; groups may differ in G.

    Returns:
        [G] float64. Equal rewards give exact zeros.

    Raises:
        ValueError: a reward is not finite, or G < 2.
    """
    reward = np.asarray(reward_G, np.float64)
    if reward.ndim != 1 or len(reward) < 2:
        raise ValueError(
            f"reward_G has shape {reward.shape}: a group needs at least 2 rewards; sample more responses"
        )
    if not np.isfinite(reward).all():
        raise ValueError(f"rewards = {reward.tolist()}: every reward must be finite; mend the verifier")
    if (reward == reward[0]).all():
        return np.zeros_like(reward)
    centered = reward - reward.mean()
    if baseline == "leave_one_out":
        centered *= len(reward) / (len(reward) - 1)
    return centered if scale == "none" else centered / (reward.std(ddof=1) + _STD_FLOOR)


def batch_normalised(advantage_B: Doubles) -> Doubles:
    """A / std(A) over the whole batch (REINFORCE++ with baseline, arXiv 2501.03262): hard and easy groups keep their proportions.

    The mean is not subtracted again: every group's is 0, and a sequence of no signal must stay at exactly 0.

    Returns:
        [B] float64; unchanged where all are 0.
    """
    if not advantage_B.any():
        return advantage_B
    return advantage_B / (np.sqrt(np.square(advantage_B).mean()) + _STD_FLOOR)


def zero_mean(advantage_B: Doubles, coefficient_B: Doubles, group_B: Ints) -> Doubles:
    """Advantages shifted within each group so that what is reinforced equals what is suppressed after reshaping.

        A'[i] = A[i] - sum_g c A / sum_g c,      so that   sum_g c A' = 0

    phi fades faster for negative samples than for positive ones, so that stale groups turn net positive; this restores
    the balance that the group mean had at W = 1.  A group without signal, or without any living weight, is unchanged.

    Args:
        coefficient_B: mean over the tokens of each sequence.
        group_B: which group each sequence belongs to.
    """
    _, group = np.unique(group_B, return_inverse=True)
    living = np.bincount(group, coefficient_B)
    net = np.bincount(group, coefficient_B * advantage_B)
    shift = np.divide(net, living, out=np.zeros_like(net), where=living > 0)
    return advantage_B - shift[group]
