"""What ranks return, and how the driver puts it together: numpy alone, no megatron, no process group.

A rank knows only its own tokens, layers and rows.  It returns them together with their numbers in the batch
(`packing.response_offsets`, `packing.input_offsets`), so that merging is indexing, whatever the layout.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vespo.trainer.packing import Index, input_offsets, response_offsets
from megatron_vespo.types import Doubles, Experts, Floats, Ints, RunError, Scored, StepOutput, TrainSequence


@dataclass(frozen=True, kw_only=True)
class RouterRows:
    """Experts chosen in this rank's layers for some of the batch's inputs."""

    number: Index
    """[R] which input of the batch each row is."""
    layers: Ints
    """[l] counted from the model's first layer with a router."""
    experts: Experts
    """[R, l, K]"""


@dataclass(frozen=True, kw_only=True)
class RankOutput:
    """One rank's share of a step or of a scoring pass; arrays are empty where the rank knows nothing.

    Log-probs and what follows from them come from the last pipeline stage's first tensor rank.
    """

    token: Index
    """[S] which response token of the batch."""
    logp: Floats
    """[S] nats."""
    entropy: Floats
    """[S] nats."""
    coefficient: Doubles
    """[S]; empty after scoring."""
    sequence: Index
    """[n] which sequence of the batch."""
    log_w: Doubles
    """[n] whole-sequence log W; empty after scoring."""
    routing: tuple[RouterRows, ...]
    """One for each microbatch; empty for dense models or when not captured."""
    loss: float = 0.0
    """This rank's share; shares add."""
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    time_s: dict[str, float]


def merge_scores(outputs: Sequence[RankOutput], sequences: Sequence[TrainSequence]) -> tuple[Scored, ...]:
    """`Scored` of every sequence, in the given order, from the outputs of all ranks.

    Raises:
        RunError: a token or router row came from no rank (a defect of the trainer, never of the data).
    """
    offsets = response_offsets(sequences)
    logp = _tokens(outputs, "logp", int(offsets[-1])).astype(np.float32)
    entropy = _tokens(outputs, "entropy", int(offsets[-1])).astype(np.float32)
    experts = _experts(outputs, sequences)
    return tuple(
        Scored(logp=logp[a:b], entropy=entropy[a:b], experts=experts[i])
        for i, (a, b) in enumerate(itertools.pairwise(offsets))
    )


def merge_step(outputs: Sequence[RankOutput], sequences: Sequence[TrainSequence]) -> StepOutput:
    """`StepOutput` of the batch from the outputs of all ranks."""
    offsets = response_offsets(sequences)
    coefficient = _tokens(outputs, "coefficient", int(offsets[-1]))
    log_w = np.full(len(sequences), np.nan)
    for output in outputs:
        log_w[output.sequence] = output.log_w
    _check_complete(log_w, "log W of sequence")
    return StepOutput(
        scored=merge_scores(outputs, sequences),
        log_w=log_w,
        coefficient=np.array([coefficient[a:b].mean() for a, b in itertools.pairwise(offsets)]),
        loss=sum(output.loss for output in outputs),
        grad_norm=outputs[0].grad_norm,
        learning_rate=outputs[0].learning_rate,
        time_s={name: max(output.time_s[name] for output in outputs) for name in outputs[0].time_s},
    )


def _tokens(outputs: Sequence[RankOutput], field: str, num: int) -> Doubles:
    whole = np.full(num, np.nan)
    for output in outputs:
        whole[output.token] = getattr(output, field)
    _check_complete(whole, f"{field} of response token")
    return whole


def _experts(outputs: Sequence[RankOutput], sequences: Sequence[TrainSequence]) -> list[Experts | None]:
    rows = [row for output in outputs for row in output.routing]
    if not rows:
        return [None] * len(sequences)
    offsets = input_offsets(sequences)
    num_layers = 1 + max(int(row.layers.max()) for row in rows)
    whole = np.full((int(offsets[-1]), num_layers, rows[0].experts.shape[-1]), -1, np.int16)
    for row in rows:
        whole[row.number[:, None], row.layers[None, :]] = row.experts
    _check_complete(np.where((whole < 0).any((1, 2)), np.nan, 0.0), "experts of input")
    return [whole[a:b] for a, b in itertools.pairwise(offsets)]


def _check_complete(values: Doubles, what: str) -> None:
    missing = np.flatnonzero(np.isnan(values))
    if len(missing):
        raise RunError(
            f"{what} {missing[0]}: came from no rank ({len(missing)} of {len(values)} are missing); "
            "the outputs of all ranks must be merged, and of one batch"
        )
