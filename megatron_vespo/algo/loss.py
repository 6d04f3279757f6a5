"""The one differentiated expression, and its global denominators."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from megatron_vespo.config import Aggregation
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

    Its value is the divergence in expectation over pi; its slope, as in GRPO, is in that expectation the one of
    KL(reference || pi), which pulls pi towards all that the reference does.  It is taken over the tokens at hand: stale ones
    are not reweighted.
    """
    r = reference_logp_S.detach() - logp_S
    return r.expm1() - r


def token_weights(num_tokens_B: Sequence[int], aggregation: Aggregation) -> Doubles:
    """Weight of every token of each sequence, with one denominator for the whole optimizer update.

        token_mean           1 / sum_b T_b    each token counts alike; the weights of all tokens sum to 1   (DAPO, VESPO)
        seq_mean_token_sum   1 / B            each sequence counts alike, its token gradients add up to its score   (TOPR)
        seq_mean_token_mean  1 / (B T_b)      the same, divided by its own length   (GSPO, SAPO)

    All are known before the first backward and do not depend on how sequences fall into microbatches or on
    ranks, so neither does the gradient (VESPO's released Megatron path averages per microbatch instead).

    Returns:
        [B] float64; 0 for a sequence without tokens, which still counts in B.
    """
    num_tokens = np.asarray(num_tokens_B, np.float64)
    if not num_tokens.sum():
        raise ValueError(
            f"num_tokens_B = {list(num_tokens_B)}: the batch has no token to train on; check the data"
        )
    if aggregation == "token_mean":
        denominator = np.full_like(num_tokens, num_tokens.sum())
    else:
        denominator = len(num_tokens) * (
            num_tokens if aggregation == "seq_mean_token_mean" else np.ones_like(num_tokens)
        )
    return np.divide(1.0, denominator, out=np.zeros_like(num_tokens), where=num_tokens > 0)
