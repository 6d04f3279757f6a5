"""A mixture-of-experts model in numpy, small enough to be sampled in a test, and evidence of it with one failure injected.

Attention is the running mean of values, so that what was cached with other weights can be told apart.  The
vocabulary is one in which some tokens are certain and some are not.

Shape key:  B sequences, N = P + T tokens, L layers, E experts, K per token, H width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from megatron_vespo.evidence import Evidence, Facts

B, P, T, L, E, K, H, V = 48, 10, 56, 4, 8, 2, 24, 48
TEMPLATE = (1, 2, 3), (4, 5)
"""Tokens that begin and end every prompt."""


@dataclass
class Weights:
    embed: np.ndarray
    value: np.ndarray
    router: np.ndarray
    up: np.ndarray
    down: np.ndarray
    head: np.ndarray

    def moved(self, rng, size: float) -> Weights:
        """An optimizer step: every weight moves by about `size` of its own scale."""
        return Weights(**{
            name: w + size * w.std() * rng.standard_normal(w.shape) for name, w in vars(self).items()
        })  # fmt: skip


def random_weights(rng) -> Weights:
    normal = rng.standard_normal
    return Weights(
        embed=normal((V, H)),
        value=0.7 * normal((L, H, H)) / H**0.5,
        router=2.0 * normal((L, H, E)) / H**0.5,
        up=normal((L, E, H, H)) / H**0.5,
        down=1.0 * normal((L, E, H, H)) / H**0.5,
        head=normal((H, V)) * np.geomspace(0.6, 2.2, V) * 4.0 / H**0.5,
    )


@dataclass
class Pass:
    """What one engine says: log_p [B, N - 1, V] of the next token, experts and shadow [B, N - 1, L, K], margin [B, N - 1, L]."""

    tokens: np.ndarray
    log_p: np.ndarray
    experts: np.ndarray
    shadow: np.ndarray
    margin: np.ndarray

    @property
    def logp(self) -> np.ndarray:
        """[B, T]"""
        return np.take_along_axis(self.log_p, self.tokens[:, 1:, None], -1)[..., 0][:, P - 1 :]

    @property
    def entropy(self) -> np.ndarray:
        return -(np.exp(self.log_p) * self.log_p).sum(-1)[:, P - 1 :]


@dataclass
class Engine:
    """Arithmetic noise of `noise` (relative, on the residual stream) around `weights`."""

    weights: Weights
    rng: np.random.Generator
    noise: float = 0.0
    temperature: float = 1.0
    cached: Weights | None = None
    """With which the prompt's keys and values were computed, if not with `weights`."""

    def forward(self, tokens, experts=None) -> Pass:
        run = _Run(self)
        outs = [
            run.step(tokens[:, p], p, None if experts is None else experts[:, p])
            for p in range(tokens.shape[1] - 1)
        ]
        return Pass(tokens, *(np.stack(part, 1) for part in zip(*outs, strict=True)))

    def sample(self, prompts, top_p: float = 1.0) -> Pass:
        run, tokens, outs = _Run(self), list(prompts.T), []
        for p in range(P + T - 1):
            outs.append(run.step(tokens[p], p, None))
            if p >= P - 1:
                tokens.append(self._draw(np.exp(outs[-1][0]), top_p))
        return Pass(np.stack(tokens, 1), *(np.stack(part, 1) for part in zip(*outs, strict=True)))

    def _draw(self, p, top_p: float):
        p = truncated(p, top_p)
        return (p.cumsum(-1) > self.rng.random((len(p), 1)) * p.sum(-1, keepdims=True)).argmax(-1)


def truncated(p, top_p: float):
    """p within the nucleus, 0 outside, normalised."""
    order = np.sort(p, -1)[..., ::-1]
    before = order.cumsum(-1) - order
    least = np.where(before < top_p, order, np.inf).min(-1, keepdims=True)
    kept = np.where(p >= least, p, 0.0)
    return kept / kept.sum(-1, keepdims=True)


