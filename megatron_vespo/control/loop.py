"""The main loop: the algorithm box of docs/architecture.md, in the same order."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_vespo.algo.advantages import batch_normalised
from megatron_vespo.config import AlgorithmConfig, TrainConfig
from megatron_vespo.control.buffer import GroupBuffer
from megatron_vespo.control.clock import StepClock
from megatron_vespo.control.observer import Observer
from megatron_vespo.control.sampler import Sampler
from megatron_vespo.data.stream import EpochStream
from megatron_vespo.types import Group, Prompt, Publisher, Rollout, Trainer, TrainSequence


async def train(
    cfg: TrainConfig,
    prompts: EpochStream[Prompt],
    sampler: Sampler,
    trainer: Trainer,
    publisher: Publisher,
    buffer: GroupBuffer,
    observer: Observer,
) -> None:
    """Asynchronous off-policy RL whose staleness never exceeds cfg.loop.max_staleness.

    max_staleness = 0 is synchronous training: the same loop.  The collaborators are protocols of types.py: Ray
    actors and servers in production, fakes in tests/control.  Closing the buffer ends the run after the step in
    progress; an exception of any task ends it at once.
    """
    version = observer.progress.version
    observer.started(await publisher.publish(version))  # mu = pi before the first token

    async with asyncio.TaskGroup() as tasks:
        background = [tasks.create_task(publisher.follow())]  # engines that come (back) between two steps
        await observer.first_evaluation(StepClock(version, cfg.loop.step_timeout_s, "loop.step_timeout_s"))
        observer.begin()
        background += [
            tasks.create_task(produce(cfg, prompts, sampler, buffer, observer))
            for _ in range(buffer.capacity)
        ]
        while version < cfg.loop.num_steps:
            clock = StepClock(version + 1, cfg.loop.step_timeout_s, "loop.step_timeout_s")
            # 1. y ~ mu with its advantages, the oldest P groups
            groups = compared(await clock.lap("wait", buffer.take(), buffer.progress), cfg.algorithm)
            if not groups:
                break
            replays = cfg.trainer.router_replay == "engine"
            batch = [
                to_train_sequence(rollout, group.ordinal, replays)
                for group in groups
                for rollout in group.rollouts
            ]
            chosen = observer.taken(groups, batch, buffer)
            # 2. log mu_v of the same tokens, beside the step on version v: ascend E[ phi(W) A grad log pi_v ]
            rescoring = tasks.create_task(sampler.rescore(batch, chosen.rescored))
            await observer.examine(trainer, clock)
            output = await clock.lap("train", trainer.step(batch, observer.noise_variance, chosen.routed))
            rescored = await clock.lap("score", rescoring)
            measuring = tasks.create_task(observer.measure(groups, output, rescored))  # beside the push
            # 3. mu <- pi, then admit as many new prompts
            version += 1
            sync = await clock.lap("sync", publisher.publish(version))
            prompts.done([group.ordinal for group in groups], "trained")
            for ticket in buffer.release():
                prompts.give_back(ticket.ordinal)
                observer.expired()
            await clock.lap("measure", observer.step(groups, output, rescored, sync, measuring))
            await observer.evaluate(tasks, clock)
            observer.finish(clock, sum(len(sequence.token_ids) for sequence in batch))
            if observer.checkpoint_is_due:
                await clock.lap("save", trainer.save(version, observer.state()))
                observer.saved(clock.laps_s["save"])

        observer.ended()
        for task in background:
            task.cancel()


async def produce(
    cfg: TrainConfig, prompts: EpochStream[Prompt], sampler: Sampler, buffer: GroupBuffer, observer: Observer
) -> None:
    """Forever: admit one prompt, sample and verify its group, hand it over, or drop it if it has no signal."""
    while True:
        ticket = await buffer.admit()
        ticket.ordinal, prompt = (
            prompts.issue()
        )  # no await in between: places and prompts are in the same order
        sampling = asyncio.ensure_future(sampler.group(prompt, ticket.ordinal))
        ticket.give_up = sampling.cancel
        try:
            group = await sampling
        except asyncio.CancelledError:
            if ticket.has_expired:
                continue
            raise
        has_signal = any(rollout.advantage for rollout in group.rollouts)
        if has_signal or not cfg.loop.filter_groups:
            buffer.fill(ticket, group)
        elif buffer.drop(ticket):
            prompts.done([ticket.ordinal], "filtered")
            observer.filtered(group)


def compared(groups: Sequence[Group], algorithm: AlgorithmConfig) -> Sequence[Group]:
    """The groups of one batch, their advantages relative to the batch where that is asked for."""
    if algorithm.advantage_scale != "batch_std" or not groups:
        return groups
    advantages = iter(batch_normalised(np.array([r.advantage for group in groups for r in group.rollouts])))
    return [
        replace(group, rollouts=tuple(replace(r, advantage=float(next(advantages))) for r in group.rollouts))
        for group in groups
    ]


def to_train_sequence(rollout: Rollout, group: int, replays_experts: bool) -> TrainSequence:
    """The rollout as the trainer sees it; the engine's expert choices go along only where they are repeated."""
    prompt, response = rollout.prompt, rollout.response
    return TrainSequence(
        uid=prompt.uid,
        token_ids=np.concatenate([prompt.token_ids, response.token_ids]),
        num_prompt_tokens=len(prompt.token_ids),
        advantage=rollout.advantage,
        behavior_logp=response.behavior_logp,
        experts=response.experts if replays_experts else None,
        group=group,
        sampled=response.sampled,
    )
