"""mu at scale: many SGLang engines behind one `types.Engine`, whatever happens to single ones.

An engine is started, watched, and started again when it dies, hangs or answers nonsense (member.py); it samples only after
a weight push to it was confirmed (lifecycle.py).  Requests go to whichever engine has room (routing.py); one that fails
goes to another (failures.py), and what a response already had is kept (inquiry.py).

No token leaves the fleet whose weights were not confirmed: an answer that holds newer ones, because a push switched them
while it was sampled, is held until the push to that engine is confirmed, and is asked again if it is not.  So the versions
in a response ascend, and each was served by its engine between the moment when that was asked and now.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from megatron_vespo.config import RolloutConfig
from megatron_vespo.rollout.client import Load, open_pool
from megatron_vespo.rollout.failures import FAILURES, Attempts, EngineFailure, Lost, NobodyServes, Unusable
from megatron_vespo.rollout.inquiry import Answered, Group, Request, Scoring, ServedModel
from megatron_vespo.rollout.lifecycle import State
from megatron_vespo.rollout.member import Member
from megatron_vespo.rollout.routing import Ask, Routing
from megatron_vespo.rollout.server import EngineProcess
from megatron_vespo.types import Prompt, Response, RunError, Sampling, Scored, TrainSequence

T = TypeVar("T")

DRAIN_WITHIN_S = 120.0
SCORING_SHARE = 4
"""One in so many of an engine's places is kept for scoring, which would otherwise wait for the longest response."""


