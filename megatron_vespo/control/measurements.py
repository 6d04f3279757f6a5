"""The numbers of one step: from whole-batch arrays to the flat record of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_vespo.algo.mismatch import (
    effective_sample_fraction,
    expert_gap,
    expert_overlap,
    sequence_nats,
    token_gap,
)
from megatron_vespo.types import Experts, Floats, Rollout, Scored, StepOutput, SyncReport

Metrics = dict[str, float | int | list[float] | list[int]]


def step_metrics(
    version: int,
    rollouts: Sequence[Rollout],
    output: StepOutput,
    rescored: Sequence[Scored],
    sync: SyncReport,
) -> Metrics:
    """Everything that one step tells about learning and about off-policyness.

    Log W splits exactly, token by token, for a batch trained on top of version v:

        log pi_v - log mu_old  =  (log pi_v - log mu_v)  +  (log mu_v - log mu_old)
                  log W                  mismatch                   staleness

    where mu_v is the engine's re-score of the batch while it serves version v, so the two engines are compared
    on identical weights.
    """
    return {
        **_learning(rollouts),
        **_staleness(version, rollouts),
        **_weights(rollouts, output),
        **_gaps(rollouts, output.scored, rescored),
        **_experts(rollouts, output.scored, rescored),
        "optim/loss": output.loss,
        "optim/grad_norm": output.grad_norm,
        "optim/learning_rate": output.learning_rate,
        "sync/bytes": sync.num_bytes,
        "sync/canary_abs_max_nats": sync.canary_abs_max,
    }


def _learning(rollouts: Sequence[Rollout]) -> Metrics:
    lengths = np.array([len(r.response.token_ids) for r in rollouts])
    return {
        "reward/train_mean": float(np.mean([r.reward for r in rollouts])),
        "reward/signal_fraction": float(np.mean([r.advantage != 0 for r in rollouts])),
        "response/length_mean": float(lengths.mean()),
        "response/truncated_fraction": float(
            np.mean([r.response.finish_reason == "length" for r in rollouts])
        ),
    }


def _staleness(version: int, rollouts: Sequence[Rollout]) -> Metrics:
    """Of the weights before the update, `version` - 1, over tokens."""
    staleness_S = version - 1 - np.concatenate([r.response.versions for r in rollouts])
    return {
        "staleness/mean_steps": float(staleness_S.mean()),
        "staleness/max_steps": int(staleness_S.max()),
        "staleness/histogram": [int(n) for n in np.bincount(staleness_S)],
    }


def _weights(rollouts: Sequence[Rollout], output: StepOutput) -> Metrics:
    log_w_B, phi_B = output.log_w, output.coefficient
    advantage_B = np.array([r.advantage for r in rollouts])
    metrics: Metrics = {
        "algo/log_w_mean": float(log_w_B.mean()),
        "algo/log_w_std": float(log_w_B.std()),
        "algo/log_w_min": float(log_w_B.min()),
        "algo/log_w_max": float(log_w_B.max()),
        "algo/phi_mean": float(phi_B.mean()),
        "algo/ess_fraction": effective_sample_fraction(log_w_B),
        "algo/entropy_nats": float(np.concatenate([_present(s.entropy) for s in output.scored]).mean()),
    }
    for key, chosen_B in (("pos", advantage_B > 0), ("neg", advantage_B < 0)):
        if chosen_B.any():  # a mean over no sequence is no number: the key is left out
            metrics[f"algo/phi_{key}_mean"] = float(phi_B[chosen_B].mean())
    return metrics


def _gaps(rollouts: Sequence[Rollout], trainer: Sequence[Scored], engine: Sequence[Scored]) -> Metrics:
    trainer_B, engine_B = [s.logp for s in trainer], [s.logp for s in engine]
    behavior_B = [r.response.behavior_logp for r in rollouts]
    mismatch_B = sequence_nats(trainer_B, engine_B)
    stale_B = sequence_nats(engine_B, behavior_B)
    tokens = token_gap(np.concatenate(trainer_B), np.concatenate(engine_B))
    return {
        **{f"mismatch/{key}": value for key, value in tokens.items()},
        "mismatch/seq_nats_mean": float(mismatch_B.mean()),
        "mismatch/seq_nats_abs_max": float(np.abs(mismatch_B).max()),
        "stale/seq_nats_mean": float(stale_B.mean()),
        "stale/seq_nats_std": float(stale_B.std()),
    }


def _experts(rollouts: Sequence[Rollout], trainer: Sequence[Scored], engine: Sequence[Scored]) -> Metrics:
    """Trainer against engine on the same weights, and trainer now against the engine when it sampled."""
    ours = [s.experts for s in trainer]
    now = [s.experts for s in engine]
    then = [r.response.experts for r in rollouts]
    if any(x is None for x in [*ours, *now, *then]):
        return {}
    same_weights = expert_gap(_overlap(ours, now))
    since_sampling = expert_gap(_overlap(ours, then))
    return {
        **{f"experts/{key}": value for key, value in same_weights.items()},
        "experts/stale_overlap_layer": since_sampling["overlap_layer"],
        "experts/stale_overlap_mean": since_sampling["overlap_mean"],
    }


def _overlap(chosen: Sequence[Experts | None], reference: Sequence[Experts | None]) -> np.ndarray:
    return expert_overlap(
        np.concatenate([x for x in chosen if x is not None]),
        np.concatenate([x for x in reference if x is not None]),
    )


def _present(values: Floats | None) -> Floats:
    assert values is not None, "the trainer reports an entropy for every sequence"
    return values
