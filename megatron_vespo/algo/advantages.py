"""Advantages: a reward made relative within its own prompt's group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from megatron_vespo.types import Doubles

_STD_FLOOR = 1e-6
"""Added to the standard deviation, as in GRPO; only matters where rewards are nearly equal."""


def group_advantages(reward_G: Sequence[float], *, scale: Literal["none", "std"]) -> Doubles:
    """Advantage of each response relative to its own group.

        A[g] = (R[g] - mean R) / s        s = 1, or std(R) + 1e-6 with the unbiased (G - 1) estimator

    Args:
        reward_G: one verifier reward per response of one prompt, G >= 2.
        scale: "none" keeps reward units (VESPO eq. 20); "std" is dimensionless (GRPO; VESPO's released code).

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
    return centered if scale == "none" else centered / (reward.std(ddof=1) + _STD_FLOOR)
