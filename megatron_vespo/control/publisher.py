"""mu <- pi: the trainer's weights in every engine, confirmed before it serves; engines may be lost on the way."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import numpy as np

from megatron_vespo.algo.mismatch import token_gap
from megatron_vespo.algo.routers import expert_overlap
from megatron_vespo.config import RolloutConfig
from megatron_vespo.control.clock import bounded
from megatron_vespo.rollout.fleet import Fleet
from megatron_vespo.rollout.lifecycle import State
from megatron_vespo.rollout.member import Member
from megatron_vespo.rollout.weight_sync import PushOutcome, Target
from megatron_vespo.types import Floats, Mask, RunError, Scored, SyncReport, TrainSequence

logger = logging.getLogger(__name__)

_MAX_PUSHES = 4
"""Of one version to engines that were left incomplete because another one was lost."""


class Source(Protocol):
    """Where the weights come from: `actors.TrainerGroup`."""

    async def push(self, targets: Sequence[Target], version: int) -> PushOutcome | None:
        """Push the weights that the ranks hold as `version`; None if they have trained on and hold newer ones."""
        ...

    async def score(self, sequences: Sequence[TrainSequence]) -> Sequence[Scored]:
        """Log-probs under the weights that the ranks hold."""
        ...


class Gap(NamedTuple):
    """Between the trainer and one engine on the canary."""

    nats: Floats
    """Trainer - engine, of every token."""
    flips: Mask | None
    """Of every (token, layer), whether their expert sets differ; None where one of them does not record experts."""

    @property
    def largest(self) -> float:
        return float(np.abs(self.nats).max())


@dataclass
class _Tally:
    """Of the pushes of one version."""

    num_bytes: int = 0
    num_lost: int = 0
    is_outdated: bool = False
    """The trainer holds newer weights by now."""
    gaps: list[Gap] = field(default_factory=list)
    """Of each engine that was confirmed."""
    time_s: Counter[str] = field(default_factory=Counter)


class FleetPublisher:
    """types.Publisher over a fleet of engines.

    An engine serves only when it took every tensor, holds the same weights as its peers (digest), and computes the
    trainer's log-probs of the canary.  One that fails in any of this is lost: it is started again, and joins later.
    """

    def __init__(
        self, source: Source, fleet: Fleet, canary: Sequence[TrainSequence], cfg: RolloutConfig
    ) -> None:
        """`canary`: fixed sequences on whose log-probs both engines must agree within cfg.canary_tolerance."""
        self._source, self._fleet, self._canary, self._cfg = source, fleet, list(canary), cfg
        self._turn = asyncio.Lock()
        self._trained: tuple[int, Sequence[Scored]] = (-1, ())
        self._digests: tuple[int, dict[str, str]] = (-1, {})
        """The newest version with a digest of it, and by layout what engines that are confirmed at it hold."""
        self._changed: bool | None = None
        self._published = asyncio.Event()

    async def publish(self, version: int) -> SyncReport:
        """Return as soon as every engine that lives serves `version`; at least one.

        Raises:
            RunError: no engine could be made to serve it, or no engine computes what the trainer does.
        """
        began, tally = perf_counter(), _Tally()
        async with self._turn:
            for _ in range(_MAX_PUSHES):
                if await self._push(version, tally):
                    break
            self._published.set()
            self._published = asyncio.Event()
        serving = self._num_serving(version)
        if not serving:
            raise RunError(
                f"engines that serve version {version} = none after {_MAX_PUSHES} pushes: expected one at least; see what "
                "was told about each engine above, and logs/"
            )
        return SyncReport(
            version=version,
            num_bytes=tally.num_bytes,
            time_s={**tally.time_s, "publish": perf_counter() - began},
            **_canary(tally.gaps),
            num_engines=serving,
            num_lost=tally.num_lost,
            changed=self._changed,
        )

    async def follow(self) -> None:
        """For ever: give the weights to engines that were started again, or added, between two steps.

        One that arrives during a step waits for the publication after it.
        """
        while True:
            await self._fleet.newcomer()
            tally, published = _Tally(), self._published
            async with self._turn:
                if self._fleet.version is not None:
                    await self._push(self._fleet.version, tally)
            if tally.is_outdated or self._fleet.version is None:
                await published.wait()

    async def _push(self, version: int, tally: _Tally) -> bool:
        """Push to every engine that lives and is not at `version`; whether there is no more to do."""
        members = await self._to_update(version)
        if not members:
            return True
        with self._fleet.updating([member.name for member in members]):
            outcome = await self._source.push([Target(m.name, m.url) for m in members], version)
            if outcome is None:
                tally.is_outdated = True
                return True
            gaps = await self._confirm(outcome, members)
        tally.num_bytes += outcome.num_bytes
        tally.time_s.update(outcome.time_s)
        tally.gaps += gaps
        tally.num_lost += len(members) - len(gaps) - len(outcome.incomplete)
        return self._num_serving(version) > 0 and not outcome.incomplete

    def _num_serving(self, version: int) -> int:
        return sum(m.state is State.SERVING and m.version == version for m in self._fleet.members)

    async def _to_update(self, version: int) -> list[Member]:
        """Engines that live and are not at `version`; waits for one to come back where none serves it."""
        return await bounded(
            self._fleet.to_update(version),
            lambda: f"the trainer, for an engine to give version {version} to ({self._fleet.standing()})",
            deadline_s=self._cfg.start_timeout_s + self._cfg.sync_timeout_s,
            limit="rollout.start_timeout_s + rollout.sync_timeout_s",
        )

    async def _confirm(self, outcome: PushOutcome, members: Sequence[Member]) -> list[Gap]:
        """Let the engines serve that hold and compute what they should, and lose the others; the canary's gaps.

        Raises:
            RunError: no engine is left that computes the trainer's log-probs: no restart mends that.
        """
        for name, why in outcome.failures.items():
            self._fleet.lose(name, why)
        complete = [
            m.name for m in members if m.name not in outcome.failures and m.name not in outcome.incomplete
        ]
        odd = self._odd(outcome.version, {n: outcome.digests[n] for n in complete if n in outcome.digests})
        for name in odd:
            self._fleet.lose(name, f"holds other weights than its peers after the push of {outcome.version}")
        trained = await self._canary_by_trainer(outcome.version)
        scored = [name for name in complete if name not in odd]
        answers = await asyncio.gather(*(self._gap(n, trained) for n in scored))
        gaps = {name: gap for name, gap in zip(scored, answers, strict=True) if gap is not None}
        fine = {name: gap for name, gap in gaps.items() if gap.largest <= self._cfg.canary_tolerance}
        wrong = {name: gap.largest for name, gap in gaps.items() if name not in fine}
        for name, gap in wrong.items():
            self._fleet.lose(name, self._canary_message(name, gap))
        if wrong and not fine and all(m.state is not State.SERVING for m in self._fleet.members):
            raise RunError(self._canary_message(*max(wrong.items(), key=lambda item: item[1])))
        return [gap for name, gap in fine.items() if self._fleet.confirm(name, outcome.version)]

    def _odd(self, version: int, digests: Mapping[str, str]) -> list[str]:
        """Engines that hold other weights than their peers of the same layout.

        The first push of a version decides by majority what is right; whoever comes later must hold the same.  Also notes
        whether the version changed anything: a bfloat16 copy may not, at a small learning rate.
        """
        known = self._digests[1] if self._digests[0] == version else {}
        odd = odd_ones({n: d for n, d in digests.items() if layout_of(d) not in known})
        odd += [n for n, d in digests.items() if known.get(layout_of(d), d) != d]
        right = {layout_of(d): d for n, d in digests.items() if n not in odd}
        if right and not known and (before := self._digests[1]):
            compared = [right[layout] != before[layout] for layout in right.keys() & before.keys()]
            self._changed = any(compared) if compared else None
        if right or self._digests[0] == version:
            self._digests = version, {**right, **known}
        return odd

    async def _canary_by_trainer(self, version: int) -> Sequence[Scored]:
        if self._trained[0] != version:
            self._trained = version, await self._source.score(self._canary)
        return self._trained[1]

    async def _gap(self, name: str, trained: Sequence[Scored]) -> Gap | None:
        """Between trainer and engine on the canary; None if the engine was lost over it."""
        limit_s = (
            self._cfg.sync_timeout_s
        )  # nothing else bounds it: deadlines stand still while weights are pushed
        try:
            async with asyncio.timeout(limit_s):
                served = await self._fleet.score_on(name, self._canary)
        except (RunError, TimeoutError) as err:
            why = str(err) or f"no answer within rollout.sync_timeout_s = {limit_s:g}"
            self._fleet.lose(name, f"did not score the canary: {why}")
            return None
        return _gap_of(trained, served)

    def _canary_message(self, name: str, gap: float) -> str:
        return (
            f"canary on {name} = {gap:.3g} nats apart: trainer and engine must agree within rollout.canary_tolerance = "
            f"{self._cfg.canary_tolerance:g} on the same weights; the engine serves other weights, or computes in another "
            "precision: compare dtypes, and see docs/numerics.md"
        )


def _gap_of(trained: Sequence[Scored], served: Sequence[Scored]) -> Gap:
    pairs = list(zip(trained, served, strict=True))
    overlaps = [
        expert_overlap(ours.experts, theirs.experts)
        for ours, theirs in pairs
        if ours.experts is not None and theirs.experts is not None
    ]
    return Gap(
        nats=np.concatenate([ours.logp - theirs.logp for ours, theirs in pairs]),
        flips=np.concatenate(overlaps) < 1 if overlaps else None,
    )


def _canary(gaps: Sequence[Gap]) -> dict[str, Any]:
    """Over the tokens of all engines, as fields of a `SyncReport`."""
    if not gaps:
        return {"canary_abs_max": 0.0}
    d = np.concatenate([gap.nats for gap in gaps])
    numbers = token_gap(d, np.zeros_like(d))
    flips = [gap.flips for gap in gaps if gap.flips is not None]
    return {
        "canary_abs_max": numbers["abs_max_nats"],
        "canary_variance": numbers["square_mean_nats2"],
        "canary_abs_mean": numbers["abs_mean_nats"],
        "canary_k3_nats": numbers["k3_nats"],
        "canary_expert_mismatch": float(np.concatenate(flips).mean()) if flips else None,
    }


def layout_of(digest: str) -> str:
    """Digests are equal for equal weights in engines of one layout, which they name first."""
    return digest.partition(" ")[0]


def odd_ones(digests: Mapping[str, str]) -> list[str]:
    """Engines whose digest is not that of more than half of those of their layout: of two that differ, both."""
    odd = list[str]()
    for layout in dict.fromkeys(map(layout_of, digests.values())):
        peers = {name: digest for name, digest in digests.items() if layout_of(digest) == layout}
        ((common, num),) = Counter(peers.values()).most_common(1)
        odd += [name for name, digest in peers.items() if digest != common or 2 * num <= len(peers)]
    return odd
