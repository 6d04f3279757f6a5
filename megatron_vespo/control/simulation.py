"""Whole runs in which only the models are simulated: real loop, buffer, fleet, publisher, weight push and files.

For measurements at the size of a large cluster, and for failures on purpose, on one machine: engines are
`rollout.simulated_engine`s, and the trainer takes its time and pushes real tensors that it changes a little each step.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors import safe_open

from megatron_vespo.config import RolloutConfig, TrainConfig, to_toml
from megatron_vespo.control import loop
from megatron_vespo.control.buffer import GroupBuffer
from megatron_vespo.control.examination import facts_of
from megatron_vespo.control.observer import Observer, Sources
from megatron_vespo.control.progress import Progress, ledger_of
from megatron_vespo.control.publisher import FleetPublisher
from megatron_vespo.control.sampler import Sampler
from megatron_vespo.data.stream import EpochStream
from megatron_vespo.metrics import LiveView, RunLog
from megatron_vespo.rollout.fleet import Fleet
from megatron_vespo.rollout.server import EngineProcess
from megatron_vespo.rollout.simulated_engine import simulated_logp
from megatron_vespo.rollout.weight_sync import PushOutcome, Target, WeightSync
from megatron_vespo.rundir import RunDirectory
from megatron_vespo.trainer.hf_config import read_model_shape
from megatron_vespo.types import (
    Examined,
    Prompt,
    Response,
    Scored,
    StepOutput,
    TrainSequence,
    Update,
    Verifier,
)

_NUM_CANARIES = 2

Meanwhile = Callable[[Fleet, Observer, GroupBuffer], Coroutine[Any, Any, None]]
"""Something that happens beside the loop."""


class SimulatedTrainer:
    """types.Trainer and publisher.Source whose policy is that of the simulated engines at its own version."""

    def __init__(
        self,
        model: Path,
        cfg: RolloutConfig,
        step_s: Callable[[Sequence[TrainSequence]], float],
        version: int = 0,
    ) -> None:
        """
        Args:
            model: Hugging Face directory whose tensors are pushed.
            step_s: seconds that a step on these sequences takes.
        """
        self.version = version
        self.saved: tuple[int, Mapping[str, Any]] | None = None
        """The newest checkpoint: its version, and what is to be remembered."""
        self._turn = asyncio.Lock()  # as the ranks do: one thing after the other
        self._step_s = step_s
        self._model = model
        self._sync = WeightSync(model, cfg, torch.device("cpu"))

    async def step(
        self,
        sequences: Sequence[TrainSequence],
        noise_variance: float = 0.0,
        routed: Sequence[int] | None = None,
    ) -> StepOutput:
        async with self._turn:
            await asyncio.sleep(self._step_s(sequences))
            return await self._step(sequences)

    async def _step(self, sequences: Sequence[TrainSequence]) -> StepOutput:
        scored = await self.score(sequences)
        log_w = np.array([
            float(ours.logp.sum(dtype=np.float64) - s.behavior_logp.sum(dtype=np.float64))
            for ours, s in zip(scored, sequences, strict=True)
            if s.behavior_logp is not None
        ])  # fmt: skip
        num_tokens = sum(s.num_trained_tokens for s in sequences)
        self.version += 1
        return StepOutput(
            scored=tuple(scored),
            log_w=log_w,
            coefficient=np.exp(-np.abs(log_w)),
            updates=(_update(num_tokens),),
        )

    async def score(self, sequences: Sequence[TrainSequence]) -> Sequence[Scored]:
        return [
            Scored(
                logp=simulated_logp(
                    s.token_ids[s.num_prompt_tokens :],
                    np.arange(s.num_prompt_tokens, len(s.token_ids)),
                    self.version,
                ),
                experts=None,
                entropy=np.zeros(s.num_response_tokens, np.float32),
            )
            for s in sequences
        ]

    async def examine(self, sequences: Sequence[TrainSequence]) -> tuple[Examined, ...]:
        """It is exact, and has no routers."""
        async with self._turn:
            return tuple(
                Examined(natural=scored, repeat=scored.logp, replayed=None, margin=None)
                for scored in await self.score(sequences)
            )

    async def push(self, targets: Sequence[Target], version: int) -> PushOutcome | None:
        async with self._turn:
            if version != self.version:
                return None
            return await asyncio.to_thread(self._sync.push, self._tensors(), version, targets)

    async def save(self, version: int, state: Mapping[str, Any]) -> None:
        self.saved = version, state

    def close(self) -> None:
        self._sync.close()

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file in sorted(self._model.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    yield name, tensors.get_tensor(name) + 0.001 * self.version


class ParityVerifier:
    """Reward 1 if the sum of a response's tokens is even: every second one, whatever the weights."""

    def __init__(self) -> None:
        self.failures: dict[str, int] = {}

    async def score(self, prompt: Prompt, responses: Sequence[Response]) -> tuple[float, ...]:
        return tuple(float(response.token_ids.sum() % 2 == 0) for response in responses)


