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
from collections.abc import Iterator
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


def layers_of_chunk(layout: LayoutConfig, shape: ModelShape, stage: int, chunk: int = 0) -> range:
    """Global indices of the decoder layers in one model chunk of a pipeline stage (chunk 0 is all of it without
    interleaving).  Chunks are dealt out over the stages in turn: chunk c of stage p is number c * pipeline + p."""
    sizes = _stage_sizes(layout, shape.num_layers)
    each = [size // layout.virtual_pipeline for size in sizes]
    first = chunk * sum(each) + sum(each[:stage])
    return range(first, first + each[stage])


def layers_of_stage(layout: LayoutConfig, shape: ModelShape, stage: int) -> list[int]:
    """Global indices of all decoder layers that a pipeline stage holds."""
    return [
        i for chunk in range(layout.virtual_pipeline) for i in layers_of_chunk(layout, shape, stage, chunk)
    ]


def _stage_sizes(layout: LayoutConfig, num_layers: int) -> list[int]:
    """Layers of each pipeline stage; the ends have their own numbers where they are set."""
    ends = {0: layout.first_stage_layers, layout.pipeline - 1: layout.last_stage_layers}
    given = {stage: size for stage, size in ends.items() if size is not None}
    inner = layout.pipeline - len(given)
    each = (num_layers - sum(given.values())) // inner if inner else 0
    return [given.get(stage, each) for stage in range(layout.pipeline)]


def grid(layout: LayoutConfig, shape: ModelShape) -> str:
    """The rank grid as a table, for people."""
    interleaved = f" (interleaved, {layout.virtual_pipeline} chunks)" if layout.virtual_pipeline > 1 else ""
    head = (
        f"{layout.world_size} rank(s) = tensor {layout.tensor} x context {layout.context} x data {layout.data} "
        f"x pipeline {layout.pipeline}{interleaved}; experts over {layout.expert} x {layout.resolved_expert_tensor} of them"
    )
    rows = [head, "rank  tp  cp  dp  pp  ep etp  layers       experts"]
    for rank in range(layout.world_size):
        at = coordinates(layout, rank)
        layers = _runs(layers_of_stage(layout, shape, at.pipeline))
        each = shape.num_experts // layout.expert
        experts = f"{at.expert * each}-{(at.expert + 1) * each - 1}" if shape.num_experts else "-"
        rows.append(
            f"{rank:4d}{at.tensor:4d}{at.context:4d}{at.data:4d}{at.pipeline:4d}{at.expert:4d}"
            f"{at.expert_tensor:4d}  {layers:<12} {experts}"
        )
    return "\n".join(rows)


def _runs(numbers: list[int]) -> str:
    """Ascending numbers as runs: `0-1,4-5`."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def check_layout(layout: LayoutConfig, shape: ModelShape) -> None:
    """Refuse a grid over which this model cannot be divided.

    Raises:
        ConfigError: naming the field, what it must divide, and the nearest valid grids of as many ranks.
    """
    if problem := _problem(layout, shape):
        near = nearest_valid(layout, shape)
        advice = (
            " or ".join(map(_axes, near)) if near else "another number of ranks: none of this many is valid"
        )
        raise ConfigError(f"{problem}; nearest valid: {advice}")


def nearest_valid(layout: LayoutConfig, shape: ModelShape, num: int = 3) -> list[LayoutConfig]:
    """The valid grids of as many ranks that change the fewest axes, and those the least."""
    keys = ("tensor", "context", "pipeline", "data", "expert", "virtual_pipeline")
    wanted = {key: getattr(layout, key) for key in keys}
    found = []
    for grid_axes in _grids(layout.world_size):
        for expert in _divisors(max(shape.num_experts, 1)):
            for chunks in _divisors(shape.num_layers) if layout.virtual_pipeline > 1 else [1]:
                axes = dict(zip(keys, (*grid_axes, expert, chunks), strict=True))
                other = LayoutConfig(**axes)
                if _problem(other, shape) is None:
                    ratios = [abs(math.log2(axes[key] / wanted[key])) for key in keys]
                    found.append((sum(r > 0 for r in ratios) + sum(ratios), tuple(axes.values()), other))
    return [other for _, _, other in sorted(found, key=lambda item: item[:2])[:num]]


def _problem(layout: LayoutConfig, shape: ModelShape) -> str | None:
    """What makes the grid invalid for the model; None where it is valid."""
    divided = {
        "attention heads": shape.num_heads,
        "key/value heads": shape.num_groups,
        "tokens of the vocabulary": shape.vocab_size,
    }
    if not shape.num_experts:
        divided["feed-forward channels"] = shape.ffn_size
    return (
        _undivided("tensor", layout.tensor, divided)
        or _bad_stages(layout, shape.num_layers)
        or _bad_experts(layout, shape)
    )


def _bad_stages(layout: LayoutConfig, num_layers: int) -> str | None:
    chunks = layout.virtual_pipeline
    if chunks > 1 and layout.pipeline == 1:
        return f"trainer.layout.virtual_pipeline = {chunks}: interleaves pipeline stages, and pipeline = 1"
    ends = layout.first_stage_layers or layout.last_stage_layers
    if not ends:
        return _undivided("pipeline * virtual_pipeline", layout.pipeline * chunks, {"layers": num_layers})
    if layout.pipeline == 1:
        return "trainer.layout.first_stage_layers, last_stage_layers: need several stages, and pipeline = 1"
    sizes = _stage_sizes(layout, num_layers)
    if sum(sizes) != num_layers or min(sizes) < 1 or any(size % chunks for size in sizes):
        return (
            f"trainer.layout.pipeline = {layout.pipeline} with first_stage_layers = {layout.first_stage_layers}, "
            f"last_stage_layers = {layout.last_stage_layers}: the stages must hold {num_layers} layers together, the inner "
            f"ones equally many, in virtual_pipeline = {chunks} equal chunks, and would hold {sizes}"
        )
    return None


def _bad_experts(layout: LayoutConfig, shape: ModelShape) -> str | None:
    if not shape.num_experts:
        return f"trainer.layout.expert = {layout.expert}: the model is dense" if layout.expert > 1 else None
    ranks, shard = layout.tensor * layout.context * layout.data, layout.resolved_expert_tensor
    if ranks % (layout.expert * shard):
        return (
            f"trainer.layout.expert = {layout.expert}, expert_tensor = {shard}: their product must divide tensor * context "
            f"* data = {ranks}, the ranks of a pipeline stage"
        )
    return _undivided("expert_tensor", shard, {"channels of an expert": shape.expert_ffn_size}) or _undivided(
        "expert", layout.expert, {"experts": shape.num_experts}
    )


def _undivided(name: str, value: int, totals: dict[str, int]) -> str | None:
    for what, total in totals.items():
        if total % value:
            return f"trainer.layout.{name} = {value}: must divide the {total} {what}"
    return None


def _grids(ranks: int) -> Iterator[tuple[int, int, int, int]]:
    """Every (tensor, context, pipeline, data) whose product is `ranks`."""
    for tensor in _divisors(ranks):
        for context in _divisors(ranks // tensor):
            for pipeline in _divisors(ranks // tensor // context):
                yield tensor, context, pipeline, ranks // tensor // context // pipeline


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _axes(layout: LayoutConfig) -> str:
    """A grid in words, without its axes of one rank."""
    fields = layout.model_dump(exclude_none=True)
    return ", ".join(f"{name} = {size}" for name, size in fields.items() if size > 1) or "one rank"


@dataclass(frozen=True)
class Groups:
    """This rank's process groups, each together with its own position in it."""

    layout: LayoutConfig
    rank: int
    device: Any
    """torch.device that collectives of this rank use."""
    tensor: ProcessGroup
    context: ProcessGroup

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
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
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
