"""The numbers of one step: from whole-batch arrays to the flat record of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_vespo.algo.advantages import zero_mean
from megatron_vespo.algo.loss import token_weights
from megatron_vespo.algo.mismatch import sequence_nats, token_gap
from megatron_vespo.algo.routers import expert_gap, expert_overlap
from megatron_vespo.algo.statistics import by_lag, weight_statistics
from megatron_vespo.config import AlgorithmConfig
from megatron_vespo.types import (
    Doubles,
    Floats,
    Group,
    Rollout,
    Scored,
    StepOutput,
    SyncReport,
)

Metrics = dict[str, float | int | list[float] | list[int]]
T = TypeVar("T", bound=np.generic)


def step_metrics(
    version: int,
    groups: Sequence[Group],
    output: StepOutput,
    rescored: Sequence[Scored | None],
    algorithm: AlgorithmConfig,
) -> Metrics:
    """Everything that one step tells about learning and about off-policyness.

    Against the behavior, log W splits exactly, token by token, for a batch trained on top of version v:

        log pi_v - log mu_old  =  (log pi_v - log mu_v)  +  (log mu_v - log mu_old)
                  log W                  mismatch                   staleness

    where mu_v is the engine's re-score of the batch while it serves version v, so the two engines are compared
    on identical weights.

    Args:
        rescored: None where a sequence was not scored again.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return {
        **_learning(rollouts),
        **_staleness(version, rollouts),
        **_weights(version, groups, output, algorithm),
        **_engines(
            [
                Seen(trainer=ours, engine=theirs, then=rollout)
                for rollout, ours, theirs in zip(rollouts, output.scored, rescored, strict=True)
                if theirs is not None
            ]
        ),
        **optimizer_metrics(output),
        "optim/left_out_fraction": 1 - len(output.log_w) / len(rollouts),
        **{f"time/train_{part}_s": seconds for part, seconds in output.time_s.items()},
    }


def sync_metrics(sync: SyncReport) -> Metrics:
    """The push of the weights that a step made, and the pure gap between the engines: fixed tokens, same weights."""
    metrics: Metrics = {
        **{f"time/sync_{part}_s": seconds for part, seconds in sync.time_s.items()},
        "sync/bytes": sync.num_bytes,
        "sync/engines": sync.num_engines,
        "sync/engines_lost": sync.num_lost,
        "sync/canary_abs_max_nats": sync.canary_abs_max,
        "sync/canary_abs_mean_nats": sync.canary_abs_mean,
        "sync/canary_k3_nats": sync.canary_k3_nats,
    }
    if sync.changed is not None:
        metrics["sync/changed"] = int(sync.changed)
    if sync.canary_expert_mismatch is not None:
        metrics["sync/canary_expert_mismatch"] = sync.canary_expert_mismatch
    return metrics


class Filtered(NamedTuple):
    """What is remembered of a group that was dropped."""

    num: int
    reward: float
    """Of each of its responses: they are all equal."""
    length_sum: int

    @classmethod
    def of(cls, group: Group) -> Filtered:
        lengths = [rollout.response.num_sampled for rollout in group.rollouts]
        return cls(len(lengths), group.rollouts[0].reward, sum(lengths))


def filter_metrics(kept: Sequence[Group], filtered: Sequence[Filtered]) -> Metrics:
    """What dropping groups without signal does to the data: how many, and how kept and dropped ones differ.

    Args:
        kept: the groups of this step's batch.
        filtered: those that were dropped since the batch before.
    """
    rollouts = [rollout for group in kept for rollout in group.rollouts]
    rewards = [r.reward for r in rollouts] + [group.reward for group in filtered for _ in range(group.num)]
    metrics: Metrics = {
        "filter/dropped_groups": len(filtered),
        "filter/dropped_fraction": len(filtered) / (len(kept) + len(filtered)),
        "filter/kept_length_mean": float(np.mean([r.response.num_sampled for r in rollouts])),
        "filter/sampled_reward_mean": float(np.mean(rewards)),
    }
    if filtered:
        num = sum(group.num for group in filtered)
        metrics["filter/dropped_length_mean"] = sum(group.length_sum for group in filtered) / num
        metrics["filter/dropped_reward_mean"] = float(np.mean([group.reward for group in filtered]))
    return metrics


