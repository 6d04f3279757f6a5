"""Level "toy": a policy of some thousand weights, trained in one process with the product's own algo/.

The task: each of a few prompts has one fixed random string, and reward is 1 exactly if the whole response is right.
The policy sees prompt, position and previous token.  Its warm start is right but for some positions, where it takes a
distractor now and then.  Shared weights and an all-or-nothing reward of the whole sequence are what make stale data
harmful; with independent positions or additive rewards nothing collapses.

Everything random comes from generators that the seed alone determines: the same cell gives the same numbers.

Shape key:  B sequences, T positions, S tokens (of all sequences, packed), C contexts, V tokens of the vocabulary,
            H hidden units, E experts.
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor, nn

from megatron_vespo.algo.advantages import batch_normalised, group_advantages, zero_mean
from megatron_vespo.algo.coefficients import Ratios, coefficient
from megatron_vespo.algo.loss import policy_loss, token_weights
from megatron_vespo.algo.pace import is_spent, rate_factor
from megatron_vespo.algo.statistics import effective_fraction
from megatron_vespo.config import AlgorithmConfig, ConfigError
from tools.staleness.grid import summary

ALPHABET = 16
EOS, BOS = ALPHABET, ALPHABET + 1
PROMPTS_PER_UPDATE, GROUP_SIZE = 8, 8
EVALUATION_SAMPLES = 64
"""Of each prompt."""
MOST_EVALUATIONS = 24
TASK_SEED = 1234

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]


class Problem(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """What is learned, and by whom: all that a warm start depends on but the seed."""

    prompts: Positive = 8
    shortest: Positive = 20
    longest: Positive = 28
    """Tokens of a prompt's string, EOS not counted, drawn evenly."""
    decisions: Positive = 6
    """Positions of each string at which the warm start takes a distractor now and then."""
    accuracy: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """How often it is right there."""
    tail: NotNegative = 0.0
    """Mean number of free tokens after the string, all alike to the reward: high entropy, and a length to be exploited."""
    policy: Literal["dense", "moe"] = "dense"
    """"moe": top 2 of 8 experts."""
    warm_updates: Positive = 600
    """Of the fine-tuning on demonstrations."""

    @property
    def positions(self) -> int:
        """Longest response: one that does not end within this is wrong."""
        return self.longest + 1 + math.ceil(3 * self.tail)


class Settings(Problem, frozen=True):
    """A cell."""

    level: Literal["toy"]
    algorithm: str
    overrides: dict[str, Any]
    seed: int
    learning_rate: Annotated[float, Field(gt=0)]
    num_updates: Positive = 768
    N: Positive
    """Updates on each batch."""
    staleness: Annotated[int, Field(ge=0)] = 0
    """S: batch t is sampled by the weights at the start of batch t - S."""
    engine_noise: NotNegative = 0.0
    """Standard deviation of noise on every logit of the sampler; its log-probs are those of the noisy logits."""
    router_noise: NotNegative = 0.0
    """Standard deviation of noise on every router logit of the sampler ("moe")."""

    @property
    def problem(self) -> Problem:
        return Problem(**self.model_dump(include=set(Problem.model_fields)))

    @property
    def algorithm_config(self) -> AlgorithmConfig:
        tree: dict[str, Any] = {}
        for key, value in self.overrides.items():
            *parents, leaf = key.split(".")
            functools.reduce(lambda table, name: table.setdefault(name, {}), parents, tree)[leaf] = value
        return AlgorithmConfig.model_validate(tree)


def check(cell: dict[str, Any]) -> None:
    """Refuse settings that this level does not know.

    Raises:
        ConfigError: naming them.
    """
    try:
        settings = Settings.model_validate(cell)
        _ = settings.algorithm_config
    except ValidationError as err:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in err.errors()]
        raise ConfigError(f"cell = {cell}: {'; '.join(lines)}; mend the grid") from None
    if settings.router_noise and settings.policy != "moe":
        raise ConfigError(
            f"router_noise = {settings.router_noise}: policy = 'dense' has no router; take it out"
        )


@contextmanager
def open_level() -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """Nothing to set up but one thread a process: the cells run in parallel."""
    torch.set_num_threads(1)
    yield run


