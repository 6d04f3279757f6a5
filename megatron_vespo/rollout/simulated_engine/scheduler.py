"""Continuous batching in virtual time: what runs, what waits, and how many tokens each request has.

Nothing happens per token.  All decoding requests advance by one token per step, a step takes longer the more of them
there are, and so the number of steps since the start is a clock on which every request's end is known when it begins.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_vespo.rollout.simulated_engine.behaviour import Behaviour
from megatron_vespo.rollout.simulated_engine.content import Stream

FLUSH_EVERY = 50
"""A real scheduler passes a running request's tokens on so often; of a request that waits again, the others are lost
where it is aborted."""

ROUNDING_S = 1e-9
"""What is due so soon is due now: a clock's last digits must not postpone it for ever."""

Outcome = Literal["length", "stop", "abort", "abort in queue"]


@dataclass(eq=False, slots=True)
class Request:
    """One sequence in the engine."""

    rid: str
    ids: NDArray[np.int64]
    """[P]"""
    stream: Stream
    total: int
    """Tokens that it will have when it ends by itself."""
    stops: bool
    cached: int
    """Prompt tokens that need no prefill, the first time."""
    done: asyncio.Future[Outcome]
    sampled: int = 0
    """Tokens, up to date while it does not run."""
    retractions: int = 0
    changes: list[tuple[int, str, int]] = field(default_factory=list)
    """(tokens so far, label, version) of weights that were replaced while it was here."""
    passes: list[tuple[int, int]] = field(default_factory=list)
    """(first row, version): whose experts the rows from there on are."""
    base: float = 0.0
    """Decode steps of the engine when it had no token."""
    ready: float = 0.0
    """Virtual time at which its prefill ends."""
    state: Literal["waiting", "prefilling", "decoding", "over"] = "waiting"
    times: dict[str, float] = field(default_factory=dict)
    """Loop time of what happened to it."""


