"""Injected against diagnosed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_vespo.diagnose.causes import diagnose
from megatron_vespo.diagnose.examination import examine
from megatron_vespo.evidence import Evidence
from tools.zoo.failures import CASES, make
from tools.zoo.scene import Size

HEALTHY = "healthy"


@dataclass(frozen=True)
class Outcome:
    """What the doctor said of one patient."""

    case: str
    seed: int
    dtype: str
    """Of the engine."""
    injected: str
    """Cause, or HEALTHY."""
    diagnosed: str
    """The first failure that it names; HEALTHY where it names none."""
    text: str

    @property
    def is_right(self) -> bool:
        return self.injected == self.diagnosed


def verdict(evidence: Evidence) -> tuple[str, str]:
    """The first failure that the doctor names, and its words."""
    causes = diagnose(evidence, examine(evidence))
    first = next((cause for cause in causes if cause.is_failure), None)
    return (first.name, first.text) if first else (HEALTHY, "; ".join(cause.text for cause in causes))


def outcomes(
    names: Iterable[str], seeds: Sequence[int], dtypes: Sequence[str], size: Size | None = None
) -> Iterator[Outcome]:
    """Make each patient and show it to the doctor."""
    for name in names:
        for seed in seeds:
            for dtype in dtypes:
                diagnosed, text = verdict(make(name, seed, size=size, dtype=getattr(torch, dtype)))
                yield Outcome(name, seed, dtype, CASES[name].cause, diagnosed, text)


def share_right(found: Sequence[Outcome]) -> float:
    """Of all."""
    return sum(outcome.is_right for outcome in found) / len(found)


def false_alarms(found: Sequence[Outcome]) -> int:
    """Failures named where there is none."""
    return sum(outcome.injected == HEALTHY != outcome.diagnosed for outcome in found)


def as_markdown(found: Sequence[Outcome]) -> str:
    """The confusion matrix: a row for each cause that was injected, a column for each that was diagnosed."""
    causes = list(dict.fromkeys(case.cause for case in CASES.values()))
    count = Counter((outcome.injected, outcome.diagnosed) for outcome in found)
    columns = [*causes, *sorted({outcome.diagnosed for outcome in found} - set(causes))]
    lines = [
        "| injected | " + " | ".join(columns) + " | right |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for cause in causes:
        num = sum(count[cause, column] for column in columns)
        cells = [str(count[cause, column] or "") for column in columns]
        if num:
            lines.append(f"| **{cause}** | " + " | ".join(cells) + f" | {count[cause, cause] / num:.0%} |")
    return "\n".join(lines)
