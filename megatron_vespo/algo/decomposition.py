"""Where a gap of log-probs comes from: identities that hold for every token, and so for every sequence.

All passes score the same tokens.  From the log-prob with which a token was sampled to the one it has when it is trained on:

    M  behavior, sampled                    M' - M  staleness where the weights are newer than those that sampled, else decode:
    M' engine's prefill, trainer's weights          the engine's decoding against its own prefill
    B  trainer, the engine's experts        B - M'  engine: attention, matrix products, gates, lm head, number format
    A  trainer, its own experts             A - B   routing: same weights, same engine, only the experts differ
    P  trainer, as it scored the batch      P - A   rerun: the trainer's noise; P - B where it repeats the engine's experts
    C  trainer, when the update came        C - P   update

A pass that was not recorded joins its two differences: without M', B - M is `engine` where the weights are the same (decode
included) and `unsplit` where they are not; without B, `engine` includes routing.  k3 and chi2 do not add up, and have no shares.

Shape key:  S tokens, B sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from megatron_vespo.algo.mismatch import finite_only
from megatron_vespo.types import Doubles, Floats, Ints, Mask

PARTS = ("staleness", "decode", "unsplit", "engine", "routing", "rerun", "update")
_EXACT = 1e-9
_SAMPLED, _PREFILL, _REPLAYED, _NATURAL = range(4)


@dataclass(frozen=True, kw_only=True)
class Passes:
    """[S] log-probs of the same tokens, nats; None where a pass was not made."""

    behavior: Floats
    engine: Floats | None = None
    replayed: Floats | None = None
    natural: Floats | None = None
    policy: Floats
    current: Floats | None = None
    version_gap: Ints | None = None
    """Trainer version minus the version that sampled; None: 0 for all."""
    is_replayed: bool = False
    """Whether `policy` and `current` use the engine's experts; `natural` then stands beside the way from M to P."""


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """A gap and the parts that add up to it, element by element."""

    total: Doubles
    parts: Mapping[str, Doubles]
    """By name (PARTS), in the order in which they follow each other; 0 for tokens that have none of it."""

    def __post_init__(self) -> None:
        for name, part in self.parts.items():
            if part.shape != self.total.shape:
                raise ValueError(
                    f"part '{name}' has shape {part.shape}, the gap {self.total.shape}: parts and gap must be of the same tokens; "
                    "select the same tokens from all passes"
                )
        error = np.abs(self.total - sum(self.parts.values(), np.zeros_like(self.total)))
        bound = _EXACT * (1 + sum((np.abs(part) for part in self.parts.values()), np.abs(self.total)))
        wrong = np.flatnonzero(~(error <= bound))
        if len(wrong):
            at = int(wrong[0])
            values = ", ".join(f"{name} {part[at]:.6g}" for name, part in self.parts.items())
            raise ValueError(
                f"gap[{at}] = {self.total[at]:.6g} nats: its parts ({values}) do not add up to it, nor those of {len(wrong) - 1} others; "
                "every pass must score the same tokens, with a finite number each"
            )

    def by_sequence(self, sequence_S: Ints, num_sequences: int) -> Decomposition:
        """The same of whole sequences: sums over their tokens."""

        def summed(value_S: Doubles) -> Doubles:
            return np.bincount(sequence_S, value_S, num_sequences)

        return Decomposition(
            total=summed(self.total), parts={name: summed(part) for name, part in self.parts.items()}
        )

    def means(self) -> dict[str, float]:
        """E[part], which add up to the mean gap."""
        return {name: float(part.mean()) for name, part in self.parts.items()} if len(self.total) else {}

    def shares(self) -> dict[str, float]:
        """Cov(part, gap) / Var(gap), which add up to 1; each may be negative.  Empty where the gap does not vary."""
        if not len(self.total) or np.ptp(self.total) == 0:
            return {}
        off = self.total - self.total.mean()
        return {name: float((part * off).sum() / np.square(off).sum()) for name, part in self.parts.items()}

    def square_shares(self) -> dict[str, float]:
        """E[part gap] / E[gap^2], which add up to 1: shares that know of means.  Empty where the gap is 0."""
        whole = float(np.square(self.total).sum())
        return (
            {name: float((part * self.total).sum() / whole) for name, part in self.parts.items()}
            if whole
            else {}
        )


