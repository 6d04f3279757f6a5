"""An engine that samples, a trainer that scores what was sampled, and the evidence that both leave.

A scene is healthy until a failure changes it.  Sequences stand side by side in arrays that are padded on the right; no
token sees the padding behind it.

Shape key:  B sequences, W the widest of them, N = P + T tokens of one (prompt and response), L layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from megatron_vespo.evidence import Evidence, Facts
from tools.zoo.nets import EXPERTS, VOCABULARY, Net, Pass, new_net, next_versions

NUM_VERSIONS = 4
_SAMPLING_SEED = 1 << 20
"""Weights are drawn from the plain seed, and no two things from one stream."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is sampled."""

    prompts: int = 24
    group: int = 4
    """Responses to one prompt."""
    prompt_tokens: tuple[int, int] = (12, 20)
    response_tokens: tuple[int, int] = (24, 64)
    """Least and most."""
    shared_tokens: int = 6
    """With which all prompts begin, as with a system prompt."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What samples, and how; every field is right in a healthy scene."""

    net: Net
    temperature: float = 1.0
    top_p: float = 1.0
    logp: Callable[[Tensor, float, float], Tensor]
    """Log-probs [B, V] of logits at a temperature and a top_p, as the engine reports them."""
    prompts: Callable[[Tensor], Tensor] = lambda ids: ids
    """What it reads instead of the prompts that are recorded, [B, W]."""
    prefix: Net | None = None
    """Wrote the keys and values with which all prompts begin; None: `net`."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Everything that evidence is made from."""

    size: Size
    seed: int
    versions: list[Net]
    """float32, oldest first; the trainer holds the last."""
    engine: Engine
    trainer: Net
    trainer_temperature: float = 1.0
    replays: bool = False
    """Whether the trainer trains with the engine's experts."""
    gaps: tuple[int, ...] = (0,)
    """By how many versions the parts of the batch lag behind; with a lag the next version comes half-way."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What was recorded, side by side.

    `logp` holds [B, W]: entry p is the log-prob of token p; `experts` [B, W, L, K]: entry p was used to process it.
    """

    ids: Tensor
    num_prompt: Tensor
    num_tokens: Tensor
    """[B] N"""
    gap: Tensor
    """[B, W]"""
    logp: Mapping[str, Tensor]
    """By column of the evidence: behavior_logp, ..."""
    experts: Mapping[str, Tensor]
    entropy: Tensor
    margin: Tensor
    """[B, W, L]"""
    facts: Facts


