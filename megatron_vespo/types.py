"""The nouns that cross rooms, and the protocols between them.

Every record is complete when it is constructed and is never changed; arrays are numpy, so that Ray maps
them without a copy and no room needs another room's tensor library.

Shape key:  P prompt tokens, T response tokens, N = P + T, L layers with a router, K experts per token,
            G responses of one prompt, B sequences of one optimizer step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Halves = NDArray[np.float16]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Experts = NDArray[np.uint8 | np.uint16]
Mask = NDArray[np.bool_]


class RunError(RuntimeError):
    """The world misbehaved (a process, a server, a number); the message says what, and what to do."""


class Interrupted(Exception):
    """A person or the scheduler stopped the run; the message says what was kept, and how to go on."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One row of the prompt file, tokenized with the model's chat template (written by data/)."""

    uid: str
    token_ids: Ints
    """[P], ends where the assistant's turn begins."""
    text: str
    """The rendered chat template: what `token_ids` spell."""
    answer: str


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """From which distribution the engine draws, and how many tokens at most."""

    temperature: float
    max_tokens: int
    top_p: float = 1.0
    """Below 1 only where nothing is trained on: the engine's log-probs are those of the whole distribution."""


@dataclass(frozen=True, kw_only=True)
class VersionSpan:
    """Response tokens [start, end) were sampled under weight version `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Response:
    """What followed one prompt, and how it was sampled (written by rollout/; several turns are joined by control/)."""

    token_ids: Ints
    """[T], the end-of-turn token included when it was sampled."""
    text: str
    """Of the last turn."""
    behavior_logp: Floats
    """[T], nats, at the sampling temperature, from the forward pass that sampled the token; 0 where not sampled."""
    spans: tuple[VersionSpan, ...]
    """Cover [0, T) without gap or overlap, versions ascending."""
    experts: Experts | None
    """[N - 1, L, K]: row p holds the experts used while processing token p. None if not recorded."""
    finish_reason: str
    """"stop" (end-of-turn sampled) or "length"."""
    sampled: Mask | None = None
    """[T], false where an environment wrote the token: such tokens are read, and neither trained on nor counted. None: all."""
    num_turns: int = 1
    num_resumed: int = 0
    """Times that it was interrupted by a weight push or a lost engine and continued, its tokens kept."""
    engine: str = ""
    """Name of the engine that sampled its end."""

    @property
    def num_sampled(self) -> int:
        """Tokens that the engine sampled."""
        return len(self.token_ids) if self.sampled is None else int(self.sampled.sum())

    @property
    def versions(self) -> Ints:
        """[T], the weight version that sampled each token."""
        return np.concatenate([np.full(s.end - s.start, s.version, np.int32) for s in self.spans])


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One prompt with one response, its reward and the advantage relative to its group."""

    prompt: Prompt
    response: Response
    reward: float
    advantage: float


@dataclass(frozen=True, kw_only=True)
class Group:
    """The rollouts of one prompt."""

    rollouts: tuple[Rollout, ...]
    ordinal: int
    """Place of the prompt in the prompt stream, counted over epochs: names this visit to the prompt for ever."""