class Scheduler:
    """Times every request."""

    def __init__(
        self, behaviour: Behaviour, capacity: int, label: str, version: int, loop: asyncio.AbstractEventLoop
    ) -> None:
        """
        Args:
            capacity: tokens of the key-value cache.
            label: weight version that is reported.
            version: weight version that is computed with.
            loop: whose clock and timers are used.
        """
        self.label = label
        self.version = version
        self.slowdown = 1.0
        self.max_running = behaviour.max_running_requests
        self.capacity = capacity
        self.num_sampled = 0  # without what running requests have sampled since they were last counted
        self.num_prefilled = 0
        self.num_retracted = 0
        self.num_aborted = 0
        self.num_ended = 0
        self.num_delivered = 0  # tokens of requests that ended
        self.decode_moments = [0.0] * 6
        """Sums over decode steps of 1, requests, us, requests^2, requests * us, tokens."""
        self._step_base_s, self._step_each_s = behaviour.step_s
        self._prefill_tokens_s = behaviour.prefill_tokens_s
        self._speedup = behaviour.speedup
        self._loop = loop
        self._stalls: set[str] = set()
        self._now = 0.0  # virtual
        self._seen = self._loop.time()
        self._steps = 0.0
        self._prefill_free = 0.0
        self._waiting: deque[Request] = deque()
        self._prefilling: dict[Request, None] = {}  # ordered by when they are ready
        self._decoding: dict[Request, None] = {}
        self._ends: list[tuple[float, int, Request]] = []
        self._tie = itertools.count()
        self._held_prefilling = 0  # tokens in the key-value cache
        self._held_decoding = 0.0  # the same, less the steps up to now
        self._full = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def num_running(self) -> int:
        return len(self._prefilling) + len(self._decoding)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """To be prefilled."""
        return sum(len(request.ids) + request.sampled for request in self._waiting)

    @property
    def prefill_us(self) -> int:
        """Time that prefills have taken."""
        return int(self.num_prefilled / self._prefill_tokens_s * 1e6)

    @property
    def throughput(self) -> float:
        """Tokens per second now."""
        self._catch_up()
        return len(self._decoding) / self._step_s() * self._rate() if self._decoding else 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens in the key-value cache of running requests."""
        self._catch_up()
        return int(self._num_tokens_now())

    @property
    def num_decoded(self) -> int:
        """Tokens sampled so far, those of running requests included."""
        self._catch_up()
        for request in self._decoding:
            self._count(request)
        return self.num_sampled

    def add(self, request: Request) -> None:
        self._catch_up()
        request.times["received"] = self._loop.time()
        self._waiting.append(request)
        self._admit()
        self._arm()

    def abort(self, requests: list[Request]) -> None:
        """End requests with what they have."""
        self._catch_up()
        for request in requests:
            if request.state == "waiting":
                self._waiting.remove(request)
                request.sampled -= request.sampled % FLUSH_EVERY
                self._end(request, "abort in queue")
            elif request.state != "over":
                self._leave(request)
                self._end(request, "abort")
            self.num_aborted += 1
        self._admit()
        self._arm()

    def requests(self) -> Iterator[Request]:
        """All that are neither over nor held back elsewhere."""
        yield from itertools.chain(self._decoding, self._prefilling, self._waiting)

    def retract_all(self) -> None:
        """Everything that runs waits again, its tokens kept and its cache lost."""
        self._catch_up()
        for request in [*self._decoding, *self._prefilling]:
            self._retract(request)
        self._prefill_free = self._now
        self._arm()

    def stall(self, why: str) -> None:
        """Stop virtual time until `resume(why)`; several reasons may overlap."""
        self._catch_up()
        self._stalls.add(why)
        self._arm()

    def resume(self, why: str) -> None:
        self._catch_up()
        self._stalls.discard(why)
        self._admit()
        self._arm()

    def slow_down(self, factor: float) -> None:
        self._catch_up()
        self.slowdown = factor
        self._arm()

    def change_weights(self, label: str, version: int) -> None:
        """From now on tokens carry `label` and are those of `version`."""
        self._catch_up()
        if (label, version) == (self.label, self.version):
            return
        for request in self.requests():
            self._count(request)
            if request.sampled:
                request.changes.append((request.sampled, self.label, self.version))
            if request.state == "decoding":  # the row of its last token is computed next
                request.passes.append((len(request.ids) + request.sampled - 1, version))
        self.label, self.version = label, version

    def _count(self, request: Request) -> None:
        """Bring its number of tokens up to date."""
        if request.state == "decoding":
            sampled = min(request.total, int(self._steps - request.base + 1e-6))
            self.num_sampled += sampled - request.sampled
            request.sampled = sampled

    def _num_tokens_now(self) -> float:
        return self._held_prefilling + self._held_decoding + len(self._decoding) * self._steps

    def _step_s(self) -> float:
        return self._step_base_s + self._step_each_s * len(self._decoding)

    def _rate(self) -> float:
        return 0.0 if self._stalls else self._speedup / self.slowdown

    def _next_event(self) -> float:
        """Virtual time at which something happens by itself."""
        ready = next(iter(self._prefilling)).ready if self._prefilling else float("inf")
        if not self._decoding:
            return ready
        steps = self._first_end()
        if len(self._decoding) > 1:  # alone it always fits
            room = self.capacity - self._held_prefilling - self._held_decoding
            steps = min(steps, room / len(self._decoding))
        return min(ready, self._now + (steps - self._steps) * self._step_s())

    def _first_end(self) -> float:
        """Steps at which the next decoding request has all its tokens."""
        while self._ends:
            steps, _, request = self._ends[0]
            if request.state == "decoding" and steps == request.base + request.total:
                return steps
            heapq.heappop(self._ends)  # it left before its end
        return float("inf")

    def _catch_up(self) -> None:
        """Let everything happen that was due by now, in order, however late we look."""
        now = self._loop.time()
        target = self._now + (now - self._seen) * self._rate()
        self._seen = now
        while (event := self._next_event()) <= target + ROUNDING_S:
            self._pass_to(max(event, self._now))
            self._happen()
        self._pass_to(max(target, self._now))

    def _pass_to(self, moment: float) -> None:
        if (num := len(self._decoding)) and moment > self._now:
            step_s = self._step_s()
            steps = (moment - self._now) / step_s
            self._steps += steps
            weights = (1.0, num, step_s * 1e6, num * num, num * step_s * 1e6, num)
            self.decode_moments = [a + steps * b for a, b in zip(self.decode_moments, weights, strict=True)]
        self._now = moment

    def _happen(self) -> None:
        while self._prefilling and (request := next(iter(self._prefilling))).ready <= self._now + 1e-12:
            self._leave(request)
            self._begin_decoding(request)
        while self._first_end() <= self._steps + 1e-6:
            request = self._ends[0][2]
            self._leave(request)
            self._end(request, "stop" if request.stops else "length")
        if len(self._decoding) > 1 and self._num_tokens_now() >= self.capacity - 1e-3:
            self._retract(max(self._decoding, key=lambda request: request.base))
            self._full = True
        self._admit()

    def _begin_decoding(self, request: Request) -> None:
        """The prefill itself gives one token."""
        request.passes = [(0, self.version)]
        request.times.setdefault("prefilled", self._loop.time())
        if request.total > request.sampled:
            request.sampled += 1
            self.num_sampled += 1
        if request.sampled >= request.total:
            self._end(request, "stop" if request.stops else "length")
            return
        request.state = "decoding"
        request.base = self._steps - request.sampled
        self._held_decoding += len(request.ids) - request.base
        self._decoding[request] = None
        heapq.heappush(self._ends, (request.base + request.total, next(self._tie), request))

    def _leave(self, request: Request) -> None:
        """Stop running, with the tokens that it has by now."""
        self._count(request)
        if request.state == "decoding":
            self._held_decoding -= len(request.ids) - request.base
            del self._decoding[request]
        else:
            self._held_prefilling -= len(request.ids) + request.sampled
            del self._prefilling[request]
        self._full = False

    def _retract(self, request: Request) -> None:
        self._leave(request)
        request.retractions += 1
        request.state = "waiting"
        self.num_retracted += 1
        self._waiting.append(request)

    def _end(self, request: Request, outcome: Outcome) -> None:
        request.state = "over"
        self.num_ended += 1
        self.num_delivered += request.sampled
        request.times["finished"] = self._loop.time()
        request.changes.append((request.sampled, self.label, self.version))
        if not request.done.done():
            request.done.set_result(outcome)

    def _admit(self) -> None:
        """First come, first served, into the places and the memory that there are."""
        if self._stalls or self._full:
            return
        while self._waiting and self.num_running < self.max_running:
            request = self._waiting[0]
            num = len(request.ids) + request.sampled
            if self._num_tokens_now() + num > self.capacity and self.num_running:
                return
            self._held_prefilling += num
            self._waiting.popleft()
            request.state = "prefilling"
            request.times.setdefault("admitted", self._loop.time())
            uncached = num if request.retractions else num - request.cached
            self.num_prefilled += uncached
            self._prefill_free = max(self._now, self._prefill_free) + uncached / self._prefill_tokens_s
            request.ready = self._prefill_free
            self._prefilling[request] = None

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        rate, event = self._rate(), self._next_event()
        if rate and event < float("inf"):
            self._timer = self._loop.call_later(max(0.0, (event - self._now) / rate), self._wake)

    def _wake(self) -> None:
        self._timer = None
        self._catch_up()
        self._arm()
