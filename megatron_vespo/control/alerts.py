"""What a person must hear of while a run goes on: rules over the metrics of each step, told once when they begin.

An alert is active from the step at which its condition holds until a step at which it does not; where a step lacks the
numbers (most are not examined), it stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from megatron_vespo.algo.norms import NORMS
from megatron_vespo.config import TrainConfig

Metrics = Mapping[str, Any]
"""Of one step, as metrics.jsonl has them."""
Judgement = str | None
"""A message in the house form where a condition holds, "" where it does not, None where the numbers are missing."""

BUDGET_NATS = 1.0
"""Of log W that the engine alone may take from a long sequence: beyond it VESPO's kernel all but deletes the sequence."""
DEAD_SHARE = 0.5
JUMP, JUMP_FLOOR_NATS, JUMP_HISTORY = 3.0, 1e-3, 3
"""The canary's |d| against the median of earlier syncs (a missed push made 13-fold of it), the least that counts as one in
float32, where healthy canaries are rounding, and the least number of earlier syncs."""
_, K3_LIMIT_NATS = NORMS["mismatch/k3_nats"].limits("moe")
"""Qwen3-30B-A3B in bfloat16: 1.5e-3 between SGLang and Megatron; 1.3e-2 was seen before a collapse."""
_, ROUTER_LIMIT = NORMS["router/mismatch"].limits("moe")
"""Of (token, layer): about 0.1 is noise."""
GROWTH, GROWTH_FLOOR_NATS, FIRST_STEPS = 5.0, 1e-5, 10
"""k3 against the median of this run's first steps, and what is too small to matter."""
IDLE_NATS, IDLE_TOKENS = 1e-6, 16
"""A replay that changes no log-prob by more than this, on so many tokens with other experts at least, replays nothing."""


@dataclass(frozen=True, kw_only=True)
class Alert:
    """A rule's condition began or ceased to hold."""

    rule: str
    step: int
    begins: bool
    message: str
    """What was said when it began."""


@dataclass
class _Memory:
    """Of the run so far."""

    canary: list[float] = field(default_factory=list)
    """|d| of syncs that did not jump."""
    k3: list[float] = field(default_factory=list)
    """Of the first steps."""


class Watch:
    """Fed with the metrics of each step, in order; knows nothing of files, clocks or screens."""

    def __init__(self, cfg: TrainConfig) -> None:
        self._cfg, self._memory = cfg, _Memory()
        self._active: dict[str, str] = {}

    @property
    def active(self) -> Mapping[str, str]:
        """Message by rule."""
        return self._active

    def see(self, step: int, metrics: Metrics) -> list[Alert]:
        """The alerts that begin or end with this step."""
        changes = list[Alert]()
        for rule, judge in _RULES.items():
            message = judge(metrics, self._memory, self._cfg)
            if message is None or bool(message) == (rule in self._active):
                continue
            said = message or self._active[rule]
            changes.append(Alert(rule=rule, step=step, begins=bool(message), message=said))
            if message:
                self._active[rule] = message
            else:
                del self._active[rule]
        return changes


def _budget(metrics: Metrics, memory: _Memory, cfg: TrainConfig) -> Judgement:
    k3, length = metrics.get("mismatch/k3_nats"), metrics.get("response/length_p95")
    if k3 is None or length is None or cfg.algorithm.reference != "behavior":  # else the engine is in no W
        return None
    nats = k3 * length
    if nats <= BUDGET_NATS:
        return ""
    return (
        f"engine mismatch = {k3:.1e} nats per token x {length:.0f} tokens (95th percentile) = {nats:.1f} nats of log W: expected "
        f"at most {BUDGET_NATS:g}, because a whole-sequence weight falls by that much before the policy has moved; look at cause/ "
        "for what makes it, repeat the engine's experts (trainer.router_replay = 'engine') where that is routing, or leave the "
        "engine out of W (algorithm.reference = 'proximal')"
    )


def _dead_weight(metrics: Metrics, memory: _Memory, cfg: TrainConfig) -> Judgement:
    share = metrics.get("algo/dead_fraction")
    if share is None:
        return None
    if share <= DEAD_SHARE:
        return ""
    return (
        f"sequences that hardly count = {share:.0%} of those with an advantage: expected at most {DEAD_SHARE:.0%}, because the update "
        "is made of what is left; lower loop.max_staleness or the learning rate, and see cause/ for what moves log W"
    )