def optimizer_metrics(output: StepOutput) -> Metrics:
    """The updates on one batch, and what they took; with several, lists hold one number for each."""
    updates = output.updates
    metrics: Metrics = {
        "optim/loss": output.loss,
        "optim/grad_norm": output.grad_norm,
        "optim/learning_rate": output.learning_rate,
        "optim/num_updates": len(updates),
        "packing/microbatches": sum(update.num_microbatches for update in updates),
        "packing/padding_fraction": 1
        - sum(u.num_inputs for u in updates) / sum(u.num_packed for u in updates),
        **{f"memory/train_{part}_bytes": num_bytes for part, num_bytes in output.memory_bytes.items()},
    }
    if output.model_flops:
        metrics["throughput/tflops_per_s_rank"] = output.flops_s / 1e12
    if output.peak_flops_s:
        metrics["throughput/mfu"] = output.flops_s / output.peak_flops_s
    if len(updates) > 1:
        metrics["optim/loss_updates"] = [update.loss for update in updates]
        metrics["optim/grad_norm_updates"] = [update.grad_norm for update in updates]
        metrics["algo/entropy_updates_nats"] = [update.entropy for update in updates]
    kl = [update.kl * update.num_tokens for update in updates if update.kl is not None]
    if kl:
        metrics["algo/reference_kl_nats"] = sum(kl) / sum(update.num_tokens for update in updates)
    return metrics


def _learning(rollouts: Sequence[Rollout]) -> Metrics:
    lengths = np.array([r.response.num_sampled for r in rollouts])
    return {
        "reward/train_mean": float(np.mean([r.reward for r in rollouts])),
        "reward/signal_fraction": float(np.mean([r.advantage != 0 for r in rollouts])),
        "response/length_mean": float(lengths.mean()),
        "response/length_p95": float(np.quantile(lengths, 0.95)),
        "response/truncated_fraction": float(
            np.mean([r.response.finish_reason == "length" for r in rollouts])
        ),
        "response/turns_mean": float(np.mean([r.response.num_turns for r in rollouts])),
        "response/resumed_fraction": float(np.mean([r.response.num_resumed > 0 for r in rollouts])),
    }


def _staleness(version: int, rollouts: Sequence[Rollout]) -> Metrics:
    """Of the weights before the update, `version` - 1, over sampled tokens."""
    staleness_S = version - 1 - np.concatenate([_sampled(r, r.response.versions) for r in rollouts])
    return {
        "staleness/mean_steps": float(staleness_S.mean()),
        "staleness/max_steps": int(staleness_S.max()),
        "staleness/histogram": [int(n) for n in np.bincount(staleness_S)],
    }


def _weights(
    version: int, groups: Sequence[Group], output: StepOutput, algorithm: AlgorithmConfig
) -> Metrics:
    """Importance weights and coefficients of what was trained on, of the batch as a whole and of each update."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    trained = rollouts[: len(output.log_w)]
    log_w_B, phi_B = output.log_w, output.coefficient
    advantage_B = np.array([r.advantage for r in trained])
    if algorithm.zero_mean:
        group_B = np.repeat(np.arange(len(groups)), [len(group.rollouts) for group in groups])
        advantage_B = zero_mean(advantage_B, phi_B, group_B[: len(trained)].astype(np.int32))
    num_B = np.array([r.response.num_sampled for r in trained])
    lag_B = np.array([(version - 1 - _sampled(r, r.response.versions)).mean() for r in trained])
    weight_B = num_B * token_weights(num_B.tolist(), algorithm.resolved_aggregation)
    metrics: Metrics = {
        "algo/log_w_mean": float(log_w_B.mean()),
        "algo/log_w_std": float(log_w_B.std()),
        "algo/log_w_min": float(log_w_B.min()),
        "algo/log_w_max": float(log_w_B.max()),
        "algo/entropy_nats": float(_entropy(rollouts, output).mean()),
        **_named(weight_statistics(log_w_B, phi_B, advantage_B, weight_B)),
    }
    if algorithm.reference == "behavior":  # else W knows nothing of the age
        metrics |= _named(by_lag(log_w_B, np.floor(lag_B + 0.5).astype(np.int32)))
    masses = [
        _sampled(r, s.top_k_mass)
        for r, s in zip(rollouts, output.scored, strict=True)
        if s.top_k_mass is not None
    ]
    if masses:
        metrics["algo/top_k_mass_mean"] = float(np.concatenate(masses).mean())
    if len(output.updates) > 1 or algorithm.reference == "proximal":
        drift_B = log_w_B if algorithm.reference == "proximal" else _update_nats(trained, output)
        metrics["update/seq_nats_mean"] = float(drift_B.mean())
        metrics["update/seq_nats_abs_max"] = float(np.abs(drift_B).max())
    if len(output.updates) > 1:
        metrics |= _by_update(log_w_B, phi_B, advantage_B, weight_B, len(output.updates))
    return metrics


def _by_update(
    log_w_B: Doubles, phi_B: Doubles, advantage_B: Doubles, weight_B: Doubles, num_updates: int
) -> Metrics:
    """How the weight of a batch is used up: one number for each update that took an equal share of it, in order."""
    shares = [
        np.split(x, num_updates) for x in (log_w_B, phi_B, advantage_B, weight_B)
    ]  # groups stand one after the other
    updates = [weight_statistics(*share) for share in zip(*shares, strict=True)]
    metrics: Metrics = {
        "algo/log_w_mean_updates": [float(x.mean()) for x in shares[0]],
        "algo/log_w_std_updates": [float(x.std()) for x in shares[0]],
    }
    for key in ("phi_mean", "ess_fraction", "ess_phi_fraction", "dead_fraction", "net_advantage"):
        values = [value for update in updates if isinstance(value := update.get(key), float)]
        if len(values) == len(updates):
            metrics[f"algo/{key}_updates"] = values
    return metrics


def _named(statistics: Mapping[str, float | list[float] | list[int]]) -> Metrics:
    return {f"algo/{key}": value for key, value in statistics.items()}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One sequence as trainer and engine see it under the same weights, and as it was sampled then."""

    trainer: Scored
    engine: Scored
    then: Rollout


