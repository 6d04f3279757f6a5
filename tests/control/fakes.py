"""Small, honest stand-ins for the collaborators of the loop; the real ones run in tests/endtoend."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_vespo.types import (
    Examined,
    Experts,
    Prompt,
    Response,
    RunError,
    Sampling,
    Scored,
    StepOutput,
    SyncReport,
    TrainSequence,
    Update,
    VersionSpan,
)

NUM_LAYERS, TOP_K, NUM_EXPERTS = 3, 2, 4


def prompt(index: int) -> Prompt:
    ids = np.arange(1 + index % 3, dtype=np.int32)
    return Prompt(uid=f"p{index}", token_ids=ids, text="?" * len(ids), answer="1")


class FakeEngine:
    """Serves one weight version; responses have 2 tokens whose log-prob says under which version they were made."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.version = -1
        self.delay_s = delay_s
        self.fails_after = math.inf
        self.fails_on = ""
        self.no_signal: set[str] = set()
        self.slow_on: dict[str, float] = {}
        self.num_sampled = 0
        self.scored_under: list[int] = []

    async def sample(self, prompt: Prompt, num: int, sampling: Sampling) -> tuple[Response, ...]:
        version = self.version
        self.num_sampled += 1
        if self.num_sampled > self.fails_after or (self.fails_on == prompt.uid and self.version > 0):
            raise RunError("engine = dead: prompt waited for it; look at its log")
        await asyncio.sleep(self.slow_on.get(prompt.uid, self.delay_s * (self.num_sampled % 3)))
        signal = prompt.uid not in self.no_signal
        return tuple(self._response(prompt, version, good=signal and bool(i % 2)) for i in range(num))

    async def score(self, sequences: Sequence[TrainSequence]) -> tuple[Scored, ...]:
        self.scored_under.append(self.version)
        return tuple(_scored(s, logp=_logp(self.version)) for s in sequences)

    def _response(self, prompt: Prompt, version: int, good: bool) -> Response:
        rows = len(prompt.token_ids) + 1
        return Response(
            token_ids=np.array([5, 6], np.int32),
            text="1" if good else "0",
            behavior_logp=np.full(2, _logp(version), np.float32),
            spans=(VersionSpan(version=version, start=0, end=2),),
            experts=_experts(rows),
            finish_reason="stop",
        )


class FakeTrainer:
    """Counts its steps; a push makes the engine serve its version."""

    def __init__(self, engine: FakeEngine, version: int = 0, delay_s: float = 0.0) -> None:
        self.engine = engine
        self.version = version
        self.delay_s = delay_s
        self.events: list[str] = []
        self.batches: list[list[TrainSequence]] = []
        self.noise_variances: list[float] = []
        self.routed: list[list[int]] = []
        self.examined: list[list[TrainSequence]] = []
        self.mismatches: dict[int, float] = {}
        """By version: nats per token by which this trainer disagrees with the engine in the step on it."""
        self.left_out = 0
        """Sequences at the end of each batch that a guard leaves untrained."""

    async def step(
        self,
        sequences: Sequence[TrainSequence],
        noise_variance: float = 0.0,
        routed: Sequence[int] | None = None,
    ) -> StepOutput:
        await asyncio.sleep(self.delay_s)
        self.batches.append(list(sequences))
        self.noise_variances.append(noise_variance)
        self.routed.append(list(range(len(sequences)) if routed is None else routed))
        self.events.append(f"step on {self.version}")
        logp = _logp(self.version) + self.mismatches.get(self.version, 0.0)
        trained = sequences[: len(sequences) - self.left_out]
        log_w = np.array([float(np.sum(logp - s.behavior_logp)) for s in trained])
        self.version += 1
        return StepOutput(
            scored=tuple(
                _scored(s, logp=logp, entropy=True, routed=i in self.routed[-1])
                for i, s in enumerate(sequences)
            ),
            log_w=log_w,
            coefficient=np.exp(-np.abs(log_w)),
            updates=(update(),),
            time_s={"optimizer": 0.1},
        )

    async def examine(self, sequences: Sequence[TrainSequence]) -> tuple[Examined, ...]:
        """Routing costs 0.01 nats on each token; noise 0.001."""
        self.examined.append(list(sequences))
        self.events.append(f"examine on {self.version}")
        logp = _logp(self.version)
        return tuple(
            Examined(
                natural=_scored(s, logp=logp, entropy=True),
                repeat=np.full(s.num_response_tokens, logp + 0.001, np.float32),
                replayed=None if s.experts is None else _scored(s, logp=logp - 0.01),
                margin=np.full((len(s.token_ids) - 1, NUM_LAYERS), 0.5, np.float32),
            )
            for s in sequences
        )

    async def publish(self, version: int) -> SyncReport:
        """types.Publisher, too."""
        self.events.append(f"publish {version}")
        self.engine.version = version
        return SyncReport(version=version, num_bytes=10, time_s={}, canary_abs_max=0.4, canary_variance=0.1)

    async def follow(self) -> None:
        await asyncio.Event().wait()

    async def save(self, version: int, state: Mapping[str, Any]) -> None:
        self.events.append(f"save {version} {dict(state)}")


def update() -> Update:
    return Update(
        loss=0.5,
        grad_norm=1.0,
        learning_rate=1e-3,
        entropy=2.0,
        kl=None,
        num_tokens=2,
        num_microbatches=1,
        num_inputs=10,
        num_packed=10,
    )


class FakeVerifier:
    def __init__(self) -> None:
        self.failures = {"timeouts": 0, "deaths": 0}

    async def score(self, prompt: Prompt, responses: Sequence[Response]) -> tuple[float, ...]:
        self.failures["timeouts"] += prompt.uid == "p0"
        return tuple(float(response.text == prompt.answer) for response in responses)


def _experts(num_rows: int) -> Experts:
    return np.zeros((num_rows, NUM_LAYERS, TOP_K), np.uint8) + np.arange(TOP_K, dtype=np.uint8)


def _logp(version: int) -> float:
    return -0.1 * (1 + version)


def _scored(sequence: TrainSequence, logp: float, entropy: bool = False, routed: bool = True) -> Scored:
    num = sequence.num_response_tokens
    return Scored(
        logp=np.full(num, logp, np.float32),
        experts=_experts(len(sequence.token_ids) - 1) if routed else None,
        entropy=np.full(num, 0.7, np.float32) if entropy else None,
    )
