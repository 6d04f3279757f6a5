"""The conversation with SGLang servers about new weights: plain requests, in the dialect of each one's version.

Three things go wrong and are kept apart.  `Refused`: the server lives and says no.  `Lost`: no answer came.
`Interrupted`: a transfer broke off through no fault of this server, which lives, with weights that are mixed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import aiohttp

from megatron_vespo.types import RunError

ABORT_WITHIN_S = 1.0
"""Aborted requests end with the forward pass under way; whoever arrives meanwhile is not waited for any longer."""
GRACE_S = 5.0
PATIENCE_S = 20.0
PATIENCE_FACTOR = 10.0
"""Who takes so many times as long as the first of the receivers, and that many seconds (a quarter of the deadline, if that is
less), is lost: the others are paused."""

T = TypeVar("T")
K = TypeVar("K")

Mode = Literal["abort", "retract", "in_place"]


class Refused(RunError):
    """The server answered, and did not do what was asked."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status
        """Of HTTP."""


class Lost(RunError):
    """The server did not answer: it is dead, or it hangs."""


class Interrupted(RunError):
    """The server lives, but a transfer to it broke off."""


class Target(NamedTuple):
    """An engine that is to get weights."""

    name: str
    """As in messages and in the outcome; a restarted engine may keep it."""
    url: str
    """http://host:port"""


class Identity(NamedTuple):
    """One life of one server."""

    name: str
    url: str
    started: str
    """Differs between a server and the one that took its place."""


class Answer(dict[str, Any]):
    """What a server said; raises `Refused` where it did not say what it is asked for."""

    who = ""

    def __missing__(self, key: str) -> Any:
        raise Refused(f"{self.who} = without '{key}': expected what SGLang answers; see its log")


