"""The life of one engine as a pure state machine, and how long it may show no sign of life.

    STARTING -> STALE -> SERVING -> DRAINING -> GONE
                  ^         |
                  +---------+  another engine was confirmed at newer weights
    STARTING, STALE, SERVING -> LOST -> STARTING

No edge leads to SERVING but that from STALE, which only a confirmed weight push takes: an engine that was started
again cannot sample before it has the current weights.
"""

from __future__ import annotations

from collections.abc import Hashable
from enum import Enum

FIRST_RESTART_AFTER_S = 1.0
LONGEST_RESTART_AFTER_S = 60.0


class State(Enum):
    """Where an engine stands."""

    STARTING = "starting"
    STALE = "stale"
    """It answers, and must be confirmed at the fleet's version before it is given anything new."""
    SERVING = "serving"
    DRAINING = "draining"
    """It ends what it has, and is then stopped."""
    LOST = "lost"
    """Out of service; it is stopped, and started again."""
    GONE = "gone"


EDGES: dict[State, frozenset[State]] = {
    State.STARTING: frozenset({State.STALE, State.LOST, State.GONE}),
    State.STALE: frozenset({State.SERVING, State.DRAINING, State.LOST}),
    State.SERVING: frozenset({State.STALE, State.DRAINING, State.LOST}),
    State.DRAINING: frozenset({State.GONE}),
    State.LOST: frozenset({State.STARTING, State.GONE}),
    State.GONE: frozenset(),
}


class Life:
    """One engine's state, the weights that it was confirmed at, and its restarts."""

    def __init__(self, max_restarts: int) -> None:
        """`max_restarts`: in a row, without an answer in between that could be used."""
        self.state = State.STARTING
        self.version: int | None = None
        """Confirmed weight version of this start; None before the first."""
        self.starts = 1
        """Names the process that runs now among all that ran under this engine's name."""
        self._max_restarts = max_restarts
        self.restarts_in_a_row = 0

    @property
    def lives(self) -> bool:
        """Whether it answers and may be pushed to."""
        return self.state in (State.STALE, State.SERVING)

    @property
    def may_restart(self) -> bool:
        return self.restarts_in_a_row < self._max_restarts

    @property
    def restart_after_s(self) -> float:
        return min(FIRST_RESTART_AFTER_S * 2**self.restarts_in_a_row, LONGEST_RESTART_AFTER_S)

    def answers(self) -> None:
        """It has started."""
        self._to(State.STALE)

    def confirm(self, version: int) -> None:
        """It serves `version`, shown by a push and a canary."""
        if self.state is not State.SERVING:
            self._to(State.SERVING)
        self.version = version

    def outdate(self) -> None:
        """Another engine serves newer weights."""
        self._to(State.STALE)

    def lose(self) -> None:
        self._to(State.LOST)
        self.version = None

    def restart(self) -> None:
        self._to(State.STARTING)
        self.starts += 1
        self.restarts_in_a_row += 1

    def serve(self) -> None:
        """It gave an answer that could be used: restarts are counted anew."""
        self.restarts_in_a_row = 0

    def drain(self) -> None:
        self._to(State.DRAINING)

    def end(self) -> None:
        """It is stopped for good."""
        self._to(State.GONE)

    def _to(self, state: State) -> None:
        if state not in EDGES[self.state]:
            raise ValueError(f"engine state {self.state.value} -> {state.value}: there is no such edge")
        self.state = state


class Pulse:
    """Signs of life of one engine, against a clock that the caller reads (seconds)."""

    def __init__(self, stall_timeout_s: float) -> None:
        self._stall_timeout_s = stall_timeout_s
        self._last_sign = 0.0
        self._counted: Hashable = None

    def beat(self, now: float) -> None:
        """A sign of life, or a moment at which none is to be expected."""
        self._last_sign = now

    def count(self, counted: Hashable, now: float) -> None:
        """What the engine says it has done so far; a change is a sign of life."""
        if counted != self._counted:
            self._counted = counted
            self.beat(now)

    def silent_s(self, now: float) -> float:
        return now - self._last_sign

    def hangs(self, now: float) -> bool:
        return self.silent_s(now) > self._stall_timeout_s
