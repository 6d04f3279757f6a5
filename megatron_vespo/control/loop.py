"""The main loop: the algorithm box of docs/architecture.md, in the same order."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from megatron_vespo.algo.advantages import group_advantages
from megatron_vespo.config import TrainConfig
from megatron_vespo.control.buffer import GroupBuffer
from megatron_vespo.control.clock import StepClock
from megatron_vespo.control.observer import Observer
from megatron_vespo.data.prompts import EpochStream
from megatron_vespo.types import Engine, Group, Prompt, Rollout, Scored, Trainer, TrainSequence, Verifier


async def train(
    cfg: TrainConfig,
    prompts: EpochStream[Prompt],
    engine: Engine,
    verifier: Verifier,
    trainer: Trainer,
    observer: Observer,
    buffer: GroupBuffer,
) -> None:
    """Asynchronous off-policy RL whose staleness never exceeds cfg.loop.max_staleness.

    max_staleness = 0 is synchronous training: the same loop.  The collaborators are protocols of types.py: Ray
    actors and a server in production, fakes in tests/control.  Closing the buffer ends the run after the step in
    progress; an exception of any task ends it at once.
    """
    version = observer.progress.version
    observer.started(await trainer.publish(version))  # mu = pi before the first token
    if observer.first_evaluation_is_due:
        observer.heldout_reward(await evaluate(observer.heldout, engine, verifier, cfg.loop.eval_samples))

    async with asyncio.TaskGroup() as tasks:
        producers = [
            tasks.create_task(produce(cfg, prompts, engine, verifier, buffer)) for _ in range(buffer.capacity)
        ]
        while version < cfg.loop.num_steps:
            clock = StepClock(version + 1, cfg.loop.step_timeout_s, "loop.step_timeout_s")
            # 1. y ~ mu with its advantages, the oldest P groups
            groups = await clock.lap("wait", buffer.take(), buffer.progress)
            if not groups:
                break
            replays = cfg.trainer.router_replay == "engine"
            batch = [to_train_sequence(rollout, replays) for group in groups for rollout in group.rollouts]
            # 2. log mu_v of the same tokens, beside the step on version v: ascend E[ phi(W) A grad log pi_v ]
            rescoring = tasks.create_task(rescore(batch, engine, cfg.loop.rescored_sequences))
            output = await clock.lap("train", trainer.step(batch))
            rescored = await clock.lap("score", rescoring)
            # 3. mu <- pi, then admit as many new prompts
            version += 1
            sync = await clock.lap("sync", trainer.publish(version))
            await buffer.release()
            await observer.step(groups, output, rescored, sync)
            if observer.evaluation_is_due:
                scores = evaluate(observer.heldout, engine, verifier, cfg.loop.eval_samples)
                observer.heldout_reward(await clock.lap("eval", scores))
            observer.finish(clock, sum(len(sequence.token_ids) for sequence in batch))
            if observer.checkpoint_is_due:
                await clock.lap("save", trainer.save(version, observer.state()))
                observer.saved(clock.laps_s["save"])

        for producer in producers:
            producer.cancel()


async def produce(
    cfg: TrainConfig, prompts: EpochStream[Prompt], engine: Engine, verifier: Verifier, buffer: GroupBuffer
) -> None:
    """Forever: admit one prompt, sample its responses, verify them, hand the group over."""
    while True:
        ticket = await buffer.admit()
        prompt = next(prompts)  # no await in between: prompts are trained on in the order of the stream
        responses = await engine.sample(prompt, cfg.loop.group_size)
        rewards = await verifier.score(prompt, responses)
        advantages = group_advantages(rewards, scale=cfg.algorithm.advantage_scale)
        rollouts = [
            Rollout(prompt=prompt, response=response, reward=reward, advantage=float(advantage))
            for response, reward, advantage in zip(responses, rewards, advantages, strict=True)
        ]
        await buffer.fill(ticket, Group(rollouts=tuple(rollouts)))


async def evaluate(
    prompts: Sequence[Prompt], engine: Engine, verifier: Verifier, num_samples: int
) -> list[float]:
    """Mean reward of `num_samples` responses to each prompt, sampled as in training."""

    async def mean_reward(prompt: Prompt) -> float:
        rewards = await verifier.score(prompt, await engine.sample(prompt, num_samples))
        return sum(rewards) / len(rewards)

    async with asyncio.TaskGroup() as tasks:
        scores = [tasks.create_task(mean_reward(prompt)) for prompt in prompts]
    return [score.result() for score in scores]


async def rescore(batch: Sequence[TrainSequence], engine: Engine, num: int | None) -> list[Scored | None]:
    """The engine's scores of `num` sequences evenly spread over the batch (None: of all), None for the others."""
    chosen = sorted({int(i) for i in np.linspace(0, len(batch) - 1, min(num or len(batch), len(batch)))})
    score_of = dict(zip(chosen, await engine.score([batch[i] for i in chosen]), strict=True))
    return [score_of.get(i) for i in range(len(batch))]


def to_train_sequence(rollout: Rollout, replays_experts: bool) -> TrainSequence:
    """The rollout as the trainer sees it; the engine's expert choices go along only where they are repeated."""
    prompt, response = rollout.prompt, rollout.response
    return TrainSequence(
        uid=prompt.uid,
        token_ids=np.concatenate([prompt.token_ids, response.token_ids]),
        num_prompt_tokens=len(prompt.token_ids),
        advantage=rollout.advantage,
        behavior_logp=response.behavior_logp,
        experts=response.experts if replays_experts else None,
    )
