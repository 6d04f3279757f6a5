"""One engine of a fleet: its process started, watched, ended and started again, and the requests under way there.

It is watched in two ways.  Its process: whether it lives, every second.  Its progress: what it has counted, while it has
requests, so that a scheduler which hangs behind a living HTTP server is found; and /health while it has none.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Awaitable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import aiohttp

from megatron_vespo.config import ConfigError, RolloutConfig
from megatron_vespo.rollout.client import EngineClient, Load
from megatron_vespo.rollout.failures import EngineFailure, Failed, Lost, Silent
from megatron_vespo.rollout.lifecycle import Life, Pulse, State
from megatron_vespo.rollout.server import EngineProcess
from megatron_vespo.types import RunError

T = TypeVar("T")

LOOK_EVERY_S = 1.0
HEALTH_EVERY_S = 10.0
"""Of an idle engine, which has nothing to count."""
REPORT_WITHIN_S = 30.0
"""Whoever runs the process must say by then whether it lives."""
DEATH_SHOWS_WITHIN_S = 3.0
"""A lost connection is often seen before the process is gone."""
GIVE_BACK_WITHIN_S = 30.0
FAILURES_IN_A_ROW, OVER_S = 5, 1.0
"""An engine whose requests fail so often without one that succeeds, over at least so long, is lost."""


class Owner(Protocol):
    """The fleet, as its members see it."""

    def tell(self, message: str, /) -> None:
        """Have a person read it."""
        ...

    def standing(self) -> str:
        """How many engines serve, in words."""
        ...

    def changed(self, member: Member) -> None:
        """Its state is another one."""
        ...

    def observed(self, member: Member, load: Load) -> None:
        """It said what it is doing."""
        ...


@dataclass(eq=False)
class _Call:
    """One request under way, and its deadline, which can stand still."""

    rids: Sequence[str]
    scope: asyncio.Timeout
    left_s: float | None = None

    def stop_clock(self, now: float) -> None:
        when = self.scope.when()
        if when is not None and not self.scope.expired():
            self.left_s = when - now
            self.scope.reschedule(None)

    def start_clock(self, now: float) -> None:
        if self.left_s is not None and not self.scope.expired():
            self.scope.reschedule(now + self.left_s)
            self.left_s = None

    def end(self, now: float) -> None:
        """Have whoever waits raise at once, also if its clock stands still."""
        self.left_s = None
        if not self.scope.expired():
            self.scope.reschedule(now)


class Member:
    """One engine; `live` is its whole life, as a task."""

    def __init__(
        self, process: EngineProcess, cfg: RolloutConfig, pool: aiohttp.ClientSession, owner: Owner
    ) -> None:
        self.name = process.name
        self.url = ""
        self.life = Life(cfg.max_restarts)
        self.tokens_s = 0.0
        self._process = process
        self._cfg = cfg
        self._pool = pool
        self._owner = owner
        self._client = EngineClient("", pool)
        self._pulse = Pulse(cfg.stall_timeout_s)
        self._healthy_at = 0.0
        self._calls: set[_Call] = set()
        self._idle = asyncio.Event()
        self._num_updating = 0
        self._lost = asyncio.Event()
        self._why_lost = ""
        self._num_failures = 0
        self._failing_since = 0.0
        self._rids = (f"{uuid.uuid4().hex[:8]}-{i}" for i in itertools.count())
        self._background: set[asyncio.Task[Any]] = set()
        self._idle.set()

    @property
    def state(self) -> State:
        return self.life.state

    @property
    def version(self) -> int | None:
        """At which it was confirmed since it was started; None before that."""
        return self.life.version

    @property
    def why_lost(self) -> str:
        """The last time."""
        return self._why_lost

    @property
    def num_under_way(self) -> int:
        """Sequences of requests without an answer."""
        return sum(len(call.rids) for call in self._calls)

    async def live(self) -> None:
        """Start, watch, and start again, until it is given up; cancelled when it is not wanted any more.

        Raises:
            ConfigError: a person has to mend something before it can start at all.
        """
        while True:
            await self._run_once()
            try:
                await self._process.stop()
            except RunError as err:
                self._give_up(f"cannot be ended: {err}")
                return
            if not self.life.may_restart:
                self._give_up(
                    f"did not serve after {self._cfg.max_restarts} restarts in a row (rollout.max_restarts)"
                )
                return
            await asyncio.sleep(self.life.restart_after_s)
            self.life.restart()
            self._owner.changed(self)

    async def end(self) -> None:
        """Stop the process; requests under way raise `Lost`.

        Raises:
            RunError: it cannot be ended.
        """
        self._end_calls("it was taken out of the fleet")
        for task in self._background:
            task.cancel()
        await self._process.stop()

    async def drain(self, within_s: float) -> None:
        """Wait until nothing is under way; after `within_s` have the engine give back what it has."""
        for ask_back in (False, True):
            if ask_back:
                await self._client.abort([rid for call in self._calls for rid in call.rids])
            try:
                async with asyncio.timeout(GIVE_BACK_WITHIN_S if ask_back else within_s):
                    await self._idle.wait()
                    return
            except TimeoutError:
                continue

    async def post(self, fields: dict[str, Any], num: int) -> bytes:
        """POST /generate for `num` sequences; its deadline stands still while weights are pushed.

        A request that is cancelled, or misses its deadline, is aborted at the engine too.

        Raises:
            Lost: the engine is not in service, or is lost meanwhile.
            Silent: it missed the deadline.
            Refused, Failed: see `EngineClient.generate`.
        """
        if not (self.life.lives or self.state is State.DRAINING):
            raise Lost(self._why_lost or "not in service")
        starts, prefix = self.life.starts, next(self._rids)
        rids = [f"{prefix}-{i}" for i in range(num)]
        try:
            async with asyncio.timeout(self._cfg.request_timeout_s) as scope:
                with self._under_way(_Call(rids, scope)):
                    return await self._client.generate({**fields, **self._cache_key(prefix), "rid": rids})
        except TimeoutError:
            if self._lost.is_set() or self.life.starts != starts:
                raise Lost(self._why_lost) from None
            self._in_background(self._client.abort(rids))
            raise Silent(
                f"no answer within rollout.request_timeout_s = {self._cfg.request_timeout_s:g}, though the engine works; raise "
                "that, if responses may take so long"
            ) from None
        except asyncio.CancelledError:
            self._in_background(self._client.abort(rids))
            raise

    def _cache_key(self, unique: str) -> dict[str, str]:
        """Of whose cached prefixes a request may share.

        A push that freezes requests in place cannot flush the cache: what was computed under other weights is told by its
        key, and while it is not known which weights a request will meet, it shares nothing.
        """
        if self._cfg.partial_rollouts != "in_place":
            return {}
        return {"extra_key": unique if self._num_updating else f"version {self.version}"}

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Weights are pushed to it: no progress is expected, and no deadline runs."""
        self._num_updating += 1
        for call in self._calls:
            call.stop_clock(_now())
        try:
            yield
        finally:
            self._num_updating -= 1
            self._pulse.beat(_now())
            if not self._num_updating:
                for call in self._calls:
                    call.start_clock(_now())

    def lose(self, why: str) -> None:
        """Out of service now; requests under way raise `Lost`, `live` ends the process and starts it again."""
        if self.state is State.DRAINING:
            self._end_calls(why)  # that is all that it was kept for
        if self._lost.is_set() or not self.life.lives:
            return
        self.life.lose()
        self._end_calls(why)
        self._owner.changed(self)

    def praise(self) -> None:
        """It gave an answer that can be used."""
        self.life.serve()
        self._num_failures = 0
        self._pulse.beat(_now())

    def blame(self, failure: EngineFailure) -> None:
        """A request failed there."""
        if failure.loses_engine:
            self.lose(f"its answer cannot be used: {failure}")
        if isinstance(failure, Failed):
            self._num_failures += 1
            if self._num_failures == 1:
                self._failing_since = _now()
            if self._num_failures >= FAILURES_IN_A_ROW and _now() - self._failing_since >= OVER_S:
                self.lose(f"{self._num_failures} requests in a row failed, the last with {failure}")

    async def _run_once(self) -> None:
        """From its start until it is lost."""
        began = _now()
        self._lost.clear()
        self._num_failures = 0
        try:
            self.url = await self._process.start()
        except ConfigError as err:
            if self.life.starts == 1:
                raise
            why = str(err)
        except RunError as err:
            why = str(err)
        else:
            self._client = EngineClient(self.url, self._pool)
            self._pulse.beat(_now())
            self.life.answers()
            self._owner.tell(
                f"{self.name} answers at {self.url} after {_now() - began:.0f} s, and waits for weights"
            )
            self._owner.changed(self)
            await self._watch()
            self._tell_loss(await self._explain())
            return
        self.life.lose()
        self._why_lost = why
        self._owner.changed(self)
        self._tell_loss(f"did not start: {why}")

    async def _watch(self) -> None:
        """Return once it is lost."""
        watchers = [asyncio.ensure_future(watch()) for watch in (self._watch_process, self._watch_progress)]
        lost = asyncio.ensure_future(self._lost.wait())
        try:
            done, _ = await asyncio.wait([lost, *watchers], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # a watcher that failed must not leave the engine unwatched
        finally:
            for task in (lost, *watchers):
                task.cancel()

    async def _watch_process(self) -> None:
        while not self._lost.is_set():
            report = await self._death_report()
            if report is not None:
                self.lose(f"its process {report}")
            await asyncio.sleep(LOOK_EVERY_S)

    async def _watch_progress(self) -> None:
        look_every_s = min(LOOK_EVERY_S, self._cfg.stall_timeout_s / 4)
        while not self._lost.is_set():
            await asyncio.sleep(look_every_s)
            await self._look()
            if self._num_updating:
                self._pulse.beat(_now())
            elif self._pulse.hangs(_now()):
                with_what = (
                    f"with {self.num_under_way} sequences" if self._calls else "idle, and /health fails,"
                )
                self.lose(
                    f"it hangs: {with_what} for {self._pulse.silent_s(_now()):.0f} s (rollout.stall_timeout_s = "
                    f"{self._cfg.stall_timeout_s:g}) without a sign of progress"
                )

    async def _look(self) -> None:
        if self._num_updating:
            return
        if not self._calls:
            if _now() - self._healthy_at < min(HEALTH_EVERY_S, self._cfg.stall_timeout_s / 4):
                return
            if await self._soon(self._client.is_healthy()):
                self._healthy_at = _now()
                self._pulse.beat(_now())
            return
        load = await self._soon(self._client.load())
        if load is not None and not self._lost.is_set():
            self._pulse.count(load.counted, _now())
            self.tokens_s = load.tokens_s
            self._owner.observed(self, load)

    async def _soon(self, answer: Awaitable[T]) -> T | None:
        """What an engine says that has not much time for it: of its silence several fit into `stall_timeout_s`."""
        try:
            async with asyncio.timeout(self._cfg.stall_timeout_s / 4):
                return await answer
        except TimeoutError:
            return None

    async def _death_report(self) -> str | None:
        try:
            async with asyncio.timeout(REPORT_WITHIN_S):
                return await self._process.death_report()
        except TimeoutError:
            return f"is out of reach: nobody says within {REPORT_WITHIN_S:.0f} s whether it lives"

    async def _explain(self) -> str:
        """Why it was lost; with how its process died, if it did, which shows a little later than broken connections."""
        if self._why_lost.startswith("its process"):
            return self._why_lost
        deadline = _now() + (DEATH_SHOWS_WITHIN_S if self._num_failures else 0.0)
        while (report := await self._death_report()) is None and _now() < deadline:
            await asyncio.sleep(0.1)
        return f"{self._why_lost}; its process {report}" if report else self._why_lost

    def _tell_loss(self, why: str) -> None:
        again = (
            f"it is started again in {self.life.restart_after_s:g} s (restart {self.life.restarts_in_a_row + 1} in a row of "
            f"{self._cfg.max_restarts})"
            if self.life.may_restart
            else "it is not started again"
        )
        self._owner.tell(
            f"{self.name} is lost, its work goes elsewhere: {why}\n{self._owner.standing()}; {again}"
        )

    def _give_up(self, why: str) -> None:
        self._why_lost = f"{why}; the last time: {self._why_lost}"
        self.life.end()
        self._owner.tell(f"{self.name} is given up: {why}; {self._owner.standing()}")
        self._owner.changed(self)

    @contextmanager
    def _under_way(self, call: _Call) -> Iterator[None]:
        if not self._calls:
            self._pulse.beat(_now())
            self._idle.clear()
        self._calls.add(call)
        if self._num_updating:
            call.stop_clock(_now())
        try:
            yield
        finally:
            self._calls.discard(call)
            if not self._calls:
                self._idle.set()

    def _end_calls(self, why: str) -> None:
        self._why_lost = why
        self._lost.set()
        for call in self._calls:
            call.end(_now())

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _now() -> float:
    return asyncio.get_running_loop().time()