def decompose(passes: Passes) -> Decomposition:
    """C - M, or P - M without `current`, as a sum of what was recorded in between.

    Raises:
        ValueError: passes of different tokens, or log-probs that are no finite numbers.
    """
    gap = np.zeros(len(passes.behavior), np.int32) if passes.version_gap is None else passes.version_gap
    is_stale = gap > 0
    milestones = list(_milestones(passes))
    parts: dict[str, Doubles] = {}
    for (place, before), (reached, after) in pairwise(milestones):
        difference = _difference(after, before)
        for name, chosen in _names(place, reached, is_stale, after is passes.current).items():
            parts[name] = parts.get(name, 0.0) + np.where(chosen, difference, 0.0)
    return Decomposition(total=_difference(milestones[-1][1], passes.behavior), parts=parts)


def decompose_natural(passes: Passes) -> Decomposition | None:
    """A - M: the gap of the trainer's own choice of experts, whatever it trains with; None without that pass."""
    if passes.natural is None:
        return None
    return decompose(replace(passes, policy=passes.natural, natural=None, current=None, is_replayed=False))


def routing_verdict(natural_S: Floats, replayed_S: Floats, behavior_S: Floats) -> float | None:
    """R = 1 - E[(B - M)^2] / E[(A - M)^2], over tokens that the same weights sampled.

    Near 0, replaying the engine's experts does not help; above 0.5 it is worth it.  None where A = M throughout.
    """
    whole = float(np.square(_difference(natural_S, behavior_S)).sum())
    return 1 - float(np.square(_difference(replayed_S, behavior_S)).sum()) / whole if whole else None


def floor_verdict(k3_engine: float, k3_floor: float) -> float | None:
    """Z = k3(A, engine) / k3(A, A2): near 1 the trainer's own noise is the limit; large: chase the engine.

    Two equally noisy engines have Z = 1.  None where the trainer repeats itself exactly.
    """
    return k3_engine / k3_floor if k3_floor > 0 else None


def gap_regression(value_S: Doubles, version_gap_S: Ints) -> dict[str, float]:
    """Least squares over tokens of value = intercept + slope * version gap.

    The intercept is what same weights show (the engine), the slope what one version adds (staleness).

    Returns:
        intercept, slope and their standard errors intercept_se, slope_se for independent tokens; empty where all gaps are equal.
    """
    x = version_gap_S.astype(np.float64)
    if len(x) < 3 or np.ptp(x) == 0:
        return {}
    off = x - x.mean()
    spread = np.square(off).sum()
    slope = float((off * value_S).sum() / spread)
    intercept = float(value_S.mean() - slope * x.mean())
    variance = np.square(value_S - intercept - slope * x).sum() / (len(x) - 2)
    return finite_only({
        "intercept": intercept,
        "slope": slope,
        "intercept_se": float(np.sqrt(variance * (1 / len(x) + x.mean() ** 2 / spread))),
        "slope_se": float(np.sqrt(variance / spread)),
    })  # fmt: skip


def _milestones(passes: Passes) -> Iterator[tuple[int, Floats]]:
    """What was recorded on the way from M to P or C, by how far it is."""
    end = _REPLAYED if passes.is_replayed else _NATURAL
    yield _SAMPLED, passes.behavior
    if passes.engine is not None:
        yield _PREFILL, passes.engine
    if passes.replayed is not None:
        yield _REPLAYED, passes.replayed
    if passes.natural is not None and not passes.is_replayed:
        yield _NATURAL, passes.natural
    yield end, passes.policy
    if passes.current is not None:
        yield end, passes.current


def _names(place: int, reached: int, is_stale: Mask, is_update: bool) -> dict[str, Mask]:
    """What the difference of two milestones is called, and for which tokens."""
    everywhere = np.ones_like(is_stale)
    if is_update:
        return {"update": everywhere}
    if place == reached:
        return {"rerun": everywhere}
    if place == _REPLAYED:
        return {"routing": everywhere}
    if reached == _PREFILL:
        return {"staleness": is_stale, "decode": ~is_stale}
    return {"engine": everywhere} if place == _PREFILL else {"unsplit": is_stale, "engine": ~is_stale}


def _difference(after: Floats, before: Floats) -> Doubles:
    if after.shape != before.shape:
        raise ValueError(
            f"log-probs have shapes {after.shape} and {before.shape}: every pass must score the same tokens; "
            "select the same tokens from all passes"
        )
    return after.astype(np.float64) - before.astype(np.float64)
