"""Which sequences of a batch are measured more closely than by the cheap counters: drawn anew each step, the same after a resume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vespo.config import TrainConfig
from megatron_vespo.types import TrainSequence

Places = tuple[int, ...]
"""In the batch, ascending."""


@dataclass(frozen=True)
class Selection:
    """Places in the batch of one step."""

    examined: Places = ()
    """In all of the trainer's passes (`types.Examined`); none where the step writes no evidence."""
    rescored: Places = ()
    """Scored again by the engine."""
    routed: Places = ()
    """Those whose expert choices the driver compares: all that are examined, and others."""

    @classmethod
    def of(cls, cfg: TrainConfig, step: int, sequences: Sequence[TrainSequence]) -> Selection:
        """Of the batch that makes version `step`.

        Evidence is due at the first step, so that a setup that cannot work shows at once, and at every multiple of
        instruments.every.  Examined sequences are drawn from the whole batch; the others that are re-scored are evenly
        spread over it.
        """
        draw = np.random.default_rng((cfg.seed, step)).permutation(len(sequences))
        every, num = cfg.instruments.every, cfg.instruments.sequences
        is_due = every > 0 and (step == 1 or step % every == 0)
        examined = {int(i) for i in draw[:num]} if is_due else set[int]()
        wanted = min(cfg.loop.rescored_sequences or len(sequences), len(sequences))
        spread = np.linspace(0, len(sequences) - 1, wanted)
        rescored = {int(i) for i in spread} | examined
        budget = cfg.instruments.expert_tokens - sum(len(sequences[i].token_ids) for i in examined)
        routed = set(examined)
        for i in (int(i) for i in draw if int(i) in rescored - examined):
            budget -= len(sequences[i].token_ids)
            if budget < 0 and routed:  # one sequence in any case
                break
            routed.add(i)
        return cls(*(tuple(sorted(places)) for places in (examined, rescored, routed)))