class _Run:
    """Position by position, with what was cached."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.sums, self.stale = engine, np.zeros((L, 1, H)), None
        self.shadow_run = _Run(replace(engine, weights=engine.cached, cached=None)) if engine.cached else None

    def step(self, token, position, chosen):
        if self.shadow_run is not None and position < P - 1:  # the prompt comes from a cache of other weights
            out = self.shadow_run.step(token, position, chosen)
            self.sums = self.shadow_run.sums
            return out
        w, rng, noise = self.engine.weights, self.engine.rng, self.engine.noise
        x, experts, shadow, margin = w.embed[token], [], [], []
        sums = []
        for layer in range(L):
            h = _norm(x)
            sums.append(self.sums[layer] + h @ w.value[layer])
            x = x + sums[-1] / (position + 1) ** 0.5
            x = x + noise * rng.standard_normal(x.shape) * np.abs(x).mean()
            h = _norm(x)
            scores = h @ w.router[layer]
            order = np.argsort(-scores, -1)
            shadow.append(order[:, :K])
            margin.append(
                np.take_along_axis(scores, order[:, K - 1 : K], -1)[:, 0]
                - np.take_along_axis(scores, order[:, K : K + 1], -1)[:, 0]
            )
            ids = order[:, :K] if chosen is None else chosen[:, layer]
            experts.append(ids)
            gate = np.exp(np.take_along_axis(scores, ids, -1))
            gate /= gate.sum(-1, keepdims=True)
            inner = np.tanh(np.einsum("bh,bkhf->bkf", h, w.up[layer][ids]))
            x = x + np.einsum("bk,bkf,bkfh->bh", gate, inner, w.down[layer][ids])
        self.sums = np.stack(sums)
        logits = _norm(x) @ w.head / self.engine.temperature
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return log_p, np.stack(experts, 1), np.stack(shadow, 1), np.stack(margin, 1)


def _norm(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True))


@dataclass
class World:
    """A model, its trainer and its engine; `evidence()` is healthy until something is changed in between."""

    seed: int
    noise: float = 1e-3
    weights: Weights = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.weights = random_weights(np.random.default_rng(7))
        begin, end = TEMPLATE
        content = self.rng.integers(6, V, (B, P - len(begin) - len(end)))
        self.prompts = np.concatenate([np.tile(begin, (B, 1)), content, np.tile(end, (B, 1))], 1)

    def engine(self, weights: Weights | None = None, noise: float | None = None, **options) -> Engine:
        return Engine(weights or self.weights, self.rng, self.noise if noise is None else noise, **options)

    def evidence(self, sampled: Pass | None = None, rescored: Pass | None = None, **changes) -> Evidence:
        """Of a trainer that has `self.weights`; `sampled` and `rescored` are the engine's passes, healthy by default."""
        sampled = sampled or self.engine().sample(self.prompts)
        tokens = changes.pop("tokens", sampled.tokens)
        trainer = self.engine(noise=self.noise / 2)
        rescored = rescored or self.engine().forward(tokens)
        natural, repeat = trainer.forward(tokens), trainer.forward(tokens)
        replayed = trainer.forward(tokens, sampled.experts)
        flat = lambda x: np.ascontiguousarray(x.reshape(-1), np.float32)  # noqa: E731
        rows = lambda x: np.sort(x.reshape(-1, L, K), -1).astype(np.int16)  # noqa: E731
        columns = {
            "name": "toy",
            "facts": Facts(num_experts=E),
            "num_prompt": np.full(B, P, np.int32),
            "num_response": np.full(B, T, np.int32),
            "tokens": tokens.reshape(-1).astype(np.int32),
            "is_sampled": np.ones(B * T, bool),
            "behavior_logp": flat(sampled.logp),
            "policy_logp": flat(natural.logp),
            "natural_logp": flat(natural.logp),
            "engine_logp": flat(rescored.logp),
            "repeat_logp": flat(repeat.logp),
            "replayed_logp": flat(replayed.logp),
            "entropy": flat(natural.entropy),
            "version_gap": np.zeros(B * T, np.int32),
            "step": np.zeros(B, np.int32),
            "is_routed": np.ones(B, bool),
            "experts": {
                "behavior": rows(sampled.experts), "engine": rows(rescored.experts),
                "natural": rows(natural.experts), "shadow": rows(replayed.shadow),
            },
            "margin": natural.margin.reshape(-1, L).astype(np.float32),
        }  # fmt: skip
        return Evidence(**(columns | changes))
