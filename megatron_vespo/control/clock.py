"""Bounds every wait, with a message that says who waited for whom, and times the phases of a step."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import TypeVar

from megatron_vespo.types import RunError

logger = logging.getLogger(__name__)
T = TypeVar("T")

_REMIND_S = 30.0
"""A wait longer than this is reported, again and again, with what has arrived."""


async def bounded(
    work: Awaitable[T], describe: Callable[[], str], *, deadline_s: float = math.inf, limit: str = ""
) -> T:
    """Await `work`, and tell every 30 s that it is still being waited for.

    Args:
        describe: who waits for what, and how much of it has arrived.
        limit: name of the configuration field behind `deadline_s`.

    Raises:
        RunError: it took longer than the deadline; `work` is cancelled.
    """
    started = perf_counter()
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            waited = perf_counter() - started
            if waited >= deadline_s:
                raise RunError(
                    f"{describe()} = not done after {waited:.1f} s: expected within {limit} = {deadline_s:g}; "
                    "look in logs/ for what hangs, or raise the limit"
                )
            if waited >= _REMIND_S:
                logger.warning("%s: waited %.0f s so far", describe(), waited)
            await asyncio.wait({task}, timeout=min(_REMIND_S, deadline_s - waited))
        return task.result()
    finally:
        task.cancel()


class StepClock:
    """Wall-clock seconds per phase of one optimizer step; every phase is bounded by the same deadline."""

    def __init__(self, step: int, deadline_s: float, limit: str) -> None:
        self.step = step
        self.laps_s: dict[str, float] = {}
        self._deadline_s = deadline_s
        self._limit = limit
        self._started = perf_counter()

    @property
    def elapsed_s(self) -> float:
        return perf_counter() - self._started

    async def lap(self, phase: str, work: Awaitable[T], progress: Callable[[], str] | None = None) -> T:
        """Await `work` and book its time under `phase`.

        Raises:
            RunError: it took longer than the deadline; `work` is cancelled.
        """
        started = perf_counter()

        def describe() -> str:
            return f"step {self.step}, phase '{phase}'" + (f" ({progress()})" if progress else "")

        try:
            return await bounded(work, describe, deadline_s=self._deadline_s, limit=self._limit)
        finally:
            self.laps_s[phase] = self.laps_s.get(phase, 0.0) + perf_counter() - started
