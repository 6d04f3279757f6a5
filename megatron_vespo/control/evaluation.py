"""Held-out sets, sampled on the engines that train: avg@k and pass@k."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vespo.config import TrainConfig
from megatron_vespo.control.sampler import Sampler
from megatron_vespo.types import Prompt, Response, Sampling

Sets = Mapping[str, Sequence[Prompt]]
"""Held-out prompts by the name of their set."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One held-out set under one version of the weights, or several where training did not wait."""

    name: str
    uids: tuple[str, ...]
    """Of the P prompts."""
    reward: np.ndarray
    """[P, k], one row per prompt."""
    length_mean: float
    """Sampled tokens of a response."""
    truncated_fraction: float
    versions: tuple[int, int]
    """Oldest and newest weight version that sampled a token."""

    @property
    def k(self) -> int:
        """Responses per prompt."""
        return self.reward.shape[1]

    @property
    def avg(self) -> float:
        """avg@k: mean reward over prompts and responses."""
        return float(self.reward.mean())

    @property
    def standard_error(self) -> float | None:
        """Of avg@k over prompts, whose k responses are not independent; None for a single prompt."""
        means = self.reward.mean(1)
        return float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else None

    @property
    def pass_at_k(self) -> float:
        """pass@k: share of prompts with a response of reward 1 or more among k."""
        return float((self.reward >= 1).any(1).mean())

    def describe(self) -> str:
        """One line for people."""
        error = f" +- {self.standard_error:.3f}" if self.standard_error is not None else ""
        passed = f", pass@{self.k} {self.pass_at_k:.3f}" if self.k > 1 else ""
        return f"{self.name}: avg@{self.k} {self.avg:.3f}{error}{passed} ({len(self.reward)} prompts)"

    def metrics(self) -> dict[str, float | int]:
        """For metrics.jsonl."""
        values = {
            "avg": self.avg,
            "length_mean": self.length_mean,
            "truncated_fraction": self.truncated_fraction,
            "version_min": self.versions[0],
            "version_max": self.versions[1],
        }
        if self.k > 1:
            values["pass_at_k"] = self.pass_at_k
        return {f"eval/{self.name}/{key}": value for key, value in values.items()}


async def evaluate(cfg: TrainConfig, sets: Sets, sampler: Sampler) -> list[Evaluated]:
    """Sample and judge cfg.evaluation.samples responses to every prompt of every set.

    The prompts are not of the training stream: no staleness is counted, and the loop's places are not used up.
    """
    ours = cfg.evaluation
    sampling = Sampling(
        temperature=ours.temperature or cfg.sampling.temperature,
        max_tokens=ours.max_response_tokens or cfg.sampling.max_response_tokens,
        top_p=ours.top_p,
    )

    async def one(prompt: Prompt) -> tuple[tuple[Response, ...], tuple[float, ...]]:
        return await sampler.rewarded(prompt, ours.samples, sampling)

    async with asyncio.TaskGroup() as tasks:
        asked = {name: [tasks.create_task(one(p)) for p in prompts] for name, prompts in sets.items()}
    return [
        _evaluated(name, sets[name], [task.result() for task in answers]) for name, answers in asked.items()
    ]


def _evaluated(
    name: str, prompts: Sequence[Prompt], answers: Sequence[tuple[tuple[Response, ...], tuple[float, ...]]]
) -> Evaluated:
    responses = [response for group, _ in answers for response in group]
    versions = [span.version for response in responses for span in response.spans]
    return Evaluated(
        name=name,
        uids=tuple(prompt.uid for prompt in prompts),
        reward=np.array([rewards for _, rewards in answers]),
        length_mean=float(np.mean([response.num_sampled for response in responses])),
        truncated_fraction=float(np.mean([response.finish_reason == "length" for response in responses])),
        versions=(min(versions), max(versions)),
    )
