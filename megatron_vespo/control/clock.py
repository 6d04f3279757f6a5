"""Times the phases of one step and bounds every wait, with a message that says who waited for whom."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import TypeVar

from megatron_vespo.types import RunError

logger = logging.getLogger(__name__)
T = TypeVar("T")

_REMIND_S = 30.0
"""A wait longer than this is reported, again and again, with what has arrived."""


class StepClock:
    """Wall-clock seconds per phase of one optimizer step."""

    def __init__(self, step: int, deadline_s: float) -> None:
        self.step = step
        self.deadline_s = deadline_s
        self.laps_s: dict[str, float] = {}
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
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                waited = perf_counter() - started
                if waited >= self.deadline_s:
                    raise RunError(self._describe(phase, waited, progress) + f": expected to end within "
                                   f"loop.step_timeout_s = {self.deadline_s:g}; look at logs/ for what hangs, "
                                   "or raise the limit")  # fmt: skip
                if waited >= _REMIND_S:
                    logger.warning(self._describe(phase, waited, progress))
                await asyncio.wait({task}, timeout=min(_REMIND_S, self.deadline_s - waited))
            return task.result()
        finally:
            task.cancel()
            self.laps_s[phase] = self.laps_s.get(phase, 0.0) + perf_counter() - started

    def _describe(self, phase: str, waited: float, progress: Callable[[], str] | None) -> str:
        arrived = f" ({progress()})" if progress else ""
        return f"step {self.step}: the loop has waited {waited:.0f} s for '{phase}'{arrived}"