def simulated_prompts(num: int, num_tokens: int = 16) -> list[Prompt]:
    """Prompts that all differ."""
    rng = np.random.default_rng(0)
    return [
        Prompt(
            uid=f"prompt {i}", token_ids=rng.integers(1, 64, num_tokens).astype(np.int32), text="", answer=""
        )
        for i in range(num)
    ]


async def simulate(
    cfg: TrainConfig,
    engines: Sequence[EngineProcess],
    trainer: SimulatedTrainer,
    prompts: Sequence[Prompt],
    *,
    start: Progress | None = None,
    verifier: Verifier | None = None,
    meanwhile: Meanwhile | None = None,
) -> str:
    """Run the loop to its end; the run directory holds what a real run's would, the returned text what was told.

    Args:
        start: the progress to resume from.
        meanwhile: runs beside the loop; closing the buffer ends that after the step in progress.
    """
    start, judge, text = start or Progress(stream="simulation"), verifier or ParityVerifier(), io.StringIO()
    view = LiveView("simulation", cfg.loop.num_steps, console=Console(file=text, width=300))
    stream = EpochStream(prompts, cfg.seed, cfg.prompts.shuffle, ledger_of(start, len(prompts)))
    with RunDirectory(cfg.run_dir, to_toml(cfg), resume=start.version > 0) as run, RunLog(run) as log, view:
        async with Fleet(cfg.rollout, cfg.model, engines, view.event) as fleet:
            await fleet.all_started()
            sources = Sources(
                prompts=stream,
                failures=lambda: {f"verifier/{kind}": num for kind, num in judge.failures.items()},
                engine_metrics=fleet.metrics,
                evaluate=None,
                facts=facts_of(cfg, read_model_shape(cfg.model), run),
            )
            observer = Observer(cfg, run, log, view, sources, start)
            canary = [
                TrainSequence(uid=prompt.uid, token_ids=prompt.token_ids, num_prompt_tokens=1)
                for prompt in prompts[:_NUM_CANARIES]
            ]
            buffer = GroupBuffer.of(cfg.loop)
            async with asyncio.TaskGroup() as tasks:
                if meanwhile is not None:
                    tasks.create_task(meanwhile(fleet, observer, buffer))
                await loop.train(
                    cfg,
                    stream,
                    Sampler(cfg, fleet, judge),
                    trainer,
                    FleetPublisher(trainer, fleet, canary, cfg.rollout),
                    buffer,
                    observer,
                )
    return text.getvalue()


def _update(num_tokens: int) -> Update:
    return Update(
        loss=0.0, grad_norm=0.0, learning_rate=0.0, entropy=0.0, kl=None, num_tokens=num_tokens, num_microbatches=1,
        num_inputs=num_tokens, num_packed=num_tokens,
    )  # fmt: skip
