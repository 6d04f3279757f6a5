"""Which experts a rank's routers choose: recorded as they choose, or replayed from given choices.

Each router of the model is listened to through the RouterReplay interface of Megatron-Core, by an instance of ours that
needs no global action to be flipped: `Routing.begin` says what the next forward pass of a model chunk does, and every
router call that was not announced is a recomputation in the backward pass, which repeats the choices of its forward.

Gate weights are always those of the current logits at the choices in force, so gradients reach the router as usual.

Shape key:  t rows of this rank (its tokens in packed order), l its layers with a router, L all of them, K experts per
            token, E experts.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay
from torch import Tensor

from megatron_vespo.config import LayoutConfig
from megatron_vespo.trainer.hf_config import ModelShape
from megatron_vespo.trainer.packing import Index, input_offsets
from megatron_vespo.types import Experts, Mask, RunError, TrainSequence

logger = logging.getLogger(__name__)


class _Listener(RouterReplay):
    """One router's record and replay; Megatron calls `get_replay_topk` once for every pass through the layer."""

    def __init__(self) -> None:
        # Not upstream's: that appends every instance to a list of the process, which outlives the model.
        self.own: Tensor | None = None
        """[t, K] what the router's logits chose in the last announced pass, or would have chosen."""
        self.margin: Tensor | None = None
        """[t] float16, score of the last expert chosen by the logits minus that of the next one."""
        self._announced = self._records = self._measures = self._recomputed = False
        self._target: Tensor | None = None
        self._forwards: deque[Tensor] = deque()

    def begin(self, target: Tensor | None, *, records: bool, measures: bool, recomputed: bool) -> None:
        """The next call is a forward pass; it uses `target` [t, K] int64, or what the logits choose."""
        self._announced, self._target = True, target
        self._records, self._measures, self._recomputed = records, measures, recomputed

    def clear(self) -> None:
        """Forget what was recorded, and forwards that were never recomputed because the pass failed."""
        self._forwards.clear()
        self.own = self.margin = self._target = None
        self._announced = False

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores and experts in force, [t, K] each."""
        assert default_compute_topk is not None

        def choose(scores: Tensor) -> tuple[Tensor, Tensor]:
            return default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)

        if not self._announced:  # recomputation, in the order of this chunk's forwards in every schedule
            return _at(scores, self._forwards.popleft())
        self._announced = False
        values, chosen = choose(scores) if self._target is None else _at(scores, self._target)
        if self._recomputed:
            self._forwards.append(chosen)
        if self._records:
            self.own = chosen if self._target is None else choose(scores.detach())[1]
        if self._measures:
            self.margin = _margin(scores.detach(), topk)
        return values, chosen


def _at(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if len(target) != len(scores):
        raise RunError(
            f"expert choices to replay = {len(target)} rows: this layer routes {len(scores)}; the packing plan and the "
            "replayed choices disagree, which is a defect of the trainer"
        )
    return scores.gather(1, target), target


def _margin(scores: Tensor, topk: int) -> Tensor:
    """[t] float16; infinite where all experts are used.  Of groups of experts `model.py` knows nothing."""
    if topk == scores.shape[1]:
        return torch.full_like(scores[:, 0], torch.inf, dtype=torch.float16)
    best = scores.topk(topk + 1, dim=1).values
    return (best[:, -2] - best[:, -1]).half()


class Routing:
    """Record and replay over all model chunks of one rank."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        layers: Sequence[Sequence[int]],
        shape: ModelShape,
        *,
        recompute: bool,
    ) -> None:
        """Attach to the routers.

        Args:
            layers: the global layers of each chunk.
            recompute: whether the backward pass goes through the routers once more.
        """
        self._listeners: list[list[_Listener]] = []
        self._layers = [np.array(chunk_layers, np.int32) for chunk_layers in layers]
        self._shape, self._recompute = shape, recompute
        for chunk in chunks:
            routers: list[Any] = [module for module in chunk.modules() if isinstance(module, TopKRouter)]
            for router in routers:
                assert router.router_replay is not None, (
                    "megatron's router was built without its replay interface"
                )
                router.router_replay = _Listener()
            self._listeners.append([router.router_replay for router in routers])
        RouterReplay.clear_global_router_replay_instances()

    def layers(self, chunk: int) -> np.ndarray:
        """[l] global layers with a router in a chunk."""
        return self._layers[chunk]

    def begin(
        self, chunk: int, replayed_tlK: Tensor | None, *, records: bool, measures: bool, train: bool
    ) -> None:
        """Announce the next forward pass of a chunk.

        Args:
            replayed_tlK: choices to use, int64 on the routers' device; None: the routers choose.
            records: whether `own_choices` will be asked for.
            measures: whether `margins` will be asked for.
            train: whether a backward pass follows.
        """
        for i, listener in enumerate(self._listeners[chunk]):
            target = None if replayed_tlK is None else replayed_tlK[:, i]
            listener.begin(target, records=records, measures=measures, recomputed=train and self._recompute)

    def own_choices(self, chunk: int) -> Tensor:
        """[t, l, K] what the chunk's routers chose in the pass announced last, or would have without replay; uint8, or
        int16 where there are more experts than it counts."""
        own = [listener.own for listener in self._listeners[chunk]]
        narrow = (
            torch.uint8 if self._shape.num_experts <= 256 else torch.int16
        )  # of uint16 torch knows little
        return torch.stack([_recorded(x) for x in own], 1).to(narrow)

    def margins(self, chunk: int) -> Tensor:
        """[t, l] float16: by how much each router's last choice beat the next expert, in the scores that select."""
        return torch.stack([_recorded(listener.margin) for listener in self._listeners[chunk]], 1)

    def clear(self) -> None:
        """At the end of a pass over all microbatches."""
        for listeners in self._listeners:
            for listener in listeners:
                listener.clear()

    def rows(
        self, sequences: Sequence[TrainSequence], chosen: Sequence[int], number: Index, chunk: int
    ) -> tuple[Experts, int | None]:
        """[t, l, K] of the given choices for this rank's rows of one microbatch, and a sequence whose rows are unusable.

        Padding gets K distinct experts in turn, so that it neither overloads one nor loses gate weight.

        Args:
            chosen: the microbatch's sequences.
            number: [t] which input of the batch each row is, -1 for padding (`packing.input_numbers`).
        """
        layers, offsets = self._layers[chunk], input_offsets(sequences)
        topk = self._shape.experts_per_token
        spread = np.arange(len(number) * topk).reshape(-1, 1, topk) % self._shape.num_experts
        rows = np.broadcast_to(spread, (len(number), len(layers), topk)).astype(np.uint16)
        for i in chosen:
            experts = sequences[i].experts
            assert experts is not None, "check_experts comes first"
            mine = np.flatnonzero((number >= offsets[i]) & (number < offsets[i + 1]))
            rows[mine] = experts[number[mine] - offsets[i]][:, layers]
        bad = np.flatnonzero(_repeating(rows).any(-1))  # e.g. rows of zeros: never written by the engine
        if not len(bad):
            return rows, None
        rows[bad] = spread[bad]
        return rows, int(np.searchsorted(offsets, number[bad[0]], side="right")) - 1


