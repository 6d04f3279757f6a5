"""One engine against one checkpoint, without a training run: what each says of the same tokens, as evidence.

The engine samples (M, and the experts that it used), scores what it sampled in a prefill (M'), and does so once more: its own
noise.  The trainer scores it three times (`types.Examined`): free, free again, and with the engine's experts.  Both are
taken to hold the same weights; whether they do is what the evidence shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from megatron_vespo.algo.routers import expert_overlap
from megatron_vespo.config import AlgorithmConfig, ConfigError, OptimizerConfig, TrainerConfig
from megatron_vespo.control import session
from megatron_vespo.control.actors import PolicySpec, TrainerGroup
from megatron_vespo.control.checkpoints import Checkpoint, find_checkpoint
from megatron_vespo.control.cluster import Cluster
from megatron_vespo.control.examination import trainer_columns
from megatron_vespo.data.prompts import load_questions, load_tokenizer
from megatron_vespo.evidence import Facts, write_evidence
from megatron_vespo.rollout.client import open_pool
from megatron_vespo.rollout.foreign import ForeignServer, Served
from megatron_vespo.trainer.hf_config import ModelShape, read_model_shape
from megatron_vespo.trainer.hf_weights import check_weights
from megatron_vespo.trainer.layout import check_layout
from megatron_vespo.trainer.packing import padded_length
from megatron_vespo.types import Examined, Prompt, Response, Sampling, Scored, TrainSequence

T = TypeVar("T")
Tell = Callable[[str], None]

_UNUSED_LEARNING_RATE = 1e-6
"""Of an optimizer that never steps."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What is asked for."""

    engine: str
    """http://host:port of a stock SGLang server."""
    checkpoint: Path
    """Of the weights that it serves: see `find_checkpoint`."""
    prompts: Path
    """jsonl or parquet with a column "prompt" or "messages"."""
    output: Path
    """Directory for the evidence and the ranks' logs."""
    num: int = 64
    """Responses; prompts are taken in turn."""
    max_tokens: int = 256
    """Of a response."""
    temperature: float = 1.0
    model_shape: Path | None = None
    """Hugging Face directory of the architecture, where the checkpoint names none."""
    trainer: TrainerConfig | None = None
    """Default: one rank, on the GPU if there is one, in the engine's dtype."""

    @property
    def checkpoints(self) -> Path:
        """Where `trainer.checkpoint.directory_of` finds the version."""
        return self.checkpoint.resolve().parent

    @property
    def logs(self) -> Path:
        return self.output / "logs"


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """The engine's side: one entry for each sequence."""

    prompts: Sequence[Prompt]
    responses: Sequence[Response]
    scored: Sequence[Scored]
    again: Sequence[Scored]
    """Scored once more, in other company."""

    @property
    def sequences(self) -> list[TrainSequence]:
        return [
            TrainSequence(
                uid=f"prompt {prompt.uid}",
                token_ids=np.concatenate([prompt.token_ids, response.token_ids]),
                num_prompt_tokens=len(prompt.token_ids),
                behavior_logp=response.behavior_logp,
                experts=response.experts,
            )
            for prompt, response in zip(self.prompts, self.responses, strict=True)
        ]


def probe(asked: Probe, tell: Tell) -> Path:
    """Run all passes, and write the evidence.

    Returns:
        The file.

    Raises:
        ConfigError: a path, or a model that does not fit the engine or the layout.
        RunError: the engine or a rank failed.
    """
    checkpoint = find_checkpoint(asked.checkpoint, asked.model_shape)
    shape = read_model_shape(checkpoint.model)
    check_weights(checkpoint.model, shape)
    if asked.trainer:
        check_layout(asked.trainer.layout, shape)
    prompts = load_questions(asked.prompts, load_tokenizer(checkpoint.model))[: asked.num]
    asked.logs.mkdir(parents=True, exist_ok=True)
    tell(f"checkpoint: {checkpoint.describe}")

    async def run(_: session.Stop) -> Path:
        served, engine = await _ask_engine(asked, checkpoint, shape, prompts, tell)
        cfg = _trainer_config(asked.trainer or _one_rank(served), engine.sequences)
        examined = await _ask_trainer(asked, cfg, checkpoint, engine.sequences, tell)
        facts = Facts(
            model=str(checkpoint.path),
            num_experts=shape.num_experts,
            temperature=asked.temperature,
            trainer_dtype=cfg.dtype,
            engine_dtype=served.dtype,
            versions={"sglang": served.sglang, "megatron-core": importlib.metadata.version("megatron-core")},
        )
        return write_evidence(asked.output / "probe.parquet", _rows(engine, examined), facts)

    return session.run(run, tell)


# ------------------------------------------------------------------------------------------------ the engine


async def _ask_engine(
    asked: Probe, checkpoint: Checkpoint, shape: ModelShape, prompts: Sequence[Prompt], tell: Tell
) -> tuple[Served, _Asked]:
    async with open_pool() as pool:
        server = ForeignServer(asked.engine, pool, checkpoint.model)
        served = await server.inspect()
        tell(
            f"engine: SGLang {served.sglang} at {server.url} serves '{served.model}' in {served.dtype}, its name for the "
            f"weights is '{served.weights}'"
        )
        _check_room(asked, served, shape, prompts)
        if server.is_moe and not server.records_experts:
            tell(
                "experts are not compared: the server does not return them; start it with --enable-return-routed-experts"
            )
        return served, await _passes(asked, server, prompts, tell)