class EngineControl:
    """The HTTP side of one server; `inspect` comes first.  The caller bounds the time of every method."""

    def __init__(self, target: Target, http: aiohttp.ClientSession) -> None:
        self.name, self.url = target
        self._http = http
        self.identity = Identity(*target, "")
        self.num_ranks = 0
        """Processes that hold a part of the weights each."""
        self._has_session = True
        """SGLang >= 0.5.23 takes updates between begin_weight_update and end_weight_update only."""
        self._has_radix_cache = True
        self._layout = ""

    async def inspect(self, *, replicas: bool) -> None:
        """Read what kind of server it is.

        Args:
            replicas: whether the transport reaches data-parallel replicas (not to be confused with data-parallel attention,
                which splits one model).

        Raises:
            Refused: it has pipeline stages, or replicas.
        """
        info = await self.get("/server_info")
        if info["pp_size"] != 1:  # every stage would join the group under the same rank
            raise Refused(
                f"{self.name} = pp_size {info['pp_size']}: SGLang takes new weights in 1 stage only; start it with "
                "tensor or expert parallelism"
            )
        if info["dp_size"] != 1 and not info["enable_dp_attention"] and not replicas:
            raise Refused(
                f"{self.name} = dp_size {info['dp_size']}: SGLang gives new weights to 1 replica only; start more "
                "engines, or add enable-dp-attention, or set rollout.sync_transport = 'disk'"
            )
        self.num_ranks = info["tp_size"]
        self._layout = f"tp{info['tp_size']}-ep{info.get('ep_size', 1)}-dp{info['dp_size']}"
        self._has_radix_cache = not info["disable_radix_cache"]
        self.identity = Identity(self.name, self.url, json.dumps(info.get("startup_time")))

    async def pause(self, mode: Mode) -> None:
        """Stop generation.  Requests under way end ("abort"), wait to be computed anew ("retract"), or freeze ("in_place").

        SGLang's own mode "abort" polls once a second, and meanwhile takes no weights.  Late arrivals are retracted.
        """
        if mode == "abort":
            await self.post("/abort_request", {"rid": "", "abort_all": True})
            with contextlib.suppress(Refused):  # others have arrived
                await self.post(f"/flush_cache?timeout={ABORT_WITHIN_S}", {})  # answers when all have ended
        await self.post("/pause_generation", {"mode": "retract" if mode == "abort" else mode})

    async def begin(self) -> None:
        """Open an update, and end first what an interrupted push left open."""
        try:
            await self.post("/begin_weight_update", {})
        except Refused as err:
            self._has_session = err.status != 404
            if self._has_session:
                with contextlib.suppress(Refused):  # there was none to end
                    await self.end()
                await self.post("/begin_weight_update", {})

    async def end(self) -> None:
        """Close the update; the server finishes its weights for use."""
        if self._has_session:
            await self.post("/end_weight_update", {})

    async def confirm(self, version: int, mode: Mode) -> str | None:
        """Label the weights, forget cached keys of older ones, and return one digest of all of them, if it can tell.

        With requests frozen in place nothing can be forgotten.  New requests must then not share prefixes with old ones,
        for which they carry an `extra_key` of their version.
        """
        await self.post("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
        if self._has_radix_cache and mode != "in_place":
            await self.post("/flush_cache", {})
        served = (await self.get("/model_info"))["weight_version"]
        if served != str(version):
            raise Refused(f"{self.name} = weight version {served}: expected {version} after the push")
        return await self._digest()

    async def resume(self) -> None:
        """Let generation go on."""
        await self.post("/continue_generation", {})

    async def get(self, path: str) -> dict[str, Any]:
        return await self._ask("GET", path, None)

    async def post(self, path: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        return await self._ask("POST", path, payload)

    async def _ask(self, method: str, path: str, payload: Mapping[str, Any] | None) -> dict[str, Any]:
        """The answer; plain text (flush_cache) and nothing count as an empty object."""
        try:
            async with self._http.request(method, self.url + path, json=payload) as answer:
                status, body = answer.status, await answer.text()
        except (aiohttp.ClientError, OSError) as err:
            raise Lost(f"{self.name} at {self.url}{path} = {err!r}: no answer; see its log") from err
        if status != 200:
            raise Refused(
                f"{self.name} at {self.url}{path} = HTTP {status}: {body[:500]}; see its log", status
            )
        try:
            answer = Answer(json.loads(body) if body.startswith("{") else {})
        except ValueError as err:
            raise Refused(f"{self.name} at {self.url}{path} = no JSON ({err}); see its log") from err
        answer.who = f"{self.name} at {self.url}{path}"
        return answer

    async def _digest(self) -> str | None:
        try:
            checksum = (await self.post("/weights_checker", {"action": "checksum"}))["per_engine_checksum"]
            return f"{self._layout} {checksum}"
        except Refused:  # an older version, or one that can do it on GPUs only
            return None


class Receivers:
    """The servers of one push: those that still take part, and what became of the others."""

    def __init__(self, engines: Iterable[EngineControl], version: int, timeout_s: float) -> None:
        """
        Args:
            version: what the weights are to be.
            timeout_s: for everything that is asked, from now on; a small part is kept for what follows a failure.
        """
        self.version = version
        self.timeout_s = timeout_s
        self.grace_s = min(GRACE_S, timeout_s / 8)
        """For each of the steps that follow a failure, of which three are kept."""
        self._patience_s = min(PATIENCE_S, timeout_s / 4)
        self.until = time.monotonic() + timeout_s - 3 * self.grace_s
        self.active = list(engines)
        self.failures: dict[str, str] = {}
        self.incomplete: list[EngineControl] = []

    async def each(self, ask: Callable[[EngineControl], Awaitable[T]]) -> dict[EngineControl, T]:
        """Ask all active servers at once; return the answers, and drop who gave none."""
        return self.sort_out(await self.answers({engine: ask(engine) for engine in self.active}, self.until))

    async def answers(self, asks: Mapping[K, Awaitable[T]], until: float) -> dict[K, T | RunError]:
        """What each returned, or the RunError that it raised; `Lost` for those cut off at the deadline or as stragglers."""
        began = time.monotonic()
        tasks = {asyncio.ensure_future(ask): key for key, ask in asks.items()}
        await self.in_step(tasks, until)
        waited_s = time.monotonic() - began
        for task in tasks:
            task.cancel()  # no effect on those that are done
        await asyncio.gather(*tasks, return_exceptions=True)
        return {key: _verdict(task, waited_s) for task, key in tasks.items()}

    async def in_step(
        self, asks: Iterable[asyncio.Future[Any]], until: float, *, together: bool = False
    ) -> None:
        """Wait until all are done, at most to the deadline, or until those that are not lag far behind the first success.

        Args:
            together: return as soon as one fails, since then the others do not matter.
        """
        began, limit, pending = time.monotonic(), until, set(asks)
        while pending:
            done, pending = await asyncio.wait(
                pending, timeout=left_s(limit), return_when=asyncio.FIRST_COMPLETED
            )
            failed = [ask for ask in done if ask.exception() is not None]
            if not done or (failed and together):
                return
            if len(failed) < len(done):
                taken_s = time.monotonic() - began
                limit = min(limit, began + max(self._patience_s, PATIENCE_FACTOR * taken_s))

    def sort_out(self, answers: Mapping[EngineControl, T | RunError]) -> dict[EngineControl, T]:
        """Drop who gave an error, and return the others' answers."""
        for engine, answer in answers.items():
            if isinstance(answer, RunError):
                self.drop(engine, answer)
        return {engine: answer for engine, answer in answers.items() if not isinstance(answer, RunError)}

    def drop(self, engine: EngineControl, why: RunError) -> None:
        """Go on without a server: for ever, or until it is sent everything again if it was `Interrupted`."""
        self.active = [other for other in self.active if other is not engine]
        self.incomplete = [other for other in self.incomplete if other is not engine]
        if isinstance(why, Interrupted):
            self.incomplete.append(engine)
        else:
            self.failures[engine.name] = str(why)


def left_s(until: float) -> float:
    """Seconds until a time of time.monotonic; 0 when it is past."""
    return max(until - time.monotonic(), 0.0)


def _verdict(task: asyncio.Future[T], waited_s: float) -> T | RunError:
    if task.cancelled():
        return Lost(f"no answer for {waited_s:.0f} s: it hangs; see its log")
    err = task.exception()
    if err is None:
        return task.result()
    if isinstance(err, RunError):
        return err
    raise err
