"""Off-policyness in numbers: how far apart two log-probs, or two choices of experts, of the same tokens are.

With d = logp - reference, k1 = -d and k3 = exp(d) - 1 - d.  Over tokens sampled from the reference their means
estimate KL(reference || policy); over stale tokens, sampled from older weights, they measure the same gap weighted
by where those weights went.  All sums are float64.

Shape key:  S response tokens of the batch, B sequences, R rows (processed tokens), L layers, K experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_vespo.types import Doubles, Experts, Floats


def token_gap(logp_S: Floats, reference_S: Floats) -> dict[str, float]:
    """Token-level statistics of d = logp - reference.

    k1 = -mean d      k3 = mean(exp(d) - 1 - d) >= 0      abs_mean, abs_p99, abs_max of |d|      square_mean = mean d^2
    """
    d = logp_S.astype(np.float64) - reference_S.astype(np.float64)
    size = np.abs(d)
    return {
        "k1_nats": float(-d.mean()),
        "k3_nats": float((np.expm1(d) - d).mean()),
        "abs_mean_nats": float(size.mean()),
        "abs_p99_nats": float(np.quantile(size, 0.99)),
        "abs_max_nats": float(size.max()),
        "square_mean_nats2": float(np.square(d).mean()),
    }


def sequence_nats(logp_B: Sequence[Floats], reference_B: Sequence[Floats]) -> Doubles:
    """[B] sum over each response of logp - reference: what a sequence-level weight sees, nats."""
    return np.array([
        np.sum(logp.astype(np.float64) - reference.astype(np.float64))
        for logp, reference in zip(logp_B, reference_B, strict=True)
    ])  # fmt: skip


def expert_overlap(experts_RLK: Experts, reference_RLK: Experts) -> Doubles:
    """[R, L] share of a token's experts that both engines chose, whatever their order.

    overlap[r, l] = #(P[r, l] and Q[r, l]) / K        chance level: K / number of experts
    """
    if experts_RLK.shape != reference_RLK.shape:
        raise ValueError(
            f"experts have shapes {experts_RLK.shape} and {reference_RLK.shape}: both engines must report the same "
            "tokens, layers and experts per token; check record_experts and the model directory of both"
        )
    same = experts_RLK[..., :, None] == reference_RLK[..., None, :]
    return same.any(-1).mean(-1)


def expert_gap(overlap_RL: Doubles) -> dict[str, float | list[float]]:
    """Router-level statistics of `expert_overlap`.

    overlap_mean       over tokens and layers
    mismatch_fraction  (token, layer) pairs whose expert *sets* differ at all
    any_flip_fraction  tokens with a difference in at least one layer
    overlap_layer      [L] mean over tokens
    """
    flip_RL = overlap_RL < 1.0
    return {
        "overlap_mean": float(overlap_RL.mean()),
        "mismatch_fraction": float(flip_RL.mean()),
        "any_flip_fraction": float(flip_RL.any(-1).mean()),
        "overlap_layer": [float(x) for x in overlap_RL.mean(0)],
    }