def _repeating(rows: Experts) -> Mask:
    """[t, l] whether a row names one expert twice: by pairs, since sorting takes several times as long."""
    place_Ktl = np.ascontiguousarray(np.moveaxis(rows, -1, 0))
    twice_tl = np.zeros(rows.shape[:-1], np.bool_)
    for a, b in itertools.combinations(place_Ktl, 2):
        twice_tl |= a == b
    return twice_tl


def ranks_left_out_of_aux_loss(layout: LayoutConfig) -> int:
    """By what Megatron's load-balancing loss is too small under calculate_per_token_loss.

    It is multiplied by the tokens that one rank routes, 1 / (tensor * context) of a microbatch; newer versions (0.19)
    make up for it, 0.16 does not.
    """
    source = inspect.getsource(TopKRouter.attach_and_log_load_balancing_loss)
    return 1 if "tp_cp_group.size()" in source else layout.tensor * layout.context


def check_experts(sequences: Sequence[TrainSequence], shape: ModelShape) -> None:
    """Refuse choices that cannot be replayed.

    Raises:
        RunError: choices are missing, have another shape, or name experts that do not exist (a sentinel, say).
    """
    for s in sequences:
        if s.experts is None:
            raise RunError(
                f"sequence {s.uid}: has no expert choices, but trainer.router_replay = 'engine' replays them; start the engine "
                "with rollout.record_experts = true, or set trainer.router_replay = 'off'"
            )
        wanted = (len(s.token_ids) - 1, shape.num_layers, shape.experts_per_token)
        if s.experts.shape != wanted:
            raise RunError(
                f"sequence {s.uid}: expert choices have shape {list(s.experts.shape)}, expected {list(wanted)} (inputs, layers, "
                "experts per token); the engine lost rows or serves another model: do not train on it"
            )
        if s.experts.size and not (s.experts.min() >= 0 and s.experts.max() < shape.num_experts):
            raise RunError(
                f"sequence {s.uid}: expert choices lie in {s.experts.min()} .. {s.experts.max()}, expected 0 .. "
                f"{shape.num_experts - 1}; a sentinel marks rows that the engine did not record: do not train on it"
            )


def replayable(sequences: Sequence[TrainSequence], shape: ModelShape) -> list[int]:
    """Places of the sequences whose choices a pass can repeat; what is wrong with the others' goes to the log."""
    places = list[int]()
    for place, s in enumerate(sequences):
        if s.experts is None:
            continue
        try:
            check_experts([s], shape)
        except RunError as err:
            logger.warning("not replayed: %s", err)
            continue
        if _repeating(s.experts).any():
            logger.warning("not replayed: sequence %s: a row of expert choices names one expert twice", s.uid)
            continue
        places.append(place)
    return places


def _recorded(values: Tensor | None) -> Tensor:
    assert values is not None, "the pass was not announced with records=True (or measures=True)"
    return values
