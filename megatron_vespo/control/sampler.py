"""From one prompt to one group: sample, verify, compare."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vespo.algo.advantages import group_advantages
from megatron_vespo.config import TrainConfig
from megatron_vespo.types import (
    Engine,
    Group,
    Prompt,
    Response,
    Rollout,
    Sampling,
    Scored,
    TrainSequence,
    Verifier,
)


class Sampler:
    """mu, and the rule that computes rewards."""

    def __init__(self, cfg: TrainConfig, engine: Engine, verifier: Verifier) -> None:
        self._cfg, self._engine, self._verifier = cfg, engine, verifier
        self._sampling = Sampling(
            temperature=cfg.sampling.temperature, max_tokens=cfg.sampling.max_response_tokens
        )

    async def group(self, prompt: Prompt, ordinal: int) -> Group:
        """The prompt's group, with advantages relative to it."""
        responses, rewards = await self.rewarded(prompt, self._cfg.loop.group_size, self._sampling)
        algorithm = self._cfg.algorithm
        scale = (
            "none" if algorithm.advantage_scale == "batch_std" else algorithm.advantage_scale
        )  # the loop knows the batch
        advantages = group_advantages(rewards, scale=scale, baseline=algorithm.advantage_baseline)
        rollouts = [
            Rollout(prompt=prompt, response=response, reward=reward, advantage=float(advantage))
            for response, reward, advantage in zip(responses, rewards, advantages, strict=True)
        ]
        return Group(rollouts=tuple(rollouts), ordinal=ordinal)

    async def rewarded(
        self, prompt: Prompt, num: int, sampling: Sampling
    ) -> tuple[tuple[Response, ...], tuple[float, ...]]:
        """`num` responses to one prompt, and their rewards."""
        responses = await self._engine.sample(prompt, num, sampling)
        return responses, await self._verifier.score(prompt, responses)

    async def rescore(self, batch: Sequence[TrainSequence], chosen: Sequence[int]) -> list[Scored | None]:
        """The engine's scores of the sequences at the chosen places, None for the others."""
        scores = await self._engine.score([batch[i] for i in chosen])
        score_of = dict(zip(chosen, scores, strict=True))
        return [score_of.get(i) for i in range(len(batch))]
