"""The staleness-bounded hand-over of groups from the producers to the trainer; pure asyncio."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, takewhile

from megatron_vespo.config import LoopConfig
from megatron_vespo.types import Group


@dataclass(eq=False)
class Ticket:
    """The place in the queue of one admitted prompt."""

    last_step: int
    """Weight version on top of which its group is trained at the latest: that of its admission, plus S."""
    group: Group | None = None
    ordinal: int = -1
    """Place of its prompt in the prompt stream."""
    has_expired: bool = False
    """It can no longer be trained on in time."""
    give_up: Callable[[], object] | None = None
    """Ends the sampling of its group."""


class GroupBuffer:
    """Groups in admission order, none older than `max_staleness` optimizer steps when it is taken.

    Proof of the bound.  Call P = prompts_per_step, S = max_staleness, v the weight version in training (v steps done,
    its weights served).  A ticket admitted under v may be taken up to version v + S (`last_step`): its tokens are
    of version v or newer, so their staleness is then at most S.  It remains to show that it is taken by then.

        In time(v):  the ticket at place q = 0, 1, ... of the queue has  last_step >= v + floor(q / P).

    That is, taken in admission order, P per step, each meets its last step.  At most (S + 1) P tickets are alive, that
    is admitted and neither released nor dropped: a ticket admitted under v has q < (S + 1) P, so it is in time.  A
    dropped ticket only moves others forward.  Taking the first P moves every other P places forward while v grows by
    one.  Taking others (`window`) is allowed only where it leaves every ticket in time.  So every ticket stays in time,
    and with q = 0 it has last_step >= v when it is taken.  S = 0 admits only what the next step trains on: synchronous.

    With `oversampling` > 1 more tickets are alive, and those beyond place (S + 1) P may miss their last step if few
    groups are dropped: `release` expires them, and their prompts are sampled again.

    Nothing is dropped for its age, and in admission order no length bias enters: a slow group is waited for.
    """

    def __init__(
        self, *, prompts_per_step: int, max_staleness: int, window: int = 0, oversampling: float = 1.0
    ) -> None:
        """
        Args:
            window: places beyond the first P among which finished groups may overtake unfinished ones.
            oversampling: factor on the number of tickets alive; above 1 where groups are dropped.
        """
        self.prompts_per_step = prompts_per_step
        self.max_staleness = max_staleness
        self.capacity = math.ceil(oversampling * (max_staleness + 1) * prompts_per_step)
        self._window = window
        self._version = 0
        self.num_overtaken = 0
        """Unfinished tickets that the last batch overtook."""
        self._queue: deque[Ticket] = deque()
        self.num_finished = 0
        """Groups that wait to be taken."""
        self._num_taken = 0
        self._places = asyncio.Semaphore(self.capacity)
        self._changed = asyncio.Event()
        self._closed = False

    @classmethod
    def of(cls, cfg: LoopConfig) -> GroupBuffer:
        """The configured buffer."""
        return cls(
            prompts_per_step=cfg.prompts_per_step,
            max_staleness=cfg.max_staleness,
            window=cfg.window,
            oversampling=cfg.oversampling,
        )

    @property
    def num_alive(self) -> int:
        """Prompts admitted and neither released nor dropped."""
        return len(self._queue) + self._num_taken

    async def admit(self) -> Ticket:
        """Wait for a free place; the ticket's order is the order of training."""
        await self._places.acquire()
        ticket = Ticket(last_step=self._version + self.max_staleness)
        self._queue.append(ticket)
        return ticket

    def fill(self, ticket: Ticket, group: Group) -> bool:
        """Hand over the finished group of an admitted prompt; false if the ticket has expired meanwhile."""
        if ticket not in self._queue:
            return False
        ticket.group = group
        self.num_finished += 1
        self._changed.set()
        return True

    def drop(self, ticket: Ticket) -> bool:
        """Give the place back: its group will not be trained on; false if the ticket has expired meanwhile."""
        if ticket not in self._queue:
            return False
        self._remove(ticket)
        self._changed.set()
        return True

    async def take(self) -> list[Group]:
        """Wait for P groups, the oldest that may be taken; an empty list once the buffer is closed.  For one caller."""
        chosen = self._chosen()
        while not self._closed and chosen is None:
            self._changed.clear()
            await self._changed.wait()
            chosen = self._chosen()
        if self._closed or chosen is None:
            return []
        youngest = chosen[-1]
        ahead = takewhile(lambda ticket: ticket is not youngest, self._queue)
        self.num_overtaken = sum(ticket.group is None for ticket in ahead)
        taken = set(map(id, chosen))
        self._queue = deque(ticket for ticket in self._queue if id(ticket) not in taken)
        self.num_finished -= len(chosen)
        self._num_taken = len(chosen)
        return [ticket.group for ticket in chosen if ticket.group]

    def release(self) -> list[Ticket]:
        """The groups last taken are trained on and the engines serve the new weights: admit as many prompts.

        Returns:
            The tickets that have expired: their prompts must be sampled again.
        """
        for _ in range(self._num_taken):
            self._places.release()
        self._num_taken = 0
        self._version += 1
        expired = [ticket for ticket in self._queue if ticket.last_step < self._version]
        for ticket in expired:
            self._remove(ticket)
            ticket.has_expired = True
            if ticket.give_up is not None and ticket.group is None:
                ticket.give_up()
        return expired

    def close(self) -> None:
        """Make `take` return at once: the run ends early."""
        self._closed = True
        self._changed.set()

    def _remove(self, ticket: Ticket) -> None:
        self._queue.remove(ticket)
        self.num_finished -= ticket.group is not None
        self._places.release()

    def progress(self) -> str:
        """What `take` is waiting for, in words."""
        ready = sum(ticket.group is not None for ticket in islice(self._queue, self.prompts_per_step))
        return f"{ready} of {self.prompts_per_step} groups, {self.num_alive} being sampled or queued"

    def _chosen(self) -> list[Ticket] | None:
        """The first P finished groups within the window, if taking them leaves every ticket in time."""
        num = self.prompts_per_step
        if self.num_finished < num:
            return None
        near = islice(self._queue, num + self._window)
        chosen = list(islice((ticket for ticket in near if ticket.group is not None), num))
        if len(chosen) < num:
            return None
        return chosen if self._window == 0 or self._leaves_in_time(chosen) else None

    def _leaves_in_time(self, chosen: list[Ticket]) -> bool:
        """Whether every ticket that is in time now is in time after `chosen` are taken and the version has grown."""
        num, version, taken, place = self.prompts_per_step, self._version, set(map(id, chosen)), 0
        for before, ticket in enumerate(self._queue):
            if id(ticket) in taken:
                continue
            was_in_time = ticket.last_step >= version + before // num
            if was_in_time and ticket.last_step < version + 1 + place // num:
                return False
            place += 1
        return True