def run(cell: dict[str, Any]) -> dict[str, Any]:
    """Train one cell."""
    started_s, cpu_started_s = time.monotonic(), time.process_time()
    history = Training(Settings.model_validate(cell)).history()
    return {
        **summary(history),
        "wall_s": time.monotonic() - started_s,
        "cpu_s": time.process_time() - cpu_started_s,
    }


class Task:
    """The strings, and what is right."""

    def __init__(self, problem: Problem):
        draw = torch.Generator().manual_seed(TASK_SEED)
        self.problem = problem
        shape = (problem.prompts, problem.positions)
        self.length = torch.randint(problem.shortest, problem.longest + 1, (problem.prompts,), generator=draw)
        self.in_string = torch.arange(problem.positions) < self.length[:, None]
        self.target = torch.randint(0, ALPHABET, shape, generator=draw).where(self.in_string, EOS)
        order = torch.rand(shape, generator=draw).masked_fill(~self.in_string, 2).argsort(1)
        self.decision = torch.zeros(shape, dtype=torch.bool).scatter(1, order[:, : problem.decisions], True)
        self.distractor = (self.target + torch.randint(1, ALPHABET, shape, generator=draw)) % ALPHABET

    def reward(self, prompt_B: Tensor, token_BT: Tensor, length_B: Tensor) -> Tensor:
        """[B] 1 where the string is right and the response ends: at once, or after its free tail."""
        right = ((token_BT == self.target[prompt_B]) | ~self.in_string[prompt_B]).all(1)
        ends = token_BT.gather(1, length_B[:, None] - 1)[:, 0] == EOS
        free = length_B - 1 - self.length[prompt_B]
        return (right & ends & (free >= 0) & ((free == 0) | (self.problem.tail > 0))).float()

    def demonstrations(self, num: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts, tokens and lengths as the warm start is to produce them."""
        problem = self.problem
        prompt_B = torch.randint(0, problem.prompts, (num,), generator=draw)
        length_B = self.length[prompt_B]
        shape = (num, problem.positions)
        wrong = self.decision[prompt_B] & (torch.rand(shape, generator=draw) > problem.accuracy)
        token_BT = torch.where(wrong, self.distractor[prompt_B], self.target[prompt_B])
        if problem.tail:
            stop = 1 / (1 + problem.tail)
            tail_B = (torch.rand(num, generator=draw).log() / math.log(1 - stop)).long()
            length_B = (length_B + tail_B).clamp(max=problem.positions - 1)
            free = torch.randint(0, ALPHABET, shape, generator=draw)
            in_tail = ~self.in_string[prompt_B] & (torch.arange(problem.positions) < length_B[:, None])
            token_BT = free.where(in_tail, token_BT)
        # everything is possible, if hardly: a policy that has never seen a token has no useful log-prob of it
        slip = torch.rand(shape, generator=draw) < 0.002
        token_BT = torch.randint(0, ALPHABET + 1, shape, generator=draw).where(slip, token_BT)
        return prompt_B, token_BT, length_B + 1


class Policy(nn.Module):
    """Embeddings of prompt, position and previous token, then an MLP or a top-2 mixture of experts.

    A context is one integer for the three, so that equal ones are computed once (`log_probs`).
    """

    EMBEDDING, HIDDEN, EXPERTS, TOP = 24, 48, 8, 2

    def __init__(self, problem: Problem):
        super().__init__()
        self.sizes = (problem.prompts, problem.positions, ALPHABET + 2)
        self.moe = problem.policy == "moe"
        hidden, experts = self.HIDDEN, self.EXPERTS
        self.embeddings = nn.ParameterList(torch.randn(size, self.EMBEDDING) for size in self.sizes)
        self.first = nn.Linear(3 * self.EMBEDDING, hidden + (experts + experts * hidden if self.moe else 0))
        if self.moe:
            self.second = nn.Parameter(torch.randn(experts, hidden, hidden) / math.sqrt(hidden))
        else:
            self.dense = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, ALPHABET + 1)

    @property
    def num_contexts(self) -> int:
        return math.prod(self.sizes)

    def context(self, prompt: Tensor, position: Tensor | int, previous: Tensor) -> Tensor:
        return (prompt * self.sizes[1] + position) * self.sizes[2] + previous

    def parts(self, context_C: Tensor) -> tuple[Tensor, ...]:
        """All that does not depend on the routing: [C, H] (dense); [C, H], router logits and outputs of all experts."""
        position_previous = self.sizes[1] * self.sizes[2]
        indices = (
            context_C // position_previous,
            context_C % position_previous // self.sizes[2],
            context_C % self.sizes[2],
        )
        # the first layer is linear: apply it to the few embeddings, not to every context
        weights = self.first.weight.split(self.EMBEDDING, 1)
        x_CH = self.first.bias + sum(
            F.embedding(index, F.linear(table, weight))
            for index, table, weight in zip(indices, self.embeddings, weights, strict=True)
        )
        if not self.moe:
            return (self.dense(F.silu(x_CH)),)
        skip_CH, router_CE, inner = x_CH.split((self.HIDDEN, self.EXPERTS, self.EXPERTS * self.HIDDEN), 1)
        inner_CEH = F.silu(inner).view(-1, self.EXPERTS, self.HIDDEN)
        return skip_CH, router_CE, torch.einsum("ceh,ehk->cek", inner_CEH, self.second)

    def logits(self, parts: tuple[Tensor, ...], router_noise: Tensor | None = None) -> Tensor:
        """[C, V] from `parts`, the experts chosen here."""
        if not self.moe:
            return self.out(F.silu(parts[0]))
        skip_CH, router_CE, outputs_CEH = parts
        noisy_CE = router_CE if router_noise is None else router_CE + router_noise
        top_CK, chosen_CK = noisy_CE.topk(self.TOP, -1)
        gate_CE = torch.zeros_like(noisy_CE).scatter(1, chosen_CK, F.softmax(top_CK, -1))
        return self.out(F.silu(skip_CH + torch.einsum("ce,ceh->ch", gate_CE, outputs_CEH)))

    def log_probs(self, context_S: Tensor, token_S: Tensor) -> Tensor:
        """[S] log-prob of each token in its context, differentiable."""
        context_C, which_S = context_S.unique(return_inverse=True)
        logp_CV = F.log_softmax(self.logits(self.parts(context_C)), -1)
        return logp_CV.view(-1).index_select(0, which_S * (ALPHABET + 1) + token_S)


@dataclass(frozen=True)
class Responses:
    """Responses, padded; what lies beyond a length is meaningless."""

    prompt_B: Tensor
    token_BT: Tensor
    context_BT: Tensor
    length_B: Tensor
    logp_BT: Tensor
    """What the sampler reports."""

    def rows(self, share: slice) -> Responses:
        return Responses(**{name: value[share] for name, value in vars(self).items()})

    @property
    def mask_BT(self) -> Tensor:
        return torch.arange(self.token_BT.shape[1]) < self.length_B[:, None]


@torch.no_grad()
def sample(
    policy: Policy,
    prompt_B: Tensor,
    draw: torch.Generator,
    *,
    engine_noise: float = 0.0,
    router_noise: float = 0.0,
) -> Responses:
    """Sample one response to each prompt; what the contexts need is computed beforehand, for all of them."""
    shape = (len(prompt_B), policy.sizes[1])
    parts = policy.parts(torch.arange(policy.num_contexts))
    noisy = engine_noise > 0 or router_noise > 0
    logp_CV = F.log_softmax(policy.logits(parts), -1)
    below_CV = logp_CV.exp().cumsum(-1)

    def noisy_logp(context_B: Tensor) -> Tensor:
        shake = [torch.randn(len(prompt_B), size, generator=draw) for size in (policy.EXPERTS, ALPHABET + 1)]
        logits = policy.logits(tuple(part[context_B] for part in parts), router_noise * shake[0])
        return F.log_softmax(logits + engine_noise * shake[1], -1)

    uniform_BT = torch.rand(shape, generator=draw)
    token_BT, context_BT, logp_BT = torch.full(shape, EOS), torch.zeros(shape).long(), torch.zeros(shape)
    previous_B = torch.full_like(prompt_B, BOS)
    for t in range(shape[1]):
        context_B = policy.context(prompt_B, t, previous_B)
        logp_BV = noisy_logp(context_B) if noisy else logp_CV[context_B]
        below_BV = logp_BV.exp().cumsum(-1) if noisy else below_CV[context_B]
        previous_B = (below_BV[:, :-1] <= uniform_BT[:, t, None]).sum(1)
        token_BT[:, t], context_BT[:, t] = previous_B, context_B
        logp_BT[:, t] = logp_BV.gather(1, previous_B[:, None])[:, 0]
    ended_BT = (token_BT == EOS) | (torch.arange(shape[1]) == shape[1] - 1)
    return Responses(prompt_B, token_BT, context_BT, ended_BT.int().argmax(1) + 1, logp_BT)


@functools.lru_cache(maxsize=64)
def warm_start(problem: Problem, seed: int) -> Policy:
    """The policy that every method starts from: fine-tuned on demonstrations.  Copy it before it is trained."""
    task = Task(problem)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = Policy(problem)
    draw = torch.Generator().manual_seed(seed + 77)
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3, fused=True)
    for _ in range(problem.warm_updates):
        prompt_B, token_BT, length_B = task.demonstrations(128, draw)
        previous_BT = F.pad(token_BT[:, :-1], (1, 0), value=BOS)
        context_BT = policy.context(prompt_B[:, None], torch.arange(token_BT.shape[1]), previous_BT)
        mask_BT = torch.arange(token_BT.shape[1]) < length_B[:, None]
        loss = -policy.log_probs(context_BT[mask_BT], token_BT[mask_BT]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


@dataclass(frozen=True)
class Batch:
    """Responses of one rollout, and all that the updates on them need."""

    responses: Responses
    reward_B: Tensor
    advantage_B: Tensor
    reference_BT: Tensor
    """Below pi in every ratio, nats."""
    engine_variance: float
    """Mean square of trainer log-prob - sampler log-prob at the start of the batch, nats^2."""

    def share(self, update: int) -> slice:
        """The sequences of one update."""
        num = PROMPTS_PER_UPDATE * GROUP_SIZE
        return slice(update * num, (update + 1) * num)


class Training:
    """One run: rollouts of N updates' data, and the updates on it."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.algorithm = settings.algorithm_config
        self.task = Task(settings.problem)
        self.policy = copy.deepcopy(warm_start(settings.problem, settings.seed))
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(),
            settings.learning_rate,
            betas=(0.9, 0.999),
            weight_decay=0.01,
            fused=True,
        )
        self.num_updates = 0
        self.samplers: deque[Policy] = deque(maxlen=settings.staleness + 1)
        self.draw = torch.Generator().manual_seed(settings.seed + 1000)

    def history(self) -> list[dict[str, float]]:
        """Train to the end: the evaluation of the start, then one entry a batch, but at most about `MOST_EVALUATIONS`."""
        history = [{"update": 0, "success": self.success()}]
        while self.num_updates < self.settings.num_updates:
            batch = self.rollout()
            statistics = self.train(batch)
            since = self.num_updates - history[-1]["update"]
            ends = self.num_updates == self.settings.num_updates
            if ends or since >= self.settings.num_updates / MOST_EVALUATIONS:
                entry = {"update": self.num_updates, "success": self.success()}
                history.append(entry | {"reward": batch.reward_B.mean().item()} | statistics)
        return history

    def success(self) -> float:
        """Share of right responses of the policy, sampled without any noise of the engine, always by the same draws."""
        prompt_B = torch.arange(self.task.problem.prompts).repeat_interleave(EVALUATION_SAMPLES)
        draw = torch.Generator().manual_seed(self.settings.seed + 2000)
        responses = sample(self.policy, prompt_B, draw)
        reward_B = self.task.reward(responses.prompt_B, responses.token_BT, responses.length_B)
        return reward_B.mean().item()

    def rollout(self) -> Batch:
        """Sample a batch for N updates from the weights of S batches ago."""
        settings = self.settings
        self.samplers.append(copy.deepcopy(self.policy) if settings.staleness else self.policy)
        num_prompts = PROMPTS_PER_UPDATE * min(settings.N, settings.num_updates - self.num_updates)
        drawn = torch.randint(0, settings.prompts, (num_prompts,), generator=self.draw)
        noise = {"engine_noise": settings.engine_noise, "router_noise": settings.router_noise}
        responses = sample(self.samplers[0], drawn.repeat_interleave(GROUP_SIZE), self.draw, **noise)
        reward_B = self.task.reward(responses.prompt_B, responses.token_BT, responses.length_B)
        start_BT = responses.logp_BT
        if self.algorithm.reference == "proximal" or self.algorithm.vespo.noise_aware:
            start_BT = self.scores(responses)
        gap_S = (start_BT - responses.logp_BT)[responses.mask_BT]
        return Batch(
            responses,
            reward_B,
            self.advantages(reward_B),
            start_BT if self.algorithm.reference == "proximal" else responses.logp_BT,
            gap_S.square().mean().item(),
        )

    def advantages(self, reward_B: Tensor) -> Tensor:
        scale = self.algorithm.advantage_scale
        groups = [
            group_advantages(
                reward_G,
                scale="std" if scale == "std" else "none",
                baseline=self.algorithm.advantage_baseline,
            )
            for reward_G in reward_B.view(-1, GROUP_SIZE).tolist()
        ]
        advantage_B = np.concatenate(groups)
        return torch.from_numpy(batch_normalised(advantage_B) if scale == "batch_std" else advantage_B)

    @torch.no_grad()
    def scores(self, responses: Responses) -> Tensor:
        """[B, T] log-probs of the trainer, 0 beyond a length."""
        logp_BT, mask_BT = torch.zeros_like(responses.logp_BT), responses.mask_BT
        logp_BT[mask_BT] = self.policy.log_probs(responses.context_BT[mask_BT], responses.token_BT[mask_BT])
        return logp_BT

    def train(self, batch: Batch) -> dict[str, float]:
        """The updates on one batch; statistics of the last, on the stalest data."""
        statistics: dict[str, float] = {}
        for number in range(len(batch.reward_B) // (PROMPTS_PER_UPDATE * GROUP_SIZE)):
            log_w_B, living = self.update(batch, batch.share(number))
            self.num_updates += 1
            statistics = {
                "log_w_mean": log_w_B.mean().item(),
                "log_w_std": log_w_B.std().item(),
                "ess": effective_fraction(log_w_B.numpy()),
            }
            if len(living):
                statistics["phi_mean"] = living.mean().item()
            if is_spent(self.algorithm, living.numpy()):
                break
        return statistics

    def update(self, batch: Batch, share: slice) -> tuple[Tensor, Tensor]:
        """One optimizer step.

        Returns:
            log W of each sequence, and mean coefficient of each that has an advantage.
        """
        responses, advantage_B = batch.responses.rows(share), batch.advantage_B[share]
        length_B, mask_BT = responses.length_B, responses.mask_BT
        logp_S = self.policy.log_probs(responses.context_BT[mask_BT], responses.token_BT[mask_BT])
        reference_S = batch.reference_BT[share][mask_BT]
        seq_S = torch.arange(len(length_B)).repeat_interleave(length_B)
        ratios = _ratios(logp_S.detach(), reference_S, responses.logp_BT[mask_BT], seq_S, batch)
        c_S = coefficient(self.algorithm, ratios, advantage_B)
        coefficient_B = _sums(c_S, seq_S, len(length_B)) / length_B
        if self.algorithm.zero_mean:
            group = np.arange(len(length_B), dtype=np.int32) // GROUP_SIZE
            advantage_B = torch.from_numpy(zero_mean(advantage_B.numpy(), coefficient_B.numpy(), group))
        weight_B = token_weights(length_B.tolist(), self.algorithm.resolved_aggregation)
        loss = policy_loss(logp_S, c_S, advantage_B.float()[seq_S], torch.from_numpy(weight_B).float()[seq_S])
        self.step(loss, rate_factor(self.algorithm, ratios.log_w_N.numpy()))
        return ratios.log_w_N, coefficient_B[batch.advantage_B[share] != 0]

    def step(self, loss: Tensor, rate_factor: float) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.param_groups[0]["lr"] = self.settings.learning_rate * rate_factor
        self.optimizer.step()


def _ratios(logp_S: Tensor, reference_S: Tensor, sampler_S: Tensor, seq_S: Tensor, batch: Batch) -> Ratios:
    num = int(seq_S[-1]) + 1
    log_ratio_S, log_rho_S = logp_S - reference_S, reference_S - sampler_S
    return Ratios(
        log_ratio_S=log_ratio_S,
        log_w_N=_sums(log_ratio_S, seq_S, num),
        num_tokens_N=_sums(torch.ones_like(logp_S), seq_S, num),
        seq_S=seq_S,
        log_rho_S=log_rho_S,
        log_rho_N=_sums(log_rho_S, seq_S, num),
        noise_variance=batch.engine_variance,
    )


def _sums(value_S: Tensor, seq_S: Tensor, num: int) -> Tensor:
    """float64 [num] sum over each sequence."""
    return torch.zeros(num, dtype=torch.float64).index_add_(0, seq_S, value_S.double())
