"""How long one step of the trainer takes, from operations, bytes and stated assumptions; and on which GPUs.

An estimate of this kind tells which of two layouts is faster and what bounds it, not the seconds to 10 %.

Names: as in estimate.py.  Every duration is that of the busiest rank, seconds per batch (all its updates).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vespo.config import TrainerConfig
from megatron_vespo.trainer.estimate import (
    GIB,
    Parameters,
    Workload,
    dispatched_tokens,
    itemsize,
    num_microbatches,
    optimizer_bytes,
    trained_parameters,
    uses_transformer_engine,
)
from megatron_vespo.trainer.hf_config import ModelShape
from megatron_vespo.trainer.layout import layers_of_stage


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU in its usual 8-GPU server."""

    name: str
    memory_bytes: float
    """What torch.cuda reports as total, a little below the data sheet's."""
    flops_s: float
    """bfloat16 matrix operations per second, dense (data sheets often give twice that, with sparsity)."""
    memory_bytes_s: float
    link_bytes_s: float
    """NVLink, one direction (data sheets give both together)."""
    network_bytes_s: float
    """Of this GPU's own adapter, one direction."""


# Sources: NVIDIA's data sheets of A100 80GB SXM, H100 SXM5, H200 SXM and HGX B200; adapters of DGX A100 (ConnectX-6,
# 200 Gb/s a GPU) and of DGX H100, H200 and B200 (ConnectX-7, 400 Gb/s a GPU).
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="a100-80gb", memory_bytes=79.1 * GIB, flops_s=312e12, memory_bytes_s=2.04e12,
            link_bytes_s=300e9, network_bytes_s=25e9,
        ),
        Gpu(
            name="h100-80gb", memory_bytes=79.1 * GIB, flops_s=989e12, memory_bytes_s=3.35e12,
            link_bytes_s=450e9, network_bytes_s=50e9,
        ),
        Gpu(
            name="h200-141gb", memory_bytes=139.7 * GIB, flops_s=989e12, memory_bytes_s=4.8e12,
            link_bytes_s=450e9, network_bytes_s=50e9,
        ),
        Gpu(
            name="b200-192gb", memory_bytes=178.3 * GIB, flops_s=2250e12, memory_bytes_s=7.7e12,
            link_bytes_s=900e9, network_bytes_s=50e9,
        ),
    )
}  # fmt: skip

PEAK_SHARE = {  # (Transformer Engine, experts): share of flops_s that the passes reach while they compute
    (True, True): 0.35,  # grouped products
    (True, False): 0.50,
    (False, True): 0.12,  # one small product after the other, expert by expert
    (False, False): 0.40,
}
"""Assumed; --peak-share replaces it."""
FLOAT32_RATE = 1 / 15
"""Of float32 products, which torch makes without TF32, to bfloat16 ones: 67 to 989 TFLOP/s on an H100."""
LINK_SHARE = 0.7
"""Assumed: share of link and network bandwidth that collectives reach."""
EXPERT_IMBALANCE = 1.25
"""Assumed: tokens of the fullest expert rank / their mean, without a load-balancing loss."""
HOST_BYTES_S = 20e9
"""Assumed: rate at which a rank's share of the host updates offloaded optimizer state."""
OFFLOADED_BYTES = 4 * 3 * 2 + 4 + 2
"""Per offloaded parameter: three float32 tensors read and written, a gradient read, a weight written."""


@dataclass(frozen=True, kw_only=True)
class Machines:
    """What the ranks run on, and what is assumed of it."""

    gpu: Gpu
    gpus_per_node: int = 8
    peak_share: float | None = None
    """Default: PEAK_SHARE."""
    expert_imbalance: float = EXPERT_IMBALANCE

    def share(self, shape: ModelShape, cfg: TrainerConfig) -> float:
        return self.peak_share or PEAK_SHARE[uses_transformer_engine(cfg), shape.num_experts > 0]


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one batch, by what they are spent on, and the operations behind them."""

    parts: dict[str, float]
    model_flops: float
    """Of the updates alone, without recomputation or scoring, over all ranks."""
    num_microbatches: int
    mfu: float
    """model_flops / (all ranks' peak * total time)."""

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def dominant(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name])


def estimate_time(shape: ModelShape, cfg: TrainerConfig, work: Workload, machines: Machines) -> StepTime:
    """One batch: scoring passes, updates, and the way of the new weights to the engine.

    Bubble: compute * (pipeline - 1) / (microbatches * chunks).  The sampling of responses is not part of it.
    """
    flops = stage_flops(shape, cfg, work)
    if cfg.layout.expert > 1:
        flops["experts"] *= machines.expert_imbalance  # all wait for the fullest
    rate = machines.gpu.flops_s * machines.share(shape, cfg) * (FLOAT32_RATE if cfg.dtype == "float32" else 1)
    parts = {f"compute: {name}": value / rate for name, value in flops.items() if value}
    layout, num = cfg.layout, num_microbatches(cfg, work)
    compute = sum(parts.values())
    parts["pipeline bubble"] = compute * (layout.pipeline - 1) / (num * layout.virtual_pipeline)
    parts |= _communication(shape, cfg, work, machines, compute)
    parts["optimizer"] = _optimizer_seconds(shape, cfg, work, machines)
    if work.sync_bucket_bytes:  # gathered by rank 0, then sent on, through its adapter
        whole = itemsize(cfg) * shape.num_parameters
        parts["weight transfer"] = 2 * whole / (machines.gpu.network_bytes_s * LINK_SHARE)
    parts = {name: seconds for name, seconds in parts.items() if seconds > 0}
    useful = model_flops(shape, work)
    peak = layout.world_size * machines.gpu.flops_s * sum(parts.values())
    return StepTime(parts=parts, model_flops=useful, num_microbatches=num, mfu=useful / peak)


