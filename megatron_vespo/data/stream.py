"""The order in which prompts and demonstrations come, and the ledger of those that are done.

An *ordinal* names one visit to one item for ever: its place in the stream, counted over epochs.  Which item it is
depends on (seed, epoch) alone.  Items may be done in any order, because groups overtake each other and some are
filtered; what a checkpoint must know is therefore the frontier, below which all are done, and the few above it.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Generic, Literal, TypeVar, get_args

import numpy as np

from megatron_vespo.config import ConfigError
from megatron_vespo.types import RunError

T = TypeVar("T")

Kind = Literal["trained", "filtered"]
"""How a visit ends: its group was trained on, or had no signal and was counted instead."""


class Ledger:
    """Which ordinals are done, each exactly once, and as what.

    Args:
        size: items of one epoch.
        frontier: so many are done as "trained", in order; for a consumer that keeps no more than a count.
    """

    def __init__(self, size: int, frontier: int = 0) -> None:
        self.size = size
        self.frontier = 0
        """All ordinals below are done."""
        self._above: set[int] = set()
        self._counts: dict[Kind, list[int]] = {kind: [] for kind in get_args(Kind)}
        self.done(range(frontier), "trained")

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Ledger:
        """The ledger whose `state()` this is."""
        ledger = cls(state["size"])
        ledger.frontier = state["frontier"]
        ledger._above = set(state["done"])
        ledger._counts = {kind: list(state[kind]) for kind in get_args(Kind)}
        return ledger

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, in JSON's types; small, because `done` holds only what is above the frontier."""
        counts = {kind: list(numbers) for kind, numbers in self._counts.items()}
        return {"size": self.size, "frontier": self.frontier, "done": sorted(self._above), **counts}

    def is_done(self, ordinal: int) -> bool:
        return ordinal < self.frontier or ordinal in self._above

    def count(self, kind: Kind, epoch: int | None = None) -> int:
        """Visits that ended so, in one epoch (from 0) or in all."""
        numbers = self._counts[kind]
        if epoch is None:
            return sum(numbers)
        return numbers[epoch] if epoch < len(numbers) else 0

    def done(self, ordinals: Iterable[int], kind: Kind) -> None:
        """Write down that these visits ended; all of them or, at an error, none.

        Raises:
            RunError: one of them is done already, or is given twice.
        """
        ordinals = list(ordinals)
        if twice := sorted(o for o, times in Counter(ordinals).items() if times > 1 or self.is_done(o)):
            raise RunError(
                f"prompt ordinals = {twice}: done twice, expected once, or a prompt is trained twice in one epoch; this is a "
                "fault of the program: resume from the last checkpoint"
            )
        numbers = self._counts[kind]
        for ordinal in ordinals:
            epoch = ordinal // self.size
            numbers.extend([0] * (epoch + 1 - len(numbers)))
            numbers[epoch] += 1
        self._above.update(ordinals)
        while self.frontier in self._above:
            self._above.remove(self.frontier)
            self.frontier += 1


class EpochStream(Generic[T]):
    """The items again and again: every item exactly once per epoch, each epoch in its own seeded order.

    A visit is issued, and then either done or given back; the ledger alone is kept across runs, so that what was
    under way when a run ended is issued again by the next one.
    """

    def __init__(self, items: Sequence[T], seed: int, shuffle: bool, ledger: Ledger) -> None:
        if not items:
            raise ConfigError("items = []: expected at least one to stream; give a file with rows")
        if len(items) != ledger.size:
            raise ConfigError(
                f"items = {len(items)}: the run so far counted {ledger.size} in an epoch, expected as many; keep the data as "
                "they were, or start a new run"
            )
        self.ledger = ledger
        self._items = items
        self._seed = seed
        self._shuffle = shuffle
        # Ordinals under way lie in a window, which seldom spans more than two epochs.
        self._order = lru_cache(maxsize=4)(self._permutation)
        self._next = ledger.frontier
        self._under_way: set[int] = set()
        self._returned: list[int] = []  # a heap

    @property
    def num_under_way(self) -> int:
        """Visits issued and neither done nor given back."""
        return len(self._under_way)

    def item(self, ordinal: int) -> T:
        """What is visited there."""
        epoch, offset = divmod(ordinal, len(self._items))
        return self._items[self._order(epoch)[offset]]

    def issue(self) -> tuple[int, T]:
        """The lowest ordinal that is neither done nor under way, which is under way from now on, and its item."""
        if self._returned:
            ordinal = heapq.heappop(self._returned)
        else:
            while self.ledger.is_done(self._next):
                self._next += 1
            ordinal = self._next
            self._next += 1
        self._under_way.add(ordinal)
        return ordinal, self.item(ordinal)

    def take(self, num: int) -> tuple[list[int], list[T]]:
        """Issue `num` at once: ordinals, and their items."""
        issued = [self.issue() for _ in range(num)]
        return [ordinal for ordinal, _ in issued], [item for _, item in issued]

    def give_back(self, ordinal: int) -> None:
        """Its visit came to nothing: it is issued again, before all newer ones.

        Raises:
            RunError: it is not under way.
        """
        self._check_under_way([ordinal])
        self._under_way.remove(ordinal)
        heapq.heappush(self._returned, ordinal)

    def done(self, ordinals: Iterable[int], kind: Kind) -> None:
        """Their visits ended, for ever; all of them or, at an error, none.

        Raises:
            RunError: one of them is not under way, or is given twice.
        """
        ordinals = list(ordinals)
        self._check_under_way(ordinals)
        self.ledger.done(ordinals, kind)
        self._under_way.difference_update(ordinals)

    def report(self) -> str:
        """Every epoch that is not complete, in words (people count epochs from 1)."""
        size, parts = len(self._items), []
        last = max(self._next - 1, self.ledger.frontier) // size
        for epoch in range(self.ledger.frontier // size, last + 1):
            trained, filtered = (self.ledger.count(kind, epoch) for kind in get_args(Kind))
            under_way = sum(ordinal // size == epoch for ordinal in self._under_way)
            parts.append(
                f"epoch {epoch + 1}: {trained} of {size} trained once, {filtered} filtered, {under_way} under way"
            )
        return "; ".join(parts)

    def _permutation(self, epoch: int) -> Sequence[int] | np.ndarray:
        size = len(self._items)
        return np.random.default_rng([self._seed, epoch]).permutation(size) if self._shuffle else range(size)

    def _check_under_way(self, ordinals: list[int]) -> None:
        if strangers := [ordinal for ordinal in ordinals if ordinal not in self._under_way]:
            raise RunError(
                f"prompt ordinals = {strangers}: expected ones under way, these are "
                f"{'done' if all(map(self.ledger.is_done, strangers)) else 'not issued'}; this is a fault of the program: "
                "resume from the last checkpoint"
            )