def _check_room(asked: Probe, served: Served, shape: ModelShape, prompts: Sequence[Prompt]) -> None:
    longest = max(len(prompt.token_ids) for prompt in prompts) + asked.max_tokens
    room = min(served.context_length or shape.max_positions, shape.max_positions)
    if longest > room:
        raise ConfigError(
            f"--max-tokens {asked.max_tokens}: with the longest prompt {longest} tokens, expected at most {room}, which the "
            "server and the model have room for; lower it, or give shorter prompts"
        )


async def _passes(asked: Probe, server: ForeignServer, prompts: Sequence[Prompt], tell: Tell) -> _Asked:
    sampling = Sampling(temperature=asked.temperature, max_tokens=asked.max_tokens)
    shares = [len(range(i, asked.num, len(prompts))) for i in range(len(prompts))]
    began = time.perf_counter()
    groups = await _all(
        [server.sample(prompt, num, sampling) for prompt, num in zip(prompts, shares, strict=True)]
    )
    responses = [response for group in groups for response in group]
    engine = _Asked(
        prompts=[prompt for prompt, num in zip(prompts, shares, strict=True) for _ in range(num)],
        responses=responses,
        scored=(),
        again=(),
    )
    num_tokens = sum(len(response.token_ids) for response in responses)
    tell(
        f"engine: sampled {num_tokens} tokens in {len(responses)} responses, {time.perf_counter() - began:.0f} s"
    )
    sequences = engine.sequences
    scored = await _all([server.score(s, asked.temperature) for s in sequences])
    again = await _all([server.score(s, asked.temperature) for s in reversed(sequences)])
    engine = _Asked(prompts=engine.prompts, responses=responses, scored=scored, again=again[::-1])
    tell(f"engine against itself, two prefills: {_own_noise(engine)}")
    return engine


def _own_noise(engine: _Asked) -> str:
    gap = np.concatenate([a.logp - b.logp for a, b in zip(engine.scored, engine.again, strict=True)])
    text = f"|log-prob gap| {np.abs(gap).mean():.1e} nats on average, at most {np.abs(gap).max():.1e}"
    flips = [
        (expert_overlap(a.experts, b.experts) < 1).ravel()
        for a, b in zip(engine.scored, engine.again, strict=True)
        if a.experts is not None and b.experts is not None
    ]
    return f"{text}; {np.concatenate(flips).mean():.2%} of the experts' choices differ" if flips else text


async def _all(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(one) for one in work]
    return [task.result() for task in running]


# ----------------------------------------------------------------------------------------------- the trainer


def _one_rank(served: Served) -> TrainerConfig:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    usual = "bfloat16" if device == "cuda" else "float32"
    return TrainerConfig(
        device=device,
        dtype=served.dtype if served.dtype in ("float32", "bfloat16") else usual,
        optimizer=OptimizerConfig(learning_rate=_UNUSED_LEARNING_RATE, distributed=False),
    )


def _trainer_config(cfg: TrainerConfig, sequences: Sequence[TrainSequence]) -> TrainerConfig:
    """With room for the longest sequence."""
    longest = max(padded_length(len(s.token_ids), cfg.layout) for s in sequences)
    return cfg.model_copy(update={"max_tokens_per_microbatch": max(longest, cfg.max_tokens_per_microbatch)})


async def _ask_trainer(
    asked: Probe, cfg: TrainerConfig, checkpoint: Checkpoint, sequences: Sequence[TrainSequence], tell: Tell
) -> Sequence[Examined]:
    spec = PolicySpec(
        cfg=cfg,
        model=checkpoint.model,
        algorithm=AlgorithmConfig(name="reinforce"),
        temperature=asked.temperature,
        seed=0,
        updates_per_batch=1,
        megatron=checkpoint.megatron,
    )
    tell(f"trainer: starting {cfg.layout.world_size} rank(s) on {cfg.device} in {cfg.dtype}")
    async with contextlib.AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(Cluster(cfg, None))
        group = TrainerGroup(cluster, spec, asked, version=checkpoint.version, records_experts=True)
        trainer = await stack.enter_async_context(group)
        began = time.perf_counter()
        examined = await trainer.examine(sequences)
        tell(f"trainer: three passes, {time.perf_counter() - began:.0f} s")
        return examined


# ---------------------------------------------------------------------------------------------- the evidence


def _rows(engine: _Asked, examined: Sequence[Examined]) -> list[dict[str, Any]]:
    """One for each sequence, by column of EVIDENCE_SCHEMA."""
    rows = []
    sides = zip(engine.prompts, engine.responses, engine.scored, examined, strict=True)
    for number, (prompt, response, scored, trainer) in enumerate(sides):
        rows.append({
            "step": 0,
            "train_version": 0,
            "uid": prompt.uid,
            "ordinal": number,
            "prompt_text": prompt.text,
            "response_text": response.text,
            "finish_reason": response.finish_reason,
            "prompt_ids": prompt.token_ids,
            "response_ids": response.token_ids,
            "versions": response.versions,
            "engine": response.engine,
            "behavior_logp": response.behavior_logp,
            "behavior_experts": response.experts,
            "engine_logp": scored.logp,
            "engine_experts": scored.experts,
            "policy_logp": trainer.natural.logp,
            **trainer_columns(trainer),
        })  # fmt: skip
    return rows