# ----------------------------------------------------------------------------------------------- operations


@dataclass(frozen=True, kw_only=True)
class _Flops:
    """Forward operations of one layer, or of the head, on a batch, over all ranks that share it."""

    projections: float
    attention: float
    feed_forward: float


def _layer_flops(shape: ModelShape, num_tokens: float, squares: float) -> _Flops:
    """2 per weight and token; causal attention over L tokens: 2 L q per token (half of 4 L q)."""
    h, q = shape.hidden_size, shape.num_heads * shape.head_dim
    width = shape.ffn_size
    if shape.num_experts:
        width = shape.experts_per_token * shape.expert_ffn_size
    return _Flops(
        projections=2 * num_tokens * (h * (q + 2 * shape.num_groups * shape.head_dim) + q * h),
        attention=2 * squares * q,
        feed_forward=2 * num_tokens * (3 * h * width + h * shape.num_experts),
    )


def _work_flops(shape: ModelShape, work: Workload) -> _Flops:
    num_tokens = work.num_sequences * work.mean_tokens
    return _layer_flops(shape, num_tokens, num_tokens * work.mean_tokens)


def _head_flops(shape: ModelShape, num_responses: float) -> float:
    """Only response tokens are scored."""
    return 2 * num_responses * shape.hidden_size * shape.vocab_size


def training_flops(shape: ModelShape, num_tokens: float, squares: float, num_responses: float) -> float:
    """Useful operations of the updates on a batch: forward and backward (twice the forward), over all ranks.

    Neither recomputation nor scoring passes count; this is the numerator of MFU.

    Args:
        num_tokens: processed tokens of all sequences together, without padding.
        squares: sum over the sequences of the square of their tokens.
        num_responses: response tokens that carry loss.
    """
    layer = _layer_flops(shape, num_tokens, squares)
    once = shape.num_layers * (layer.projections + layer.attention + layer.feed_forward)
    return 3 * (once + _head_flops(shape, num_responses))


def model_flops(shape: ModelShape, work: Workload) -> float:
    """`training_flops` of a workload whose sequences all have its mean lengths."""
    num_tokens = work.num_sequences * work.mean_tokens
    num_responses = work.num_sequences * work.mean_response_tokens
    return training_flops(shape, num_tokens, num_tokens * work.mean_tokens, num_responses)


def known_peak_flops(device_name: str) -> float | None:
    """bfloat16 operations per second of the GPU that calls itself so; None where it is not in GPUS, PCIe and NVL too."""
    for gpu in GPUS.values() if not {"PCIE", "NVL"} & set(device_name.upper().split()) else ():
        if gpu.name.partition("-")[0].upper() in device_name.upper():
            return gpu.flops_s
    return None


def stage_flops(shape: ModelShape, cfg: TrainerConfig, work: Workload) -> dict[str, float]:
    """Operations of one rank of the busiest pipeline stage, by kind; scoring passes included.

    Passes over a layer: 1 forward, 2 backward, 1 for what is recomputed, 1 for each scoring pass.  Over the head:
    4, because its logits are made again in the backward pass.
    """
    layer, layout = _work_flops(shape, work), cfg.layout
    ranks = layout.data * layout.context * layout.tensor
    head = _head_flops(shape, work.num_sequences * work.mean_response_tokens) / ranks
    again = {"none": (0, 0, 0), "selective": (0, 1, 1), "full": (1, 1, 1)}[cfg.recompute]

    def of_stage(stage: int) -> dict[str, float]:
        num = len(layers_of_stage(layout, shape, stage)) / ranks
        kinds = (layer.projections, layer.attention, layer.feed_forward)
        recomputed = sum(flops * once for flops, once in zip(kinds, again, strict=True))
        return {
            "attention projections": 3 * num * layer.projections,
            "attention": 3 * num * layer.attention,
            "experts" if shape.num_experts else "feed-forward": 3 * num * layer.feed_forward,
            "recomputation": num * recomputed,
            "LM head": 4 * head if stage == layout.pipeline - 1 else 0.0,
            "scoring": work.num_scoring * (num * sum(kinds) + (head if stage == layout.pipeline - 1 else 0)),
        }

    return max(map(of_stage, range(layout.pipeline)), key=lambda flops: sum(flops.values()))


# -------------------------------------------------------------------------------------------- communication