def log_softmax(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """As SGLang reports it: of the whole distribution, at the sampling temperature."""
    return (logits / temperature).log_softmax(-1)


def new_scene(seed: int, size: Size | None = None, *, engine_dtype: torch.dtype = torch.bfloat16) -> Scene:
    """A healthy one; the trainer computes in float32."""
    versions = next_versions(new_net(seed), NUM_VERSIONS - 1, seed=seed)
    engine = Engine(net=versions[-1].copy(engine_dtype), logp=log_softmax)
    trainer = versions[-1].copy(attention="eager")
    return Scene(size=size or Size(), seed=seed, versions=versions, engine=engine, trainer=trainer)


def play(scene: Scene) -> Record:
    """Sample, then let engine and trainer score what was sampled."""
    generator = torch.Generator().manual_seed(_SAMPLING_SEED + scene.seed)
    ids, num_prompt, num_tokens = _prompts(scene.size, generator)
    parts = [
        _sample(scene, gap, part, num, generator)
        for gap, part, num in zip(
            scene.gaps, ids.chunk(len(scene.gaps)), num_prompt.chunk(len(scene.gaps)), strict=True
        )
    ]
    ids, behavior_logp, behavior, gap = (torch.cat(column) for column in zip(*parts, strict=True))
    engine, natural = scene.engine.net.forward(ids), scene.trainer.forward(ids)
    distribution = (natural.logits / scene.trainer_temperature).log_softmax(-1)
    return Record(
        ids=ids,
        num_prompt=num_prompt,
        num_tokens=num_tokens,
        gap=gap,
        logp={
            "behavior_logp": behavior_logp,
            "engine_logp": _of_tokens(scene.engine.logp(engine.logits, 1.0, 1.0), ids),
            "natural_logp": _of_tokens(distribution, ids),
            "repeat_logp": _again(scene, ids),
        },
        experts={"behavior": behavior, "engine": engine.chosen, "natural": natural.chosen},
        entropy=_next(-(distribution.exp() * distribution).sum(-1)[:, :-1]),
        margin=_margin(natural),
        facts=Facts(
            model="zoo",
            num_experts=EXPERTS,
            temperature=scene.trainer_temperature,
            trainer_dtype="float32",
            engine_dtype=str(scene.engine.net.model.dtype).removeprefix("torch."),
        ),
    )


def replay(record: Record, scene: Scene) -> Record:
    """Add the pass in which the trainer uses the recorded experts, as it trains if the scene says so."""
    replayed = scene.trainer.forward(record.ids, replayed=record.experts["behavior"])
    distribution = (replayed.logits / scene.trainer_temperature).log_softmax(-1)
    logp = {**record.logp, "replayed_logp": _of_tokens(distribution, record.ids)}
    facts = replace(record.facts, router_replay="engine" if scene.replays else "off")
    return replace(record, logp=logp, experts={**record.experts, "shadow": replayed.chosen}, facts=facts)


def evidence(record: Record, name: str) -> Evidence:
    """Flat, without padding."""
    place = torch.arange(record.ids.shape[1])
    is_token = place < record.num_tokens[:, None]
    is_response = is_token & (place >= record.num_prompt[:, None])
    is_row = place < record.num_tokens[:, None] - 1

    def responses(padded: Tensor) -> np.ndarray:
        return padded[is_response].numpy().astype(np.float32)

    logp = {column: responses(padded) for column, padded in record.logp.items()}
    num_prompt = record.num_prompt.numpy().astype(np.int32)
    return Evidence(
        name=name,
        facts=record.facts,
        num_prompt=num_prompt,
        num_response=record.num_tokens.numpy().astype(np.int32) - num_prompt,
        tokens=record.ids[is_token].numpy().astype(np.int32),
        is_sampled=np.ones(int(is_response.sum()), np.bool_),
        policy_logp=logp["replayed_logp" if record.facts.router_replay == "engine" else "natural_logp"],
        entropy=responses(record.entropy),
        version_gap=record.gap[is_response].numpy().astype(np.int32),
        uid=[f"prompt-{i}" for i in range(len(num_prompt))],
        is_routed=np.ones(len(num_prompt), np.bool_),
        experts={who: padded[is_row].numpy().astype(np.int16) for who, padded in record.experts.items()},
        margin=record.margin[is_row].numpy().astype(np.float32),
        **logp,
    )


# ----------------------------------------------------------------------------------------------- the engine


def _prompts(size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random ids [B, W], of which the prompts are kept, with P and N of every sequence."""

    def draw(low: int, high: int, num: int) -> Tensor:
        return torch.randint(low, high + 1, (num,), generator=generator)

    num_prompt = draw(*size.prompt_tokens, size.prompts).repeat_interleave(size.group)
    num_tokens = num_prompt + draw(*size.response_tokens, len(num_prompt))
    width = int(num_tokens.max())
    ids = torch.randint(1, VOCABULARY, (size.prompts, width), generator=generator)
    ids[:, : size.shared_tokens] = ids[0, : size.shared_tokens]
    return ids.repeat_interleave(size.group, 0), num_prompt, num_tokens


def _sample(
    scene: Scene, gap: int, ids: Tensor, num_prompt: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token by token with a cache.

    Returns:
        ids, behavior_logp, experts, gap
    """
    engine, width = scene.engine, ids.shape[1]
    dtype = engine.net.model.dtype
    lagging = [engine.net, *(net.copy(dtype) for net in scene.versions[-2::-1])]
    first, middle = int(num_prompt.min()), (int(num_prompt.min()) + width) // 2
    is_prompt = torch.arange(width) < num_prompt[:, None]
    out, read = ids.clone(), engine.prompts(ids)
    logp, gaps = torch.zeros(ids.shape), torch.full(ids.shape, gap)
    cache, chosen = DynamicCache(), []
    start = 0
    for end in range(first, width):
        current = gap if end < middle else max(gap - 1, 0)
        net = engine.prefix if engine.prefix and not start else lagging[current]
        step = net.forward(read[:, start:end], cache=cache)
        chosen.append(step.chosen)
        logits = step.logits[:, -1]
        drawn = _draw(logits / engine.temperature, engine.top_p, generator)
        out[:, end] = torch.where(is_prompt[:, end], out[:, end], drawn)
        read = torch.where(is_prompt, read, out)
        reported = engine.logp(logits, engine.temperature, engine.top_p)
        logp[:, end] = reported.gather(1, out[:, end, None])[:, 0]
        gaps[:, end] = current
        start = end
    experts = torch.cat([*chosen, chosen[-1][:, -1:]], 1)  # the last token is never processed
    return out, logp, experts, gaps


def _draw(logits: Tensor, top_p: float, generator: torch.Generator) -> Tensor:
    """[B] from the nucleus of [B, V]."""
    probability, token = logits.softmax(-1).sort(-1, descending=True)
    probability = probability.masked_fill(probability.cumsum(-1) - probability >= top_p, 0)
    return token.gather(1, torch.multinomial(probability, 1, generator=generator))[:, 0]


# ---------------------------------------------------------------------------------------------- the trainer


def _again(scene: Scene, ids: Tensor) -> Tensor:
    """Once more in other company: two halves, the second one first."""
    half, parts = len(ids) // 2, list[Tensor]()
    for part in (ids[half:], ids[:half]):
        logits = scene.trainer.forward(part).logits / scene.trainer_temperature
        parts.append(_of_tokens(logits.log_softmax(-1), part))
    return torch.cat(parts[::-1])


def _of_tokens(logp: Tensor, ids: Tensor) -> Tensor:
    """[B, W] of the tokens that came, from [B, W, V] of those that might have come next."""
    return _next(logp[:, :-1].gather(2, ids[:, 1:, None])[..., 0])


def _next(of_rows: Tensor) -> Tensor:
    """[B, W]: what row p says of the next token, at p + 1; of the first token no row says anything."""
    return torch.nn.functional.pad(of_rows, (1, 0))


def _margin(step: Pass) -> Tensor:
    """[B, W, L] by what the last expert chosen is ahead of the first one left out."""
    topk = step.chosen.shape[-1]
    best = step.scores.topk(topk + 1, -1).values
    return best[..., -2] - best[..., -1]
