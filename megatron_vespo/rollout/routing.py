"""Who may send what to which engine, as a pure state machine: nothing here waits, or knows of time or HTTP.

The oldest request is served first, and nobody overtakes it.  It goes to the engine that had its prompt before, whose
cache holds the prefix, unless that one is clearly busier than the least busy.  How much an engine is given adapts as
TCP does: less by a factor when it reports a queue or retracts what it had begun, more by a constant otherwise.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

IMBALANCE = 0.25
"""A prompt leaves the engine that has its prefix for one that is emptier by so much of its limit."""
SHRINK = 0.8
GROW_IN_STEPS = 32
"""So many observations without a queue take the limit from 0 to its most."""
QUEUE_SHARE = 0.05
"""A queue of up to this share of what runs is one that is just being taken in."""
REMEMBERED_PROMPTS = 65536


@dataclass(eq=False)
class Ask:
    """A request that waits for an engine."""

    ticket: int
    """Order of arrival of its prompt: the resumed part of an old response goes before a new prompt."""
    num: int
    """Sequences."""
    uid: str
    """Names the prefix: of the prompt, or of the conversation."""
    avoid: frozenset[str] = frozenset()
    """Engines that failed it, taken only where there is no other."""
    withdrawn: bool = False

    def __lt__(self, other: Ask) -> bool:
        return self.ticket < other.ticket


@dataclass(eq=False)
class _Place:
    """One engine as the router sees it."""

    name: str
    most: int
    limit: float
    is_open: bool = False
    in_flight: int = 0
    """Sequences of requests without an answer: those of a group count until its last one has ended."""
    reported: int | None = None
    """Sequences that the engine said it had, and those granted since about then, by report."""
    granted: tuple[int, int] = (0, 0)
    was_queueing: bool = False

    @property
    def occupied(self) -> int:
        if self.reported is None:
            return self.in_flight
        return min(self.in_flight, self.reported + sum(self.granted))

    @property
    def load(self) -> float:
        return self.occupied / self.limit

    def has_room(self, num: int) -> bool:
        """A group that is larger than the whole limit goes alone."""
        return self.occupied + num <= self.limit or self.occupied == 0


class Routing:
    """Admission and choice of engine for one kind of request."""

    def __init__(self, most: int) -> None:
        """`most`: sequences that one engine is ever given at a time."""
        self._most = most
        self._places: dict[str, _Place] = {}
        self._waiting: list[Ask] = []
        self._num_waiting = 0
        self._homes: OrderedDict[str, str] = OrderedDict()

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for an engine."""
        return self._num_waiting

    @property
    def num_in_flight(self) -> int:
        return sum(place.in_flight for place in self._places.values())

    @property
    def limit(self) -> float:
        """Sequences that the open engines are given together."""
        return sum(place.limit for place in self._places.values() if place.is_open)

    def open(self, name: str) -> None:
        """The engine takes work from now on."""
        self._place(name).is_open = True

    def close(self, name: str) -> None:
        """The engine is given nothing new; what it has is released as usual."""
        self._place(name).is_open = False

    def renew(self, name: str) -> None:
        """The engine starts from nothing: what its forerunner reported and was limited to means nothing."""
        place = self._place(name)
        place.limit, place.reported, place.was_queueing = float(self._most), None, False

    def ask(self, ask: Ask) -> None:
        heapq.heappush(self._waiting, ask)
        self._num_waiting += ask.num

    def withdraw(self, ask: Ask) -> None:
        """Whoever waited is gone."""
        if not ask.withdrawn:
            ask.withdrawn = True
            self._num_waiting -= ask.num

    def grants(self) -> Iterable[tuple[Ask, str]]:
        """Requests that may go now, and where to; each must be released."""
        while self._waiting:
            ask = self._waiting[0]
            if ask.withdrawn:
                heapq.heappop(self._waiting)
                continue
            place = self._choose(ask)
            if place is None:
                return
            heapq.heappop(self._waiting)
            self._num_waiting -= ask.num
            place.in_flight += ask.num
            place.granted = (place.granted[0], place.granted[1] + ask.num)
            self._remember(ask.uid, place.name)
            yield ask, place.name

    def release(self, name: str, num: int) -> None:
        """A request that was granted has ended, in whatever way."""
        self._place(name).in_flight -= num

    def observe(self, name: str, *, running: int, queued: int, retracted: bool = False) -> None:
        """What an engine says of itself; from it follow its free room and its limit.

        Args:
            running: sequences that it works on.
            queued: sequences that it has no room for yet.
            retracted: it threw away the key-value cache of something that it had begun, since the last observation.
        """
        place = self._place(name)
        place.reported = running + queued
        place.granted = (place.granted[1], 0)
        queueing = queued > QUEUE_SHARE * running
        if retracted or (queueing and place.was_queueing):
            if place.occupied <= place.limit:  # else the last cut has not taken effect
                place.limit = max(1.0, SHRINK * min(place.limit, place.occupied))
        elif not queueing and place.load >= 0.5:  # a limit that does not bind says nothing
            place.limit = min(place.limit + self._most / GROW_IN_STEPS, float(self._most))
        place.was_queueing = queueing

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            self._places[name] = _Place(name, self._most, float(self._most))
        return self._places[name]

    def _choose(self, ask: Ask) -> _Place | None:
        able = [place for place in self._places.values() if place.is_open]
        able = [place for place in able if place.name not in ask.avoid] or able
        able = [place for place in able if place.has_room(ask.num)]
        if not able:
            return None
        least = min(able, key=lambda place: place.load)
        home = self._places.get(self._homes.get(ask.uid, ""))
        return home if home in able and home.load <= least.load + IMBALANCE else least

    def _remember(self, uid: str, name: str) -> None:
        self._homes[uid] = name
        self._homes.move_to_end(uid)
        if len(self._homes) > REMEMBERED_PROMPTS:
            self._homes.popitem(last=False)