@dataclass(frozen=True, kw_only=True)
class TrainSequence:
    """One sequence as the trainer sees it."""

    uid: str
    """Names the sequence in error messages."""
    token_ids: Ints
    """[N], prompt and response."""
    num_prompt_tokens: int
    """P >= 1: the log-probs of tokens P .. N-1 are trained on (or scored)."""
    advantage: float = 1.0
    behavior_logp: Floats | None = None
    """[T]; None where no importance weight exists (supervised fine-tuning, scoring)."""
    experts: Experts | None = None
    """[N - 1, L, K]: the engine's choices, where the trainer is to repeat them."""
    group: int = 0
    """The same for all responses to one prompt."""
    sampled: Mask | None = None
    """[T], false for tokens that an environment wrote: they are read and scored, but carry no loss, no importance weight
    and no share of a denominator.  None: all true."""

    @property
    def num_response_tokens(self) -> int:
        """T"""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_trained(self) -> Mask:
        """[T] which response tokens carry loss."""
        return np.ones(self.num_response_tokens, np.bool_) if self.sampled is None else self.sampled

    @property
    def num_trained_tokens(self) -> int:
        """How many of them."""
        return self.num_response_tokens if self.sampled is None else int(self.sampled.sum())


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What one engine, trainer or SGLang, computes for one given sequence under one weight version."""

    logp: Floats
    """[T], nats, at the sampling temperature."""
    experts: Experts | None
    """[N - 1, L, K], rows as in `Response.experts`; the order of the K experts means nothing."""
    entropy: Floats | None = None
    """[T], nats, of the full next-token distribution; the trainer alone knows it."""
    top_k_mass: Floats | None = None
    """[T], probability of the trainer.logprob_top_k most likely tokens together; None if not asked for."""


@dataclass(frozen=True, kw_only=True)
class Examined:
    """One sequence in the trainer's passes that tell causes apart, all under the same weights (docs/doctor.md)."""

    natural: Scored
    """The trainer chooses the experts."""
    repeat: Floats
    """[T] log-probs of the natural pass, computed once more: what differs is the trainer's own noise."""
    replayed: Scored | None
    """The engine's experts are used; `experts` are what the trainer would have chosen in each layer.  None where the
    engine's experts are not known."""
    margin: Floats | None
    """[N - 1, L] in the natural pass: score of the K-th expert minus that of the next, of the very scores that selected
    them, rounded to float16; infinite where all experts are used.  None for dense models."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """One optimizer update, in numbers that were summed over all ranks before anything was divided."""

    loss: float
    """Of the weights before the update; the penalty is part of it."""
    grad_norm: float
    """Euclidean norm over all parameters, before clipping."""
    learning_rate: float
    entropy: float
    """Mean over trained tokens of the policy's entropy, nats."""
    kl: float | None
    """Mean over trained tokens of the k3 estimate of KL(pi || reference), nats; None without a reference."""
    num_tokens: int
    """Trained tokens: response tokens that carry loss."""
    num_microbatches: int
    """On each data rank."""
    num_inputs: int
    """Tokens of sequences that were processed, over all data ranks."""
    num_packed: int
    """The same with the padding that fills the packs."""


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What the updates on one batch computed; sequences are in the order in which they were given."""

    scored: tuple[Scored, ...]
    """Under the weights before the *first* update.  Under replay the experts are what the trainer would have chosen."""
    log_w: Doubles
    """[B'], sum over the trained tokens of (policy_logp - reference_logp), with the policy as each sequence's own update found it
    and algorithm.reference; 0 where there is no behavior.  B' < B where the last updates were left out
    (algorithm.min_living_weight), else B."""
    coefficient: Doubles
    """[B'], mean over the trained tokens of the detached coefficient; phi(W) for VESPO."""
    updates: tuple[Update, ...]
    time_s: Mapping[str, float] = field(default_factory=dict[str, float])
    """Seconds by phase, of the slowest rank."""
    memory_bytes: Mapping[str, int] = field(default_factory=dict[str, int])
    """Peak by phase, of the fullest rank: of its device, or of its process on CPU."""
    model_flops: float = 0.0
    """Useful operations of the updates, over all ranks (no recomputation, no scoring passes)."""
    num_ranks: int = 1
    peak_flops_s: float | None = None
    """bfloat16 operations per second of one rank's device; None where they are not known."""

    @property
    def loss(self) -> float:
        """Mean over the updates."""
        return sum(update.loss for update in self.updates) / len(self.updates)

    @property
    def grad_norm(self) -> float:
        """The largest of the updates."""
        return max(update.grad_norm for update in self.updates)

    @property
    def learning_rate(self) -> float:
        """Of the last update."""
        return self.updates[-1].learning_rate

    @property
    def flops_s(self) -> float:
        """Useful operations per second of one rank, over all phases."""
        return self.model_flops / self.num_ranks / max(sum(self.time_s.values()), 1e-9)


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """One confirmed weight push."""

    version: int
    num_bytes: int
    time_s: Mapping[str, float]
    canary_abs_max: float
    """Largest |trainer logp - engine logp| over the canary tokens under the new weights, all engines, nats."""
    canary_variance: float = 0.0
    """Mean square of the same: the engines' own noise on one token, nats^2."""
    canary_abs_mean: float = 0.0
    """Mean |trainer logp - engine logp| of the same, nats."""
    canary_k3_nats: float = 0.0
    """Mean of exp(d) - 1 - d of the same, d = trainer - engine."""
    canary_expert_mismatch: float | None = None
    """Share of (token, layer) whose expert sets differ on the canary; None where one side does not record experts."""
    num_engines: int = 1
    """Engines that serve `version` now, confirmed."""
    num_lost: int = 0
    """Engines that were lost during the push; each is started again."""
    changed: bool | None = None
    """Whether the engines' weights differ from those before, by their digest; None where there is none to compare."""


class Trainer(Protocol):
    """pi: the policy's weights and their optimizer, on all ranks together."""

    async def step(
        self,
        sequences: Sequence[TrainSequence],
        noise_variance: float = 0.0,
        routed: Sequence[int] | None = None,
    ) -> StepOutput:
        """The optimizer updates on one batch, which make the next version.

        Args:
            noise_variance: of one token's behavior log-prob by the engine's arithmetic, nats^2.
            routed: places of the sequences for which expert choices are reported; None: for all.
        """
        ...

    async def examine(self, sequences: Sequence[TrainSequence]) -> tuple[Examined, ...]:
        """The passes that tell causes apart, under the current weights; no gradient, nothing changes.

        Args:
            sequences: with the engine's experts, where those are to be replayed.
        """
        ...

    async def save(self, version: int, state: Mapping[str, Any]) -> None:
        """Begin a checkpoint from which a run resumes after `version` steps; training may go on while it is written."""
        ...


class Publisher(Protocol):
    """mu <- pi."""

    async def publish(self, version: int) -> SyncReport:
        """Have at least one engine serve the trainer's weights as `version`, confirmed; the others follow or are restarted."""
        ...

    async def follow(self) -> None:
        """For ever: give the weights to engines that come, or come back, between two steps."""
        ...


class Engine(Protocol):
    """mu: whatever samples the responses."""

    async def sample(self, prompt: Prompt, num: int, sampling: Sampling) -> tuple[Response, ...]:
        """Sample `num` responses to one prompt, whatever happens to single engines meanwhile."""
        ...

    async def score(self, sequences: Sequence[TrainSequence]) -> tuple[Scored | None, ...]:
        """Log-probs and experts of given sequences under the newest weights that are served; None where none are."""
        ...


class Environment(Protocol):
    """The other side of a conversation: tools, a simulated user, a game."""

    async def reply(self, prompt: Prompt, response: Response) -> Ints | None:
        """What is appended after the turn that ends `response`: token ids up to where the next turn of the assistant begins.

        None ends the conversation.
        """
        ...


class Verifier(Protocol):
    """A rule that computes rewards."""

    @property
    def failures(self) -> Mapping[str, int]:
        """Responses so far that could not be judged and got the stated reward instead, by what happened: timeouts, ..."""
        ...

    async def score(self, prompt: Prompt, responses: Sequence[Response]) -> tuple[float, ...]:
        """One reward per response."""
        ...