class Fleet:
    """`types.Engine` over many engines; `async with` starts them all at once, watches them, and ends them."""

    def __init__(
        self,
        cfg: RolloutConfig,
        model: Path,
        engines: Sequence[EngineProcess],
        tell: Callable[[str], None],
        *,
        temperature: float = 1.0,
    ) -> None:
        """Prepare, start nothing.

        Args:
            model: the Hugging Face directory that all engines serve.
            tell: is told, in a sentence or two, what a person who watches the run should know.
            temperature: at which `score` computes.

        Raises:
            ConfigError: the directory is incomplete.
        """
        self.tell = tell
        self.version: int | None = None
        """The newest that an engine was confirmed at; whoever is below it gets no new work."""
        self._cfg = cfg
        self._model = ServedModel.read(model, record_experts=cfg.record_experts)
        self._engines = list(engines)
        self._temperature = temperature
        scoring = max(1, cfg.max_running_requests // SCORING_SHARE)
        self._sampling = _Share(Routing(max(1, cfg.max_running_requests - scoring)))
        self._scoring = _Share(Routing(scoring))
        self._members: dict[str, Member] = {}
        self._lives: dict[str, asyncio.Task[None]] = {}
        self._target = -1
        self._pushed: dict[str, int] = {}
        """To which start of which engine the newest push goes."""
        self._tickets = itertools.count()
        self._counts: Counter[str] = Counter()
        self._retracted: set[str] = set()
        self._changed = asyncio.Event()
        self._end: Exception | None = None
        self._pool: aiohttp.ClientSession

    async def __aenter__(self) -> Fleet:
        self._pool = open_pool()
        for engine in self._engines:
            self.add(engine)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._fail(RunError("fleet = closed: expected no request any more; end whoever asks first"))
        for life in self._lives.values():
            life.cancel()
        await asyncio.gather(*self._lives.values(), return_exceptions=True)
        ended = await asyncio.gather(
            *(member.end() for member in self._members.values()), return_exceptions=True
        )
        await self._pool.close()
        for member, failure in zip(self.members, ended, strict=True):
            if failure is not None:
                self.tell(f"{member.name} could not be ended: {failure}")

    async def all_started(self) -> None:
        """Wait until every engine has answered, or failed to at its first start.

        Raises:
            RunError: no engine is left.
        """
        await self._until(
            lambda: all(m.life.starts > 1 or m.state is not State.STARTING for m in self.members)
        )

    # ---- types.Engine

    async def sample(self, prompt: Prompt, num: int, sampling: Sampling) -> tuple[Response, ...]:
        """Sample `num` responses to one prompt, whatever happens to single engines meanwhile.

        Raises:
            RunError: an engine refused the request, it failed more often than failures.py allows, or no engine is left.
        """
        group = Group(prompt, num, sampling, self._model)
        ticket = next(self._tickets)
        while group.unfinished:
            parts, engine = await self._ask(group, self._sampling, ticket)
            group.take(parts, engine)
        responses = group.responses()
        self._counts["responses"] += num
        self._counts["resumed"] += sum(response.num_resumed for response in responses)
        self._counts["tokens"] += sum(len(response.token_ids) for response in responses)
        return responses

    async def score(self, sequences: Sequence[TrainSequence]) -> tuple[Scored | None, ...]:
        """Log-probs and experts of given sequences under the newest weights that are served; None where nobody serves any.

        Engines that come back do so under the weights of another moment, so nobody waits for them here.

        Raises:
            RunError: as `sample`.
        """

        async def one(sequence: TrainSequence) -> Scored | None:
            scoring = Scoring(sequence, self._temperature, self._model)
            try:
                return (await self._ask(scoring, self._scoring, next(self._tickets)))[0]
            except NobodyServes:
                return None

        return await _together([one(sequence) for sequence in sequences])

    async def _ask(self, request: Request[T], share: _Share, ticket: int) -> tuple[T, str]:
        """An answer that can be used, and who gave it.  The only place where anything is tried again."""
        attempts = Attempts(request.who)
        while True:
            async with share.place(Ask(ticket, request.num, request.uid, attempts.avoid)) as name:
                member = self._members[name]
                try:
                    answer = await self._attempt(request, member)
                except EngineFailure as failure:
                    self._counts[failure.kind] += 1
                    member.blame(failure)
                    pause_s = attempts.note(name, failure)
                else:
                    member.praise()
                    if answer.was_retracted:
                        self._retracted.add(name)
                    return answer.value, name
            request.interrupt()
            await asyncio.sleep(pause_s)

    async def _attempt(self, request: Request[T], member: Member) -> Answered[T]:
        began, starts = member.version, member.life.starts
        if member.state is not State.SERVING or began is None:
            raise Lost("it left service before it was asked")
        answer = await request.at(member.post)
        if member.life.starts != starts or not (member.life.lives or member.state is State.DRAINING):
            raise Lost(member.why_lost)  # the answer may be of weights that were found wrong
        if answer.oldest < began:
            raise Unusable(
                f"weight version {answer.oldest}: expected at least {began}, which it was confirmed at"
            )
        if answer.newest > began:
            await self._confirmation(member, answer.newest)
        return answer

    async def _confirmation(self, member: Member, version: int) -> None:
        """Wait until weights that a push switched to during a request are confirmed.

        Raises:
            Unusable: nobody pushed them.
            Lost: the engine was lost first.
        """
        starts = member.life.starts
        if version > self._target:
            raise Unusable(
                f"weight version {version}: expected at most {self._target}, the newest that was pushed"
            )

        def decided() -> bool:
            return (member.version or 0) >= version or member.life.starts != starts or not member.life.lives

        try:
            async with asyncio.timeout(self._cfg.request_timeout_s):
                await self._until(decided)
        except TimeoutError:
            raise Unusable(f"weight version {version}: was pushed, but nobody confirmed it") from None
        if (member.version or 0) < version:
            raise Lost(
                f"it was lost before its weights of version {version} were confirmed: {member.why_lost}"
            )

    # ---- weight pushes

    async def to_update(self, version: int) -> list[Member]:
        """Who must be pushed to for `version` to be served: those that live and are not confirmed at it.

        Waits until at least one engine answers; bound it.  Only who is named here can be confirmed.

        Raises:
            RunError: no engine is left.
        """
        self._target = max(self._target, version)
        await self._until(lambda: any(member.life.lives for member in self.members))
        behind = [member for member in self.members if member.life.lives and member.version != version]
        self._pushed |= {member.name: member.life.starts for member in behind}
        return behind

    async def newcomer(self) -> None:
        """Return once an engine lives that is not confirmed at the fleet's version: somebody should push to it."""
        await self._until(lambda: any(member.state is State.STALE for member in self.members))

    @contextmanager
    def updating(self, names: Sequence[str]) -> Iterator[None]:
        """A push to these is under way: they need not progress, and no deadline of a request there runs."""
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(self._members[name].updating())
            yield

    async def score_on(self, name: str, sequences: Sequence[TrainSequence]) -> tuple[Scored, ...]:
        """Score on one engine, which need not serve yet: the canary of a push.

        Raises:
            RunError: it failed in any way, or scored under another version than that of the newest push.
        """

        async def one(sequence: TrainSequence) -> Scored:
            scoring = Scoring(sequence, self._temperature, self._model)
            try:
                answer = await scoring.at(self._members[name].post)
            except EngineFailure as failure:
                raise RunError(
                    f"{scoring.who} on {name} = {failure.kind}: {failure}; see its log"
                ) from failure
            if answer.newest != self._target:
                raise RunError(
                    f"{scoring.who} on {name} = under weight version {answer.newest}: expected {self._target}, which was "
                    "pushed; start that engine again"
                )
            return answer.value

        return await _together([one(sequence) for sequence in sequences])

    def confirm(self, name: str, version: int) -> bool:
        """It serves `version`, and new work if no other serves newer weights; whether it does.

        An engine that was lost since `to_update` named it stays out, even if it has started again.
        """
        member = self._members[name]
        if not member.life.lives or self._pushed.get(name) != member.life.starts:
            self.tell(f"{name} cannot serve version {version}: it was lost while that was pushed to it")
            return False
        is_new = member.version is None
        member.life.confirm(version)
        self.version = max(version, version if self.version is None else self.version)
        for other in self.members:
            if other.state is State.SERVING and (other.version or 0) < self.version:
                other.life.outdate()
                self.changed(other)
        self.changed(member)
        if is_new and member.state is State.SERVING:
            self.tell(f"{name} serves version {version}; {self.standing()}")
        return member.state is State.SERVING

    def lose(self, name: str, why: str) -> None:
        """Out of service now: its requests go elsewhere, it is ended and started again in the background."""
        self._members[name].lose(why)

    # ---- membership

    @property
    def members(self) -> tuple[Member, ...]:
        """All engines, those that are gone included."""
        return tuple(self._members.values())

    def add(self, engine: EngineProcess) -> None:
        """Start one more engine; it serves once it is pushed to."""
        if engine.name in self._members:
            raise ValueError(f"engine name '{engine.name}': is taken; names are for ever")
        member = self._members[engine.name] = Member(engine, self._cfg, self._pool, self)
        life = self._lives[member.name] = asyncio.create_task(member.live(), name=member.name)
        life.add_done_callback(self._life_ended)

    async def drain(self, name: str, within_s: float = DRAIN_WITHIN_S) -> None:
        """Take an engine out: it is given nothing new, ends what it has, and is stopped.

        Args:
            within_s: what is not done by then is given back with what it has, and goes on elsewhere.

        Raises:
            RunError: its process cannot be ended.
        """
        member = self._members[name]
        if member.state is State.GONE:
            return
        self._lives[name].cancel()
        await asyncio.gather(self._lives[name], return_exceptions=True)
        if member.life.lives:
            member.life.drain()
            self.changed(member)
            self.tell(f"{name} is drained of {member.num_under_way} sequences; {self.standing()}")
            await member.drain(within_s)
        await member.end()
        if member.state is not State.GONE:
            member.life.end()
            self.changed(member)

    def metrics(self) -> dict[str, float]:
        """Numbers of this moment, and of failures, responses and tokens since the start."""
        states = Counter(member.state for member in self.members)
        lives = [member.life for member in self.members]
        return {
            **{f"fleet/engines_{state.value}": float(states[state]) for state in State},
            "fleet/restarts": float(sum(life.starts - 1 for life in lives)),
            "fleet/running": float(self._sampling.routing.num_in_flight),
            "fleet/waiting": float(self._sampling.routing.num_waiting),
            "fleet/admission_limit": self._sampling.routing.limit,
            "fleet/tokens_s": sum(
                member.tokens_s for member in self.members if member.state is State.SERVING
            ),
            **{f"fleet/{failure.kind}": float(self._counts[failure.kind]) for failure in FAILURES},
            **{f"fleet/{what}": float(self._counts[what]) for what in ("responses", "tokens", "resumed")},
        }

    # ---- what members report

    def standing(self) -> str:
        states = Counter(member.state for member in self.members)
        present = len(self.members) - states[State.GONE]
        return f"{states[State.SERVING]} of {present} engines serve"

    def changed(self, member: Member) -> None:
        """Route by the member's state, and wake whoever waits for one."""
        for share in (self._sampling, self._scoring):
            if member.state is State.SERVING:
                share.routing.open(member.name)
            else:
                share.routing.close(member.name)
            if member.state is State.STARTING:
                share.routing.renew(member.name)
            share.deal()
        nobody = all(other.state is not State.SERVING for other in self.members)
        self._scoring.suspend(NobodyServes("engines that serve = none") if nobody else None)
        if all(other.state is State.GONE for other in self.members):
            causes = "\n  ".join(f"{other.name}: {other.why_lost}" for other in self.members)
            self._fail(
                RunError(
                    f"engines = none left: expected at least one that serves; the last causes:\n  {causes}"
                )
            )
        self._wake()

    def observed(self, member: Member, load: Load) -> None:
        """Adapt how much the member is given."""
        retracted = member.name in self._retracted
        self._retracted.discard(member.name)
        self._sampling.routing.observe(
            member.name, running=load.running, queued=load.queued, retracted=retracted
        )
        self._sampling.deal()

    def _life_ended(self, life: asyncio.Task[None]) -> None:
        if not life.cancelled() and (error := life.exception()) is not None:
            self._fail(error if isinstance(error, Exception) else RunError(f"{life.get_name()}: {error!r}"))

    # ---- waiting

    def _fail(self, error: Exception) -> None:
        """Nothing can be sampled any more: whoever waits, or comes, is told why."""
        if self._end is None:
            self._end = error
            for share in (self._sampling, self._scoring):
                share.fail(error)
            self._wake()

    async def _until(self, done: Callable[[], bool]) -> None:
        while not done():
            if self._end is not None:
                raise _again(self._end)
            await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class _Share:
    """The places of all engines for one kind of request, and those who wait for one."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self._waiting: dict[Ask, asyncio.Future[str]] = {}
        self._end: Exception | None = None
        self._suspension: Exception | None = None

    @asynccontextmanager
    async def place(self, ask: Ask) -> AsyncIterator[str]:
        """Wait for room, and hold it at the engine that is named."""
        name = await self._granted(ask)
        try:
            yield name
        finally:
            self.routing.release(name, ask.num)
            self.deal()

    def deal(self) -> None:
        """Give out what is free."""
        for ask, name in self.routing.grants():
            future = self._waiting.pop(ask)
            if future.done():  # cancelled, and its waiter has not run yet
                self.routing.release(name, ask.num)
            else:
                future.set_result(name)

    def fail(self, error: Exception) -> None:
        """There will be no room any more."""
        self._end = error
        self._turn_away(error)

    def suspend(self, error: Exception | None) -> None:
        """Turn away whoever waits or comes, until None is given."""
        self._suspension = error
        if error is not None:
            self._turn_away(error)

    def _turn_away(self, error: Exception) -> None:
        for ask, future in self._waiting.items():
            self.routing.withdraw(ask)
            if not future.done():
                future.set_exception(_again(error))
        self._waiting.clear()

    async def _granted(self, ask: Ask) -> str:
        if (error := self._end or self._suspension) is not None:
            raise _again(error)
        future = self._waiting[ask] = asyncio.get_running_loop().create_future()
        self.routing.ask(ask)
        self.deal()
        try:
            return await future
        except asyncio.CancelledError:
            if self._waiting.pop(ask, None) is not None:
                self.routing.withdraw(ask)
            elif future.done() and not future.cancelled() and future.exception() is None:  # just granted
                self.routing.release(future.result(), ask.num)
            self.deal()
            raise


def _again(error: Exception) -> Exception:
    """The same for one more who hears of it; raising one object again and again would lengthen its traceback."""
    return type(error)(*error.args)


async def _together(work: Sequence[Coroutine[Any, Any, T]]) -> tuple[T, ...]:
    """All results in order, or the first failure: one reason is enough, the others are cancelled or the same."""
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(one) for one in work]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return tuple(task.result() for task in running)