def _canary_jump(metrics: Metrics, memory: _Memory, cfg: TrainConfig) -> Judgement:
    gap = metrics.get("sync/canary_abs_mean_nats")
    if gap is None:
        return None
    earlier = memory.canary
    usual = median(earlier) if len(earlier) >= JUMP_HISTORY else gap
    if gap <= max(JUMP * usual, JUMP_FLOOR_NATS) or len(earlier) < JUMP_HISTORY:
        memory.canary.append(gap)
        return ""
    return (
        f"canary after the weight push = {gap:.1e} nats from the trainer per token: expected about {usual:.1e}, as after earlier "
        "pushes; the weights did not all arrive, or the engine's cache is of older ones: look at sync/changed and the engines' "
        "logs, and restart the engines"
    )


def _unchanged_weights(metrics: Metrics, memory: _Memory, cfg: TrainConfig) -> Judgement:
    changed = metrics.get("sync/changed")
    rate, norm = metrics.get("optim/learning_rate", 0), metrics.get("optim/grad_norm", 0)
    if changed is None or rate <= 0 or norm <= 0:  # the first update of a warm-up changes nothing
        return None
    if changed:
        return ""
    return (
        f"weights of the engines = those of the version before, by their digest, at learning rate {rate:.1e} and gradient norm "
        f"{norm:.1e}: expected others; updates below the rounding of rollout.dtype = '{cfg.rollout.dtype}' reach no engine, so raise "
        "the learning rate, or find out what was pushed (logs/)"
    )


def _idle_replay(metrics: Metrics, memory: _Memory, cfg: TrainConfig) -> Judgement:
    effect, num = metrics.get("router/replay_effect_max_nats"), metrics.get("router/replayed_tokens", 0)
    if effect is None or num < IDLE_TOKENS:
        return None
    if effect >= IDLE_NATS:
        return ""
    return (
        f"largest change of a log-prob by replaying the engine's experts = {effect:.1e} nats on {num:.0f} tokens whose experts differ: "
        "expected more, because other experts compute something else; the choices do not reach the routers, so training under "
        "router_replay = 'engine' would be without replay: check trainer.megatron for a fused router"
    )


def _mismatch(metrics: Metrics, memory: _Memory, cfg: TrainConfig) -> Judgement:
    k3 = metrics.get("mismatch/k3_nats")
    if k3 is None:
        return None
    if len(memory.k3) < FIRST_STEPS:
        memory.k3.append(k3)
    usual, limit = median(memory.k3), K3_LIMIT_NATS
    grown = len(memory.k3) == FIRST_STEPS and k3 > max(GROWTH * usual, GROWTH_FLOOR_NATS)
    if k3 <= limit and not grown:
        return ""
    expected = (
        f"at most {limit:.0e}" if k3 > limit else f"about {usual:.1e}, as in the first {FIRST_STEPS} steps"
    )
    return (
        f"mismatch/k3_nats = {k3:.1e} nats: expected {expected}, because the weights are the same in both engines; see cause/ for "
        "whether the engine, its decoding or the router makes it, and `doctor report` on this run"
    )


def _router(metrics: Metrics, memory: _Memory, cfg: TrainConfig) -> Judgement:
    mismatch = metrics.get("router/mismatch", metrics.get("experts/mismatch_fraction"))
    if mismatch is None:
        return None
    if mismatch <= ROUTER_LIMIT:
        return ""
    return (
        f"router choices that differ between the engines = {mismatch:.1%} of all (token, layer): expected at most {ROUTER_LIMIT:.0%} under the "
        "same weights; noise flips near-ties only, so suspect the mapping of layers or experts, or one side's router weights: "
        "`doctor check-routes` on this run"
    )


_RULES: Mapping[str, Callable[[Metrics, _Memory, TrainConfig], Judgement]] = {
    "sequence_budget": _budget,
    "dead_weight": _dead_weight,
    "canary_jump": _canary_jump,
    "unchanged_weights": _unchanged_weights,
    "idle_replay": _idle_replay,
    "engine_mismatch": _mismatch,
    "router_mismatch": _router,
}
