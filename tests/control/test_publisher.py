"""Who serves after a push, and what happens to engines that are lost, odd or wrong; the real fleet is in tests/rollout."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from megatron_vespo.config import RolloutConfig
from megatron_vespo.control.publisher import FleetPublisher, odd_ones
from megatron_vespo.rollout.lifecycle import State
from megatron_vespo.rollout.weight_sync import PushOutcome, Target
from megatron_vespo.types import RunError, Scored, TrainSequence

CANARY = [TrainSequence(uid="canary", token_ids=np.arange(4, dtype=np.int32), num_prompt_tokens=1)]


def scored(value: float) -> tuple[Scored, ...]:
    return (Scored(logp=np.full(3, value, np.float32), experts=None),)


@dataclass
class Engine:
    name: str
    url: str = "http://nowhere"
    lives: bool = True
    version: int | None = None
    gap: float = 0.0
    digest: str = "tp1 same"
    fails_pushes: int = 0
    incomplete_pushes: int = 0

    @property
    def state(self) -> State:
        return State.LOST if not self.lives else State.STALE if self.version is None else State.SERVING


@dataclass
class Fleet:
    """As much of rollout.fleet.Fleet as a publisher needs; a lost engine is back at once, as a restarted one."""

    engines: list[Engine]
    version: int | None = None
    lost: list[str] = field(default_factory=list)
    comes_back: bool = True
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    async def to_update(self, version: int) -> list[Engine]:
        while not any(engine.lives for engine in self.engines):
            await asyncio.sleep(0.01)
        return [engine for engine in self.engines if engine.lives and engine.version != version]

    async def newcomer(self) -> None:
        """As the real one: at once, as long as there is one."""
        while not any(engine.state is State.STALE for engine in self.engines):
            self.arrived.clear()
            await self.arrived.wait()

    @contextlib.contextmanager
    def updating(self, names: Sequence[str]):
        yield

    async def score_on(self, name: str, sequences: Sequence[TrainSequence]) -> tuple[Scored, ...]:
        return scored(-1.0 + self.named(name).gap)

    def confirm(self, name: str, version: int) -> bool:
        self.named(name).version = self.version = version
        return True

    def lose(self, name: str, why: str) -> None:
        self.lost.append(f"{name}: {why}")
        self.named(name).lives = self.comes_back
        self.named(name).version = None

    @property
    def members(self) -> list[Engine]:
        return self.engines

    def standing(self) -> str:
        return f"{len(self.engines)} engines"

    def named(self, name: str) -> Engine:
        return next(engine for engine in self.engines if engine.name == name)


@dataclass
class Source:
    fleet: Fleet
    steps: int = 0
    num_asked: int = 0
    pushes: list[list[str]] = field(default_factory=list)

    async def push(self, targets: Sequence[Target], version: int) -> PushOutcome | None:
        self.num_asked += 1
        if version != self.steps:
            return None
        self.pushes.append([target.name for target in targets])
        engines = [self.fleet.named(target.name) for target in targets]
        failures = {e.name: "was killed" for e in engines if e.fails_pushes}
        incomplete = frozenset(e.name for e in engines if e.incomplete_pushes and e.name not in failures)
        digests = {e.name: e.digest for e in engines if e.name not in failures and e.name not in incomplete}
        for engine in engines:
            engine.fails_pushes -= bool(engine.fails_pushes)
            engine.incomplete_pushes -= bool(engine.incomplete_pushes)
        return PushOutcome(
            version=self.steps, num_bytes=10, time_s={"paused": 1.0}, failures=failures, incomplete=incomplete,
            digests=digests,
        )  # fmt: skip

    async def score(self, sequences: Sequence[TrainSequence]) -> Sequence[Scored]:
        return scored(-1.0)


def publisher(*engines: Engine) -> FleetPublisher:
    fleet = Fleet(list(engines))
    cfg = RolloutConfig(start_timeout_s=0.2, sync_timeout_s=0.2, canary_tolerance=0.5)
    return FleetPublisher(Source(fleet), fleet, CANARY, cfg)  # type: ignore[arg-type]


def parts(publisher: FleetPublisher) -> tuple[Source, Fleet]:
    return publisher._source, publisher._fleet  # type: ignore[return-value]


def test_every_engine_is_pushed_to_at_once_and_serves_when_its_canary_agrees():
    pub = publisher(Engine("a", gap=0.1), Engine("b", gap=-0.3))
    report = asyncio.run(pub.publish(0))
    assert parts(pub)[0].pushes == [["a", "b"]]
    assert (report.version, report.num_engines, report.num_lost) == (0, 2, 0)
    assert report.canary_abs_max == pytest.approx(0.3)
    assert report.canary_variance == pytest.approx((0.1**2 + 0.3**2) / 2)  # of as many tokens on each
    assert report.time_s["paused"] == 1.0 and "publish" in report.time_s


def test_the_canary_is_told_over_the_tokens_and_experts_of_all_engines():
    pub = publisher(Engine("a", gap=0.1), Engine("b", gap=-0.3))
    source, fleet = parts(pub)
    ours = np.array([[[0, 1]], [[2, 3]], [[0, 3]]], np.uint8)  # of 3 processed tokens, 1 layer, 2 experts
    theirs = {"a": ours[:, :, ::-1], "b": np.array([[[0, 1]], [[2, 1]], [[0, 3]]], np.uint8)}
    score, score_on = source.score, fleet.score_on

    async def score_with_experts(sequences):
        return [replace(one, experts=ours) for one in await score(sequences)]

    async def score_on_with_experts(name, sequences):
        return tuple(replace(one, experts=theirs[name]) for one in await score_on(name, sequences))

    source.score, fleet.score_on = score_with_experts, score_on_with_experts  # type: ignore[method-assign]
    report = asyncio.run(pub.publish(0))
    assert report.canary_expert_mismatch == pytest.approx(1 / 6)  # their order means nothing
    assert report.canary_abs_mean == pytest.approx(0.2)
    d = np.array([-0.1, 0.3])
    assert report.canary_k3_nats == pytest.approx((np.exp(d) - 1 - d).mean(), rel=1e-5)


def test_a_canary_without_experts_compares_none():
    assert asyncio.run(publisher(Engine("a")).publish(0)).canary_expert_mismatch is None


def test_an_engine_that_has_the_version_already_is_left_alone():
    pub = publisher(Engine("a"), Engine("b"))
    asyncio.run(pub.publish(0))
    asyncio.run(pub.publish(0))
    assert parts(pub)[0].pushes == [["a", "b"]]


def test_a_lost_engine_does_not_keep_the_others_from_serving():
    pub = publisher(Engine("a"), Engine("b", fails_pushes=1), Engine("c"))
    report = asyncio.run(pub.publish(0))
    source, fleet = parts(pub)
    assert report.num_engines == 2 and report.num_lost == 1
    assert fleet.lost == ["b: was killed"]
    assert source.pushes == [["a", "b", "c"]]


def test_engines_left_incomplete_by_the_loss_of_another_are_pushed_to_again():
    pub = publisher(Engine("a", incomplete_pushes=1), Engine("b", fails_pushes=1))
    report = asyncio.run(pub.publish(0))
    assert parts(pub)[0].pushes == [["a", "b"], ["a", "b"]]  # b is back by then
    assert report.num_engines == 2 and report.num_bytes == 20 and report.time_s["paused"] == 2.0


def test_the_only_engine_is_waited_for():
    pub = publisher(Engine("a", fails_pushes=1))
    assert asyncio.run(pub.publish(0)).num_engines == 1
    assert parts(pub)[0].pushes == [["a"], ["a"]]


def test_with_no_engine_left_the_wait_is_bounded_and_says_for_whom():
    pub = publisher(Engine("a", fails_pushes=1))
    parts(pub)[1].comes_back = False
    with pytest.raises(
        RunError, match=r"for an engine to give version 0 to \(1 engines\) = not done after 0.4 s"
    ):
        asyncio.run(pub.publish(0))


def test_an_engine_with_other_weights_than_its_peers_is_lost():
    pub = publisher(Engine("a"), Engine("b", digest="tp1 other"), Engine("c"))
    report = asyncio.run(pub.publish(0))
    assert parts(pub)[1].lost == ["b: holds other weights than its peers after the push of 0"]
    assert report.num_engines == 2


def test_one_engine_that_computes_something_else_is_lost_and_the_run_goes_on():
    pub = publisher(Engine("a"), Engine("b", gap=0.7))
    report = asyncio.run(pub.publish(0))
    (why,) = parts(pub)[1].lost
    assert why.startswith("b: canary on b = 0.7 nats apart") and report.num_engines == 1


def test_if_all_engines_compute_something_else_the_run_ends():
    with pytest.raises(RunError, match=r"canary on b = 0.9 nats apart: .* rollout.canary_tolerance = 0.5"):
        asyncio.run(publisher(Engine("a", gap=0.7), Engine("b", gap=-0.9)).publish(0))


def test_a_push_that_changed_nothing_says_so():
    pub = publisher(Engine("a"))
    source, fleet = parts(pub)
    changes = []
    for version, digest in enumerate(["tp1 x", "tp1 y", "tp1 y"]):
        source.steps, fleet.engines[0].digest = version, digest
        changes.append(asyncio.run(pub.publish(version)).changed)
    assert changes == [None, True, False]


def test_an_engine_that_comes_later_must_hold_what_the_others_hold():
    pub = publisher(Engine("a"), Engine("b"), Engine("c"))
    fleet = parts(pub)[1]
    fleet.engines[2].lives = False
    asyncio.run(pub.publish(0))
    fleet.engines[2].lives, fleet.engines[2].digest = True, "tp1 corrupt"
    report = asyncio.run(pub.publish(0))
    assert fleet.lost[0] == "c: holds other weights than its peers after the push of 0"
    assert report.num_engines == 2


def test_an_engine_that_comes_back_between_two_steps_is_given_the_weights():
    async def scenario():
        pub = publisher(Engine("a"), Engine("b"))
        source, fleet = parts(pub)
        await pub.publish(0)
        following = asyncio.create_task(pub.follow())
        fleet.engines[1].version = None
        fleet.arrived.set()
        for _ in range(100):
            await asyncio.sleep(0.001)
        following.cancel()
        assert source.pushes == [["a", "b"], ["b"]]
        assert fleet.engines[1].version == 0

    asyncio.run(scenario())


def test_an_engine_that_comes_back_during_a_step_gets_the_weights_after_it():
    """Its push waits behind the step of the ranks, whose weights are newer then."""

    async def scenario():
        pub = publisher(Engine("a"), Engine("b"))
        source, fleet = parts(pub)
        await pub.publish(0)
        following = asyncio.create_task(pub.follow())
        source.steps, fleet.engines[1].version = 1, None
        fleet.arrived.set()
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert fleet.engines[1].version is None
        assert source.num_asked == 2, "it asks the ranks again and again"
        await pub.publish(1)
        following.cancel()
        assert fleet.engines[1].version == 1 and source.pushes == [["a", "b"], ["a", "b"]]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("digests", "odd"),
    [
        ([], ""),
        (["tp1 x"], ""),
        (["tp1 x", "tp1 x"], ""),
        (["tp1 x", "tp1 y"], "ab"),
        (["tp1 x", "tp1 x", "tp1 y"], "c"),
        (["tp1 x", "tp1 x", "tp1 y", "tp1 y"], "abcd"),
        (["tp1 x", "tp2 y", "tp1 x", "tp2 y"], ""),
        (["tp1 x", "tp2 y", "tp1 x", "tp2 z"], "bd"),
    ],
)
def test_the_odd_engines_are_those_outside_the_majority(digests, odd):
    assert odd_ones(dict(zip("abcd", digests, strict=False))) == list(odd)


def test_an_engine_that_does_not_answer_the_canary_is_lost_at_the_deadline():
    pub = publisher(Engine("a"), Engine("b"))
    fleet = parts(pub)[1]
    answer = fleet.score_on

    async def score_on(name, sequences):
        return await (asyncio.Event().wait() if name == "b" else answer(name, sequences))

    fleet.score_on = score_on  # type: ignore[method-assign]
    report = asyncio.run(pub.publish(0))
    assert report.num_engines == 1
    assert fleet.lost == ["b: did not score the canary: no answer within rollout.sync_timeout_s = 0.2"]