def _engines(seen: Sequence[Seen]) -> Metrics:
    if not seen:  # no engine was left to score the batch under its weights
        return {}
    trainer_B = [_sampled(s.then, s.trainer.logp) for s in seen]
    engine_B = [_sampled(s.then, s.engine.logp) for s in seen]
    behavior_B = [_sampled(s.then, s.then.response.behavior_logp) for s in seen]
    mismatch_B = sequence_nats(trainer_B, engine_B)
    stale_B = sequence_nats(engine_B, behavior_B)
    tokens = token_gap(np.concatenate(trainer_B), np.concatenate(engine_B))
    return {
        **{f"mismatch/{key}": value for key, value in tokens.items()},
        "mismatch/seq_nats_mean": float(mismatch_B.mean()),
        "mismatch/seq_nats_abs_max": float(np.abs(mismatch_B).max()),
        "stale/seq_nats_mean": float(stale_B.mean()),
        "stale/seq_nats_std": float(stale_B.std()),
        **_experts(seen),
    }


def _update_nats(rollouts: Sequence[Rollout], output: StepOutput) -> Doubles:
    """[B] log pi_update - log pi_v: how far the updates before its own had moved the policy on each sequence."""
    scored = output.scored[: len(rollouts)]
    start = sequence_nats(
        [_sampled(r, one.logp) for r, one in zip(rollouts, scored, strict=True)],
        [_sampled(r, r.response.behavior_logp) for r in rollouts],
    )
    return output.log_w - start


def _experts(seen: Sequence[Seen]) -> Metrics:
    """Trainer against engine on the same weights, and trainer now against the engine when it sampled.

    Of the sequences whose choices were asked for: see selection.py.
    """
    choices = [(s.trainer.experts, s.engine.experts, s.then.response.experts) for s in seen]
    known = [
        (ours, now, then)
        for ours, now, then in choices
        if ours is not None and now is not None and then is not None
    ]
    if not known:
        return {}
    same_weights, since_sampling = (
        expert_gap(np.concatenate([expert_overlap(choice[0], choice[place]) for choice in known]))
        for place in (1, 2)
    )
    return {
        "experts/compared_tokens": sum(len(ours) for ours, _, _ in known),
        **{f"experts/{key}": value for key, value in same_weights.items()},
        "experts/stale_overlap_layer": since_sampling["overlap_layer"],
        "experts/stale_overlap_mean": since_sampling["overlap_mean"],
    }


def _entropy(rollouts: Sequence[Rollout], output: StepOutput) -> Floats:
    """Of the sampled tokens of all sequences, one after the other."""
    return np.concatenate(
        [
            _sampled(r, s.entropy)
            for r, s in zip(rollouts, output.scored, strict=True)
            if s.entropy is not None
        ]
    )


def _sampled(rollout: Rollout, value_T: NDArray[T]) -> NDArray[T]:
    """The values of the tokens that the engine sampled."""
    return value_T if rollout.response.sampled is None else value_T[rollout.response.sampled]
