"""All the ways in which asking an engine can fail, and the whole retry policy.

What is tried again, how often, after how long, and what becomes of the engine is said by the classes below.  `Attempts`
applies it to one request; it is used in one place, `Fleet._ask`.

    kind      what happened                                     tried again      the engine
    refused   4xx: the request is wrong                         never            stays
    failed    5xx, or no connection                             5 times          is lost after 5 in a row, over 1 s
    silent    no answer within rollout.request_timeout_s        once             stays: its progress is watched apart
    unusable  the answer fails a check                          once             is lost: something in it is broken
    lost      the engine left service with the request          5 times          is being started again
    aborted   given back without a token, or half scored        20 times         stays
    moved     the weights changed while a sequence was scored   20 times         stays

"Again" is elsewhere where there is another engine.  Counts start anew for every request; a response that was interrupted
and keeps tokens goes on as a new request, which is no failure.
"""

from __future__ import annotations

from typing import ClassVar

from megatron_vespo.types import RunError

LONGEST_PAUSE_S = 5.0


class EngineFailure(Exception):
    """One request failed at one engine; the message says how."""

    kind: ClassVar[str]
    retries: ClassVar[int]
    pause_s: ClassVar[float] = 0.0
    """Before the first retry; doubled for each further one."""
    loses_engine: ClassVar[bool] = False


class Refused(EngineFailure):
    kind, retries = "refused", 0


class Failed(EngineFailure):
    kind, retries, pause_s = "failed", 5, 0.2


class Silent(EngineFailure):
    kind, retries = "silent", 1


class Unusable(EngineFailure):
    """A field of an answer is missing or impossible; the message says which, and what was expected."""

    kind, retries, loses_engine = "unusable", 1, True


class Lost(EngineFailure):
    kind, retries = "lost", 5


class Aborted(EngineFailure):
    kind, retries, pause_s = "aborted", 20, 0.05


class Moved(EngineFailure):
    kind, retries = "moved", 20


FAILURES = (Refused, Failed, Silent, Unusable, Lost, Aborted, Moved)


class NobodyServes(Exception):
    """There is no engine whose weights are confirmed."""


class Attempts:
    """The failures of one request so far."""

    def __init__(self, who: str) -> None:
        """`who`: names the request in errors, e.g. "prompt 'p7'"."""
        self._who = who
        self._reasons: list[str] = []
        self._counts: dict[str, int] = {}
        self.avoid: frozenset[str] = frozenset()
        """Engines that failed it."""

    def note(self, engine: str, failure: EngineFailure) -> float:
        """Seconds to pause before the request is tried again.

        Raises:
            RunError: it is not tried again; every reason so far is in the message.
        """
        count = self._counts[failure.kind] = self._counts.get(failure.kind, 0) + 1
        self._reasons.append(f"{engine}: {failure}")
        if count > failure.retries:
            reasons = "\n  ".join(dict.fromkeys(self._reasons))
            raise RunError(
                f"{self._who} = {failure.kind}: asked for {len(self._reasons)} time(s), expected an answer; what the engines "
                f"did, see their logs:\n  {reasons}"
            ) from failure
        if not isinstance(failure, Aborted | Moved):
            self.avoid |= {engine}
        return min(failure.pause_s * 2 ** (count - 1), LONGEST_PAUSE_S)
