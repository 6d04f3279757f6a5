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
from megatron_vespo.types import (
    Doubles,
    Examined,
    Experts,
    Floats,
    Halves,
    Ints,
    RunError,
    Scored,
    StepOutput,
    TrainSequence,
    Update,
)


@dataclass(frozen=True, kw_only=True)
class RouterRows:
    """Experts chosen in this rank's layers for some of the batch's inputs."""

    number: Index
    """[R] which input of the batch each row is."""
    layers: Ints
    """[l] counted from the model's first layer with a router."""
    experts: Experts
    """[R, l, K]"""
    margin: Halves | None = None
    """[R, l] score of the K-th expert minus that of the next; None where it was not asked for."""


@dataclass(frozen=True, kw_only=True)
class RankOutput:
    """One rank's share of a step or of a scoring pass; arrays are empty where the rank knows nothing.

    Log-probs and what follows from them come from the last pipeline stage's first tensor rank; what was summed over
    ranks already is whole, and the same on all of them.
    """

    token: Index
    """[S] which response token of the batch."""
    logp: Floats
    """[S] nats."""
    entropy: Floats
    """[S] nats."""
    top_k_mass: Floats
    """[S]; empty where it was not asked for."""
    routing: tuple[RouterRows, ...]
    """One for each microbatch and model chunk; empty for dense models, without what was not asked for."""
    log_w: Doubles | None = None
    """[B'] whole-sequence log W of what was trained on (`StepOutput`), whole; None after scoring."""
    coefficient: Doubles | None = None
    """[B'] the same of the coefficient, summed over the trained tokens of each response."""
    updates: tuple[Update, ...] = ()
    """Whole; empty after scoring."""
    time_s: dict[str, float]
    memory_bytes: dict[str, int]
    model_flops: float = 0.0
    """Whole."""
    peak_flops_s: float | None = None
    """Of this rank's device."""


@dataclass(frozen=True, kw_only=True)
class RankExamination:
    """One rank's share of the passes of `TrainerRank.examine`."""

    natural: RankOutput
    repeat: RankOutput
    replayed: RankOutput | None
    """Of the sequences at the places `replayable` alone; None where there are none."""
    replayable: tuple[int, ...]


def merge_scores(outputs: Sequence[RankOutput], sequences: Sequence[TrainSequence]) -> tuple[Scored, ...]:
    """`Scored` of every sequence, in the given order, from the outputs of all ranks.

    Raises:
        RunError: a token or router row came from no rank (a defect of the trainer, never of the data).
    """
    offsets = response_offsets(sequences)
    logp, entropy = (_tokens(outputs, field, int(offsets[-1])) for field in ("logp", "entropy"))
    has_mass = any(len(output.top_k_mass) for output in outputs)
    mass = _tokens(outputs, "top_k_mass", int(offsets[-1])) if has_mass else None
    experts = _experts(outputs, sequences)
    return tuple(
        Scored(
            logp=logp[a:b],
            entropy=entropy[a:b],
            top_k_mass=None if mass is None else mass[a:b],
            experts=experts[i],
        )
        for i, (a, b) in enumerate(itertools.pairwise(offsets))
    )


def merge_examined(
    outputs: Sequence[RankExamination], sequences: Sequence[TrainSequence]
) -> tuple[Examined, ...]:
    """`Examined` of every sequence, in the given order, from the outputs of all ranks.

    Raises:
        RunError: as `merge_scores`.
    """
    natural = [output.natural for output in outputs]
    repeat = merge_scores([output.repeat for output in outputs], sequences)
    places = outputs[0].replayable
    replayed = merge_scores(
        [output.replayed for output in outputs if output.replayed], [sequences[i] for i in places]
    )
    replayed_at = dict(zip(places, replayed, strict=True))
    margins = _margins(natural, sequences)
    return tuple(
        Examined(natural=scored, repeat=repeat[i].logp, replayed=replayed_at.get(i), margin=margins[i])
        for i, scored in enumerate(merge_scores(natural, sequences))
    )


def merge_step(outputs: Sequence[RankOutput], sequences: Sequence[TrainSequence]) -> StepOutput:
    """`StepOutput` of the batch from the outputs of all ranks."""
    whole = outputs[0]
    assert whole.log_w is not None and whole.coefficient is not None, "the output of a scoring pass"
    return StepOutput(
        scored=merge_scores(outputs, sequences),
        log_w=whole.log_w,
        coefficient=whole.coefficient
        / np.array([s.num_trained_tokens for s in sequences[: len(whole.coefficient)]]),
        updates=whole.updates,
        time_s={name: max(output.time_s[name] for output in outputs) for name in whole.time_s},
        memory_bytes={
            name: max(output.memory_bytes[name] for output in outputs) for name in whole.memory_bytes
        },
        model_flops=whole.model_flops,
        num_ranks=len(outputs),
        peak_flops_s=whole.peak_flops_s,
    )


def _tokens(outputs: Sequence[RankOutput], field: str, num: int) -> Floats:
    whole = np.full(num, np.nan, np.float32)
    for output in outputs:
        whole[output.token] = getattr(output, field)
    _check_complete(whole, f"{field} of response token")
    return whole


def _experts(outputs: Sequence[RankOutput], sequences: Sequence[TrainSequence]) -> list[Experts | None]:
    rows = [row for output in outputs for row in output.routing]
    if not rows:
        return [None] * len(sequences)
    offsets = input_offsets(sequences)
    whole = np.zeros((int(offsets[-1]), _num_layers(rows), rows[0].experts.shape[-1]), rows[0].experts.dtype)
    missing = np.full(whole.shape[:2], np.float32(np.nan))
    for row in rows:
        place = row.number[:, None], row.layers[None, :]
        whole[place], missing[place] = row.experts, 0
    found: list[Experts | None] = []
    for a, b in itertools.pairwise(offsets):
        if np.isnan(missing[a:b]).all():  # not asked for
            found.append(None)
            continue
        _check_complete(missing[a:b].sum(1), "experts of a sequence's input")
        found.append(whole[a:b])
    return found


def _margins(outputs: Sequence[RankOutput], sequences: Sequence[TrainSequence]) -> list[Floats | None]:
    rows = [row for output in outputs for row in output.routing]
    if not rows:
        return [None] * len(sequences)
    offsets = input_offsets(sequences)
    whole = np.full((int(offsets[-1]), _num_layers(rows)), np.nan, np.float32)
    for row in rows:
        assert row.margin is not None, "the output of a pass that did not measure them"
        whole[row.number[:, None], row.layers[None, :]] = row.margin
    _check_complete(whole.sum(1), "margins of input")
    return [whole[a:b] for a, b in itertools.pairwise(offsets)]


def _num_layers(rows: Sequence[RouterRows]) -> int:
    return 1 + max(int(row.layers.max()) for row in rows)


def _check_complete(values: Floats, what: str) -> None:
    missing = np.flatnonzero(np.isnan(values))
    if len(missing):
        raise RunError(
            f"{what} {missing[0]}: came from no rank ({len(missing)} of {len(values)} are missing); "
            "the outputs of all ranks must be merged, and of one batch"
        )
