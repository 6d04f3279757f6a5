"""The staleness-bounded hand-over of groups from the producers to the trainer; pure asyncio."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from megatron_vespo.types import Group


@dataclass(eq=False)
class Ticket:
    """The place in the queue of one admitted prompt."""

    group: Group | None = None


class GroupBuffer:
    """Groups in admission order, none older than `max_staleness` optimizer steps when it is taken.

    Proof of the bound.  Call P = prompts_per_step and S = max_staleness.  At most (S + 1) P groups are alive,
    that is admitted and not yet released, and P of them are taken and released per step, oldest first.  Under
    weight version v (v steps done, v P groups released) the newest group has index i < v P + (S + 1) P, so it
    is taken in step floor(i / P) <= v + S, on top of version floor(i / P).  Its tokens are of version v or
    newer: its staleness is at most S.  S = 0 admits only what the next step trains on: synchronous training.

    Nothing is dropped for its age, and no length bias enters: a slow group is waited for.
    """

    def __init__(self, *, prompts_per_step: int, max_staleness: int) -> None:
        self.prompts_per_step = prompts_per_step
        self.capacity = (max_staleness + 1) * prompts_per_step
        self._alive = 0
        self._queue: deque[Ticket] = deque()
        self._changed = asyncio.Condition()
        self._closed = False

    async def admit(self) -> Ticket:
        """Wait for a free place; the ticket's order is the order of training."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._alive < self.capacity)
            self._alive += 1
            ticket = Ticket()
            self._queue.append(ticket)
            return ticket

    async def fill(self, ticket: Ticket, group: Group) -> None:
        """Hand over the finished group of an admitted prompt."""
        async with self._changed:
            ticket.group = group
            self._changed.notify_all()

    async def take(self) -> list[Group]:
        """Wait for the oldest P groups; an empty list once the buffer is closed."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or len(self._ready()) == self.prompts_per_step)
            if self._closed:
                return []
            return [group for _ in range(self.prompts_per_step) if (group := self._queue.popleft().group)]

    async def release(self) -> None:
        """The groups last taken are trained on and the engine serves the new weights: admit as many prompts."""
        async with self._changed:
            self._alive -= self.prompts_per_step
            self._changed.notify_all()

    async def close(self) -> None:
        """Make `take` return at once: the run ends early."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    def progress(self) -> str:
        """What `take` is waiting for, in words."""
        return (
            f"{len(self._ready())} of {self.prompts_per_step} groups, {self._alive} being sampled or queued"
        )

    def _ready(self) -> list[Ticket]:
        oldest = list(self._queue)[: self.prompts_per_step]
        return [ticket for ticket in oldest if ticket.group is not None]
