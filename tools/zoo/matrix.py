"""Injected against diagnosed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_vespo.diagnose.causes import diagnose
from megatron_vespo.diagnose.examination import examine
from megatron_vespo.evidence import Evidence
from tools.zoo.failures import CASES, make
from tools.zoo.scene import Size

HEALTHY = "healthy"
ROUTES_ALONE = ("row_shift", "layer_offset", "expert_ids", "other_sample", "missing_rows")
"""Causes that no log-prob shows."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the doctor said of one patient."""

    case: str
    seed: int
    background: str
    known: str
    """What was recorded, a key of KNOWN."""
    injected: str
    """Cause, or HEALTHY."""
    diagnosed: str
    """The first failure that it names; HEALTHY where it names none."""
    text: str
    abs_mean: float
    """Of policy - behavior, nats."""

    @property
    def is_right(self) -> bool:
        return self.injected == self.diagnosed


def _without_experts(evidence: Evidence) -> Evidence:
    """As of a dense model, or of an engine that does not return them."""
    none = np.zeros_like(evidence.is_routed)
    return replace(evidence, experts={}, is_routed=none, margin=None, replayed_logp=None)


def _two_logps(evidence: Evidence) -> Evidence:
    """As other frameworks dump: what the engine said, what the trainer says, and which versions sampled."""
    evidence = _without_experts(evidence)
    return replace(evidence, natural_logp=None, engine_logp=None, repeat_logp=None, entropy=None)


KNOWN: Mapping[str, Callable[[Evidence], Evidence]] = {
    "everything": lambda evidence: evidence,
    "no experts": _without_experts,
    "two log-probs": _two_logps,
}
"""What is left of the evidence."""


def verdict(evidence: Evidence) -> tuple[str, str]:
    """The first failure that the doctor names, and its words."""
    causes = diagnose(evidence, examine(evidence))
    first = next((cause for cause in causes if cause.is_failure), None)
    return (first.name, first.text) if first else (HEALTHY, "; ".join(cause.text for cause in causes))


def outcomes(
    case: str,
    seeds: Sequence[int],
    backgrounds: Sequence[str],
    known: Sequence[str],
    size: Size | None = None,
) -> Iterator[Outcome]:
    """Make a patient for each seed and background, and show it to the doctor."""
    for seed in seeds:
        for background in backgrounds:
            evidence = make(case, seed, size=size, background=background)
            gap = np.abs(evidence.policy_logp - evidence.behavior_logp).mean()
            for level in known:
                diagnosed, text = verdict(KNOWN[level](evidence))
                yield Outcome(
                    case=case,
                    seed=seed,
                    background=background,
                    known=level,
                    injected=CASES[case].cause,
                    diagnosed=diagnosed,
                    text=text,
                    abs_mean=float(gap),
                )


def share_right(found: Sequence[Outcome]) -> float:
    """Of all."""
    return sum(outcome.is_right for outcome in found) / len(found)


def num_false_alarms(found: Sequence[Outcome]) -> int:
    """Failures named where there is none."""
    return sum(outcome.injected == HEALTHY != outcome.diagnosed for outcome in found)


def confusion(found: Sequence[Outcome]) -> str:
    """Markdown: a row for each cause that was injected, a column for each that was diagnosed."""
    causes = list(dict.fromkeys(case.cause for case in CASES.values()))
    count = Counter((outcome.injected, outcome.diagnosed) for outcome in found)
    columns = causes + sorted({outcome.diagnosed for outcome in found} - set(causes))
    lines = [f"| injected | {' | '.join(columns)} | right |", "|---" * (len(columns) + 2) + "|"]
    for cause in causes:
        if num := sum(count[cause, column] for column in columns):
            cells = " | ".join(str(count[cause, column] or "") for column in columns)
            lines.append(f"| **{cause}** | {cells} | {count[cause, cause] / num:.0%} |")
    return "\n".join(lines)