def _communication(
    shape: ModelShape, cfg: TrainerConfig, work: Workload, machines: Machines, compute: float
) -> dict[str, float]:
    """Seconds of messages that nothing hides; of the gradients', where they overlap, what compute does not cover."""
    layout = cfg.layout
    tokens = work.num_sequences * work.mean_tokens / (layout.data * layout.context)  # of one tensor group
    num_layers = max(len(layers_of_stage(layout, shape, stage)) for stage in range(layout.pipeline))
    forwards = 1 + work.num_scoring + (cfg.recompute == "full")
    volumes = _layer_volumes(shape, cfg, tokens, machines.expert_imbalance, forwards)
    seconds = {
        name: num_layers * volume / bandwidth(machines, stride, size)
        for name, (volume, stride, size) in volumes.items()
        if size > 1
    }
    stage_ranks = layout.tensor * layout.context * layout.data
    if layout.pipeline > 1:
        sent = tokens / layout.tensor * shape.hidden_size * itemsize(cfg) * layout.virtual_pipeline
        hops = (2 + work.num_scoring) * sent
        seconds["pipeline messages"] = hops / bandwidth(machines, stage_ranks, layout.pipeline)
    gradients = _gradient_seconds(shape, cfg, machines) * work.num_updates
    seconds["gradient reduction"] = max(0.0, gradients - compute) if cfg.optimizer.overlap else gradients
    return seconds


def _layer_volumes(
    shape: ModelShape, cfg: TrainerConfig, tokens: float, imbalance: float, forwards: float
) -> dict[str, tuple[float, int, int]]:
    """(bytes that a rank sends for one layer, distance of its partners, their number), by axis.

    Tensor: gather before and scatter after a divided pair of matrices; back the same, and the gathered input again.
    Experts: to them and back, in both directions.  Context: keys and values, and their gradients.
    """
    layout, e, h = cfg.layout, itemsize(cfg), shape.hidden_size
    shard = layout.resolved_expert_tensor
    pairs = 1 if shape.num_experts else 2  # of divided matrices: attention, feed-forward
    own = tokens / layout.tensor
    dispatched = dispatched_tokens(shape, cfg, own, imbalance) if shape.num_experts else 0.0
    keys = 2 * shape.num_groups * shape.head_dim / layout.tensor
    both_ways = 2 * forwards + 2
    return {
        "tensor messages": (pairs * (2 * forwards + 3) * _others(layout.tensor) * tokens * e * h, 1, layout.tensor),
        "context messages": ((forwards + 2) * (layout.context - 1) * tokens * e * keys, layout.tensor, layout.context),
        "expert messages": (
            both_ways * _others(layout.expert) * dispatched / shard * e * h, shard, layout.expert,
        ),
        "expert tensor messages": (both_ways * _others(shard) * dispatched * e * h, 1, shard),
    }  # fmt: skip


def _gradient_seconds(shape: ModelShape, cfg: TrainerConfig, machines: Machines) -> float:
    """Gradients are scattered in float32 and weights gathered (or gradients gathered, where each rank steps alone)."""
    layout = cfg.layout
    held = [trained_parameters(shape, cfg, stage) for stage in range(layout.pipeline)]
    per_parameter = 4 + (itemsize(cfg) if cfg.optimizer.distributed else 4)
    stage_ranks = layout.data * layout.context * layout.tensor
    expert_ranks = layout.expert * layout.resolved_expert_tensor
    axes = (
        (lambda p: p.dense, layout.tensor, layout.data * layout.context),
        (lambda p: p.expert, expert_ranks, stage_ranks // expert_ranks),
    )

    def of_stage(parameters: Parameters) -> float:
        return sum(
            per_parameter * count(parameters) * _others(size) / bandwidth(machines, stride, size)
            for count, stride, size in axes
            if size > 1
        )

    return max(map(of_stage, held))


def bandwidth(machines: Machines, stride: int, size: int) -> float:
    """Bytes per second that one of `size` ranks, `stride` apart, sends in a collective.

    Within a node: the link.  Beyond it every member in a node has its own adapter, and messages between them use the link.
    """
    gpu = machines.gpu
    if stride * size <= machines.gpus_per_node:
        return gpu.link_bytes_s * LINK_SHARE
    together = max(1, min(size, machines.gpus_per_node // stride))
    return min(gpu.link_bytes_s, gpu.network_bytes_s * together) * LINK_SHARE


def _others(size: int) -> float:
    """Share of a collective's bytes that leaves a rank."""
    return (size - 1) / size


def _optimizer_seconds(shape: ModelShape, cfg: TrainerConfig, work: Workload, machines: Machines) -> float:
    """Adam moves every tensor once; offloaded ones at the host's rate."""
    per_parameter = 8 if cfg.dtype == "float32" else 12
    stages = range(cfg.layout.pipeline)
    most = max(optimizer_bytes(trained_parameters(shape, cfg, stage), cfg) for stage in stages)
    updated = most / per_parameter
    offloaded = updated * cfg.optimizer.cpu_offload
    each = (updated - offloaded) * OFFLOADED_BYTES / machines.gpu.memory_bytes_s
    return work.num_updates * (each + offloaded * OFFLOADED_BYTES / HOST_BYTES_S)
