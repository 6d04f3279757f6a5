"""What can be wrong with a simulated engine, and when.

A fault is a JSON object {"fault": KIND, ...}.  With "times": N it happens N times and is over; {"fault": "heal"} ends
all of them.  With `path` it concerns that endpoint, else /generate.

    {"fault": "die"}                                  now
    {"fault": "die", "after_tokens": N}               when N more tokens were sampled
    {"fault": "die", "bucket": K}                     when the K-th bucket of the next update is announced (K >= 1)
    {"fault": "hang"}                                 no token is sampled any more; everything else answers
    {"fault": "freeze", "bucket": K}                  the K-th bucket is never received, and the engine waits in it
    {"fault": "slow", "factor": F}                    F times as slow
    {"fault": "garbage", "how": HOW, "times": N}      answers are "truncated" JSON, of the wrong "length", without
                                                      "logprobs" (all NaN), or without "experts"
    {"fault": "wrong_version", "label": TEXT}         TEXT is reported, whatever is served
    {"fault": "stale_weights"}                        updates are answered, and change nothing but the label
    {"fault": "refuse", "status": S, "path": P}       default 400
    {"fault": "flaky", "probability": P, "status": S} default 0.5 and 500
    {"fault": "drop", "path": P}                      the connection is closed without an answer
    {"fault": "silent", "path": P}                    no answer ever, the connection stays open
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

KINDS = {
    "die", "hang", "freeze", "slow", "garbage", "wrong_version", "stale_weights", "refuse", "flaky", "drop", "silent",
}  # fmt: skip


class Faults:
    """The faults that an engine has now."""

    def __init__(self, seed: int) -> None:
        self._active: list[dict[str, Any]] = []
        self._random = random.Random(seed)

    def add(self, fault: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: there is no such fault.
        """
        kind = fault.get("fault")
        if kind == "heal":
            self._active.clear()
        elif kind in KINDS:
            self._active.append({"path": "/generate", **fault})
        else:
            raise ValueError(f"fault = {kind!r}: expected heal or one of {', '.join(sorted(KINDS))}")

    def find(self, kind: str, **matching: Any) -> dict[str, Any] | None:
        """A fault of that kind whose entries are as given, still there afterwards."""
        for fault in self._active:
            if fault["fault"] == kind and all(fault.get(key) == value for key, value in matching.items()):
                return fault
        return None

    def strike(self, kind: str, **matching: Any) -> dict[str, Any] | None:
        """As `find`, and this was one of its `times`; a fault with a probability strikes only so often."""
        fault = self.find(kind, **matching)
        if fault is None or self._random.random() >= fault.get("probability", 0.5 if kind == "flaky" else 1):
            return None
        if "times" in fault:
            fault["times"] -= 1
            if fault["times"] <= 0:
                self._active.remove(fault)
        return fault

    def active(self) -> list[dict[str, Any]]:
        return list(self._active)
