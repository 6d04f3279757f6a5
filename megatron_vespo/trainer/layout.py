"""The rank grid: who holds which part of the model, as arithmetic; and the process groups made from it.

Everything but `init_process_groups` is pure and needs neither megatron nor torch's distributed runtime, so
that a driver can check and print a layout before any process starts.

Ranks are numbered as Megatron-Core numbers them ("tp-cp-ep-dp-pp"): within a pipeline stage tensor is fastest,
then context, then data; for the experts of the same ranks expert_tensor is fastest, then expert, then expert_data.
"""

from __future__ import annotations

import ipaddress
import math
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from megatron_vespo.config import ConfigError, LayoutConfig
from megatron_vespo.trainer.hf_config import ModelShape

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one rank meets the others."""

    rank: int
    world_size: int
    master_addr: str
    master_port: int


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """One rank's position on every axis of the grid."""

    tensor: int
    context: int
    data: int
    pipeline: int
    expert: int
    expert_tensor: int
    expert_data: int


def coordinates(layout: LayoutConfig, rank: int) -> Coordinates:
    """Position of a rank; the inverse of Megatron-Core's "tp-cp-ep-dp-pp" numbering."""
    stage, inner = divmod(rank, layout.world_size // layout.pipeline)
    rest, tensor = divmod(inner, layout.tensor)
    data, context = divmod(rest, layout.context)
    rest, expert_tensor = divmod(inner, layout.resolved_expert_tensor)
    expert_data, expert = divmod(rest, layout.expert)
    return Coordinates(
        tensor=tensor, context=context, data=data, pipeline=stage,
        expert=expert, expert_tensor=expert_tensor, expert_data=expert_data,
    )  # fmt: skip


def rank_name(layout: LayoutConfig, rank: int) -> str:
    """For messages: `rank 3 (tp 1, pp 1, ep 1)`; axes of one rank are left out."""
    at = coordinates(layout, rank)
    axes = (
        ("tp", layout.tensor, at.tensor), ("cp", layout.context, at.context), ("dp", layout.data, at.data),
        ("pp", layout.pipeline, at.pipeline), ("ep", layout.expert, at.expert),
        ("etp", layout.resolved_expert_tensor, at.expert_tensor),
    )  # fmt: skip
    where = ", ".join(f"{name} {index}" for name, size, index in axes if size > 1)
    return f"rank {rank} ({where})" if where else f"rank {rank}"


def layers_of_stage(layout: LayoutConfig, shape: ModelShape, stage: int) -> range:
    """Global indices of the decoder layers that a pipeline stage holds."""
    each = shape.num_layers // layout.pipeline
    return range(stage * each, (stage + 1) * each)


def grid(layout: LayoutConfig, shape: ModelShape) -> str:
    """The rank grid as a table, for people."""
    head = (
        f"{layout.world_size} rank(s) = tensor {layout.tensor} x context {layout.context} x data {layout.data} "
        f"x pipeline {layout.pipeline}; experts over {layout.expert} x {layout.resolved_expert_tensor} of them"
    )
    rows = [head, "rank  tp  cp  dp  pp  ep etp  layers   experts"]
    for rank in range(layout.world_size):
        at = coordinates(layout, rank)
        layers = layers_of_stage(layout, shape, at.pipeline)
        each = shape.num_experts // layout.expert
        experts = f"{at.expert * each}-{(at.expert + 1) * each - 1}" if shape.num_experts else "-"
        rows.append(
            f"{rank:4d}{at.tensor:4d}{at.context:4d}{at.data:4d}{at.pipeline:4d}{at.expert:4d}"
            f"{at.expert_tensor:4d}  {f'{layers[0]}-{layers[-1]}':<8} {experts}"
        )
    return "\n".join(rows)


def check_layout(layout: LayoutConfig, shape: ModelShape) -> None:
    """Refuse a grid over which this model cannot be divided evenly.

    Raises:
        ConfigError: naming the field, the number it must divide and the nearest values that do.
    """
    divided = {
        "attention heads": shape.num_heads,
        "key/value heads": shape.num_groups,
        "tokens of the vocabulary": shape.vocab_size,
    }
    if not shape.num_experts:
        divided["feed-forward channels"] = shape.ffn_size
    _must_divide("tensor", layout.tensor, divided)
    _must_divide("pipeline", layout.pipeline, {"layers": shape.num_layers})
    if not shape.num_experts:
        if layout.expert > 1:
            raise ConfigError(
                f"trainer.layout.expert = {layout.expert}: the model is dense; leave it out, or set it to 1"
            )
        return
    ranks = layout.tensor * layout.context * layout.data
    shard = layout.resolved_expert_tensor
    _must_divide("expert_tensor", shard, {"channels of an expert": shape.expert_ffn_size})
    _must_divide("expert", layout.expert, {"experts": shape.num_experts, "ranks of a pipeline stage": ranks})
    if ranks % (layout.expert * shard):
        raise ConfigError(
            f"trainer.layout.expert_tensor = {shard}: expert * expert_tensor = {layout.expert} * {shard} must divide "
            f"tensor * context * data = {ranks}, the ranks of a pipeline stage; "
            f"{_nearest('expert_tensor', shard, ranks // layout.expert)}"
        )


def _must_divide(name: str, value: int, totals: dict[str, int]) -> None:
    for what, total in totals.items():
        if total % value:
            raise ConfigError(
                f"trainer.layout.{name} = {value}: must divide the {total} {what}; "
                f"{_nearest(name, value, math.gcd(*totals.values()))}"
            )


def _nearest(name: str, value: int, total: int) -> str:
    """The valid values just below and above `value`: those that divide `total`."""
    valid = [n for n in range(1, total + 1) if total % n == 0]
    below, above = [n for n in valid if n < value][-1:], [n for n in valid if n > value][:1]
    return f"set {name} to {' or '.join(map(str, below + above))}"


@dataclass(frozen=True)
class Groups:
    """This rank's process groups, each together with its own position in it."""

    layout: LayoutConfig
    rank: int
    device: Any
    """torch.device that collectives of this rank use."""
    tensor: ProcessGroup
    context: ProcessGroup
    pipeline: ProcessGroup

    @property
    def at(self) -> Coordinates:
        return coordinates(self.layout, self.rank)

    @property
    def name(self) -> str:
        return rank_name(self.layout, self.rank)

    @property
    def is_last_stage(self) -> bool:
        return self.at.pipeline == self.layout.pipeline - 1


def init_process_groups(layout: LayoutConfig, place: Place, *, device: str, timeout_s: float) -> Groups:
    """Join the other ranks: torch.distributed and Megatron's globals, touched nowhere else.

    Every later collective fails after `timeout_s` instead of waiting for ever.

    Raises:
        ConfigError: the number of ranks is not that of the layout.
    """
    if place.world_size != layout.world_size:
        raise ConfigError(
            f"world size = {place.world_size}: the layout is a grid of {layout.world_size} ranks (tensor * context * "
            "data * pipeline); start that many, or change trainer.layout"
        )
    import torch
    from megatron.core import parallel_state

    groups: Any = parallel_state  # its getters are annotated with what they were before initialization
    if device == "cuda":
        torch.cuda.set_device(place.rank % torch.cuda.device_count())
    elif _is_loopback(place.master_addr):
        # gloo otherwise takes the interface that the host name resolves to, which may be down on a laptop.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"tcp://{place.master_addr}:{place.master_port}",
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.resolved_expert_tensor,
        distributed_timeout_minutes=timeout_s / 60,  # type: ignore[arg-type]  # only ever given to timedelta
        create_gloo_process_groups=False,
    )
    return Groups(
        layout,
        place.rank,
        torch.device("cpu") if device == "cpu" else torch.device("cuda", torch.cuda.current_device()),
        groups.get_tensor_model_parallel_group(),
        groups.get_context_parallel_group(),
        groups.get_pipeline_model_parallel_group(),
    )


def destroy_process_groups() -> None:
    """Leave the other ranks; the process may end, or join a new grid."""
    import torch
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except OSError:
        return False
