"""docs/bug_zoo.md, out of outcomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from tools.zoo.failures import BACKGROUNDS, CASES
from tools.zoo.matrix import KNOWN, Outcome, confusion, num_false_alarms, share_right

_LONGEST = 240
_INTRODUCTION = """\
# Bug zoo

What the doctor is tested on. Each patient is a tiny Qwen3-MoE (5 layers, 16 experts top-4) in plain transformers that plays
both engines: one samples token by token with a cache and scores its samples in a prefill, the other scores them with its own
choice of experts, again, and with the engine's. A failure changes engine, trainer or record as the real one would, at a
realistic magnitude; weights "one version old" are one optimizer step back. Written by `python tools/bug_zoo.py`.

Backgrounds: {backgrounds}. A `bfloat16` engine against the float32 trainer gives what real pairs give (k3 about 6e-4 to 1e-3,
2 to 3 % of the choices of experts differ, 60 % of the squared gap due to routing). Rules were tuned on seeds 0 to 2; these are
seeds {seeds}.
"""


def markdown(found: Sequence[Outcome]) -> str:
    """The whole page."""
    whole = [outcome for outcome in found if outcome.known == "everything"]
    seeds = sorted({outcome.seed for outcome in whole})
    return "\n".join([
        _INTRODUCTION.format(backgrounds=", ".join(BACKGROUNDS), seeds=", ".join(map(str, seeds))),
        "## Injected against diagnosed\n",
        f"**{share_right(whole):.1%} of {len(whole)} are right; {num_false_alarms(whole)} healthy ones are called ill.** A row for "
        "each cause that was injected, a column for what the doctor names first.\n",
        confusion(whole), "",
        "## Patients\n",
        _patients(whole), "",
        "## With less on record\n",
        "Most dumps hold less than a probe. What the doctor names first, by what is left of the same evidence: without experts (a "
        "dense model, or an engine that does not return them), and with two log-probs per token alone.\n",
        _less(found), "",
    ])  # fmt: skip


def _patients(whole: Sequence[Outcome]) -> str:
    lines = [
        "| patient | what is wrong | mean gap, nats | right | the doctor says |",
        "|---|---|---|---|---|",
    ]
    for name, case in CASES.items():
        mine = [outcome for outcome in whole if outcome.case == name]
        if mine:
            right = sum(outcome.is_right for outcome in mine)
            gap = np.median([outcome.abs_mean for outcome in mine])
            first = next((outcome for outcome in mine if outcome.is_right), mine[0])
            lines.append(
                f"| {name} | {case.what} | {gap:.3f} | {right}/{len(mine)} | {_short(first.text) or 'nothing'} |"
            )
    return "\n".join(lines)


def _less(found: Sequence[Outcome]) -> str:
    lines = [f"| injected | {' | '.join(KNOWN)} |", "|---" * (len(KNOWN) + 1) + "|"]
    for cause in dict.fromkeys(case.cause for case in CASES.values()):
        cells = []
        for level in KNOWN:
            names = Counter(o.diagnosed for o in found if o.known == level and o.injected == cause)
            cells.append(", ".join(f"{name} {num}" for name, num in names.most_common()))
        if any(cells):
            lines.append(f"| **{cause}** | {' | '.join(cells)} |")
    return "\n".join(lines)


def _short(text: str) -> str:
    text = text.replace("|", "\\|")
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
