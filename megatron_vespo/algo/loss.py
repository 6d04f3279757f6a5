"""The one differentiated expression, and its global denominators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from torch import Tensor

from megatron_vespo.types import Doubles


def policy_loss(logp_S: Tensor, coefficient_S: Tensor, advantage_S: Tensor, weight_S: Tensor) -> Tensor:
    """Score-function loss, whose gradient is -sum_t weight_t c_t A_t grad log pi(y_t).

    Args:
        logp_S: log pi of the sampled tokens, nats; the only input with gradient.
        coefficient_S: from coefficients.py, dimensionless, detached here once more.
        advantage_S: advantage of the token's sequence.
        weight_S: from `token_weights`: 1 / the global denominator; 0 for tokens that are not trained.

    Returns:
        This microbatch's share of the loss. Shares add across microbatches and ranks: sum, never average.
    """
    assert logp_S.shape == coefficient_S.shape == advantage_S.shape == weight_S.shape
    return -(weight_S * coefficient_S.detach() * advantage_S * logp_S).sum()


def kl_penalty(logp_S: Tensor, reference_logp_S: Tensor) -> Tensor:
    """k3 estimate of KL(pi || reference) at each sampled token, nats, differentiable in `logp_S`.

        k3 = exp(r) - r - 1 >= 0      r = log reference - log pi      d k3 / d log pi = 1 - exp(r)

    An expectation over pi that is taken over the tokens at hand, as GRPO does: stale tokens are not reweighted.
    """
    r = reference_logp_S.detach() - logp_S
    return r.expm1() - r


def token_weights(
    num_tokens_B: Sequence[int], aggregation: Literal["token_mean", "sequence_mean"]
) -> Doubles:
    """Weight of every token of each sequence, with one denominator for the whole optimizer step.

        token_mean     1 / sum_b T_b        each token counts alike; the weights of all tokens sum to 1
        sequence_mean  1 / B                each sequence counts alike, its token gradients add up

    Both are known before the first backward and do not depend on how sequences fall into microbatches or on
    ranks, so neither does the gradient (VESPO's released Megatron path averages per microbatch instead).

    Returns:
        [B] float64: the same number for all sequences, 0 for one without tokens.
    """
    num_tokens = np.asarray(num_tokens_B, np.float64)
    denominator = num_tokens.sum() if aggregation == "token_mean" else float(len(num_tokens))
    if denominator <= 0:
        raise ValueError(
            f"num_tokens_B = {list(num_tokens_B)}: the batch has no token to train on; check the data"
        )
    return np.where(num_tokens > 0, 1.0 / denominator, 0.0)
