"""What a configuration asks of its GPUs, in words, before anyone books them: memory, time, and whether it fits."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_vespo.config import (
    ConfigError,
    LayoutConfig,
    SftConfig,
    TrainConfig,
    TrainerConfig,
    load_config,
)
from megatron_vespo.trainer.estimate import (
    COMMUNICATOR_BYTES,
    CONTEXT_BYTES,
    FRAGMENTATION,
    GIB,
    RankMemory,
    Workload,
    estimate_memory,
    fuses_activation,
    num_microbatches,
    uses_transformer_engine,
)
from megatron_vespo.trainer.hf_config import ModelShape, read_model_shape
from megatron_vespo.trainer.layout import check_layout
from megatron_vespo.trainer.packing import padded_length
from megatron_vespo.trainer.step_time import GPUS, LINK_SHARE, Machines, StepTime, estimate_time


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """A configuration's trainer on its machines."""

    shape: ModelShape
    cfg: TrainerConfig
    work: Workload
    machines: Machines

    @property
    def memory(self) -> list[RankMemory]:
        return estimate_memory(
            self.shape, self.cfg, self.work, expert_imbalance=self.machines.expert_imbalance
        )

    @property
    def peak(self) -> float:
        """Bytes of the heaviest rank."""
        return max(rank.peak for rank in self.memory)

    @property
    def fits(self) -> bool:
        return self.peak <= self.machines.gpu.memory_bytes

    @property
    def time(self) -> StepTime:
        return estimate_time(self.shape, self.cfg, self.work, self.machines)

    def after(self, change: _Change) -> Capacity:
        cfg = self.cfg
        fields = change.trainer | {
            "layout": LayoutConfig(**(cfg.layout.model_dump() | change.layout)),
            "optimizer": cfg.optimizer.model_copy(update=change.optimizer),
        }
        return replace(self, cfg=cfg.model_copy(update=fields))


def load_either(path: Path, overrides: Sequence[str]) -> TrainConfig | SftConfig:
    """The configuration of `train` or of `sft`, told by the demonstrations ([data]) that only the latter has."""
    try:
        tables = tomllib.loads(path.read_text()).keys()
    except (OSError, ValueError):
        tables = set()  # load_config says what is wrong with it
    return load_config(SftConfig if "data" in tables else TrainConfig, path, overrides)


def read_capacity(
    cfg: TrainConfig | SftConfig,
    *,
    machines: Machines,
    shape: Path | None = None,
    mean_response_tokens: float | None = None,
) -> Capacity:
    """Check the layout, and put together what the estimates need; of the model only config.json is read.

    Args:
        shape: another place of config.json, its directory or the file itself.
        mean_response_tokens: default: every response has the greatest length.

    Raises:
        ConfigError: the model cannot be divided over the layout, or a value is out of range.
    """
    directory = shape or cfg.model
    model = read_model_shape(directory.parent if directory.name == "config.json" else directory)
    check_layout(cfg.trainer.layout, model)
    work = workload(cfg, mean_response_tokens)
    if work.max_tokens > cfg.trainer.max_tokens_per_microbatch:
        raise ConfigError(
            f"trainer.max_tokens_per_microbatch = {cfg.trainer.max_tokens_per_microbatch}: must hold the longest sequence, "
            f"{work.max_tokens} padded tokens, because sequences are never split; raise it"
        )
    # A configuration that trains on CPU is planned as if it were moved to the GPUs.
    trainer = cfg.trainer.model_copy(update={"device": "cuda"})
    return Capacity(shape=model, cfg=trainer, work=work, machines=machines)


def find_machines(gpu: str, gpus_per_node: int = 8, peak_share: float | None = None) -> Machines:
    """Servers of a known kind of GPU.

    Raises:
        ConfigError: the kind is unknown.
    """
    if gpu not in GPUS:
        raise ConfigError(f"--gpu = '{gpu}': expected one of {', '.join(GPUS)}; take the nearest")
    return Machines(gpu=GPUS[gpu], gpus_per_node=gpus_per_node, peak_share=peak_share)


def workload(cfg: TrainConfig | SftConfig, mean_response_tokens: float | None) -> Workload:
    """One batch of a run; prompts count with their greatest length."""
    if isinstance(cfg, SftConfig):
        longest = padded_length(cfg.data.max_tokens, cfg.trainer.layout)
        mean = min(longest, _mean(mean_response_tokens, cfg.data.max_tokens))
        return Workload(
            num_sequences=cfg.batch_size, max_tokens=longest, mean_tokens=mean, mean_response_tokens=mean
        )
    mean = _mean(mean_response_tokens, cfg.sampling.max_response_tokens)
    longest = padded_length(
        cfg.prompts.max_prompt_tokens + cfg.sampling.max_response_tokens, cfg.trainer.layout
    )
    has_reference, num = cfg.algorithm.kl_coeff > 0, cfg.loop.updates_per_batch
    before = num > 1 or cfg.algorithm.needs_start
    surveys = (num - 1) / num if cfg.algorithm.needs_whole_update else 0  # the first one is the pass before
    return Workload(
        num_sequences=cfg.loop.prompts_per_step * cfg.loop.group_size,
        max_tokens=longest,
        mean_tokens=min(longest, cfg.prompts.max_prompt_tokens + mean),
        mean_response_tokens=mean,
        num_updates=num,
        num_scoring=before + surveys + has_reference,
        has_reference=has_reference,
        sync_bucket_bytes=cfg.rollout.sync_bucket_bytes,
    )


def _mean(given: float | None, longest: int) -> float:
    if given is None:
        return longest
    if not 0 < given <= longest:
        raise ConfigError(
            f"--mean-response-tokens = {given:g}: expected above 0 and at most {longest}, the greatest length in the "
            "configuration; change one of them"
        )
    return given


# --------------------------------------------------------------------------------------------------- report


def describe(capacity: Capacity) -> str:
    """Model, layout and work; memory by stage and part; time by part; what was assumed."""
    return "\n\n".join([
        _heading(capacity),
        _memory_table(capacity.memory),
        _time_table(capacity.time),
        _assumptions(capacity),
    ])  # fmt: skip


def verdict(capacity: Capacity) -> str:
    """One line: it fits, and by how much.

    Raises:
        ConfigError: it does not fit; with the changes that would help, and by how much.
    """
    heaviest = max(capacity.memory, key=lambda rank: rank.peak)
    limit, gpu = capacity.machines.gpu.memory_bytes, capacity.machines.gpu
    if capacity.fits:
        return (
            f"It fits: {_gib(heaviest.peak)} of {_gib(limit)} GiB on the heaviest rank (stage {heaviest.stage}, in the "
            f"{heaviest.peak_phase}), {1 - heaviest.peak / limit:.0%} free."
        )
    raise ConfigError(
        f"memory of one rank = {_gib(heaviest.peak)} GiB (stage {heaviest.stage}, in the {heaviest.peak_phase}): {gpu.name} "
        f"has {_gib(limit)} GiB, so that this cannot be trained; {advice(capacity)}"
    )


def _heading(capacity: Capacity) -> str:
    shape, layout, work, gpu = capacity.shape, capacity.cfg.layout, capacity.work, capacity.machines.gpu
    active = f", {shape.active_parameters / 1e9:.2f} billion active for a token" if shape.num_experts else ""
    nodes = math.ceil(layout.world_size / capacity.machines.gpus_per_node)
    return "\n".join([
        f"model    {shape.num_parameters:,} parameters{active}; {shape.num_layers} layers",
        f"layout   {layout.world_size} x {gpu.name} on {nodes} node(s): tensor {layout.tensor}, context {layout.context}, "
        f"data {layout.data}, pipeline {layout.pipeline} (chunks {layout.virtual_pipeline}), expert {layout.expert}, "
        f"expert_tensor {layout.resolved_expert_tensor}",
        f"work     {work.num_sequences} sequences of at most {work.max_tokens} tokens, {work.mean_tokens:.0f} in the mean; "
        f"{work.num_updates} update(s) of {num_microbatches(capacity.cfg, work)} microbatch(es) of at most "
        f"{capacity.cfg.max_tokens_per_microbatch} tokens on each of {layout.data} data rank(s)",
    ])  # fmt: skip


_PARTS = (
    ("weights", "weights"),
    ("gradients", "gradients (fp32)"),
    ("optimizer", "optimizer state"),
    ("context", "CUDA and NCCL*"),
    ("activations", "activations"),
    ("workspace", "backward workspace"),
    ("logprobs", "log-prob buffers"),
    ("update", "optimizer step"),
    ("transfer", "weight transfer"),
    ("fragmentation", "fragmentation*"),
    ("peak", "peak"),
    ("host", "host memory (a rank)"),
)


def _memory_table(ranks: Sequence[RankMemory]) -> str:
    """A column for each stage, a row for each part."""
    columns: list[tuple[str, list[str]]] = []
    for rank in ranks:
        values = [_gib(getattr(rank, part)) for part, _ in _PARTS]
        columns.append(
            (str(rank.stage), [f"{rank.parameters.total / 1e9:.3f}", str(rank.num_layers), *values])
        )
    labels = ["parameters (1e9)", "layers", *(label for _, label in _PARTS)]
    head = "GiB of one rank; stage " + "".join(f"{name:>9}" for name, _ in columns)
    rows = [
        f"{label:<23}" + "".join(f"{values[i]:>9}" for _, values in columns) for i, label in enumerate(labels)
    ]
    note = "peak = the first four + the largest of (activations + workspace + log-probs | optimizer step | transfer) + fragmentation"
    return "\n".join([head, *rows, note])


def _time_table(time: StepTime) -> str:
    parts = sorted(time.parts.items(), key=lambda item: -item[1])
    rows = [f"{name:<32}{seconds:>9.2f} s {seconds / time.total:>6.0%}" for name, seconds in parts]
    return "\n".join([
        f"one step takes about {time.total:.1f} s without the sampling; MFU {time.mfu:.1%} of {time.model_flops:.3g} model "
        f"FLOPs; dominated by {time.dominant}",
        *rows,
    ])  # fmt: skip


def _assumptions(capacity: Capacity) -> str:
    machines, gpu = capacity.machines, capacity.machines.gpu
    kind = "Transformer Engine" if uses_transformer_engine(capacity.cfg) else "local"
    return "\n".join([
        "assumed (*: never measured here)",
        f"  {gpu.name}: {_gib(gpu.memory_bytes)} GiB, {gpu.flops_s / 1e12:.0f} TFLOP/s bf16 dense, link "
        f"{gpu.link_bytes_s / 1e9:.0f} GB/s, network {gpu.network_bytes_s / 1e9:.0f} GB/s a GPU and direction (data sheets)",
        f"  passes reach {machines.share(capacity.shape, capacity.cfg):.0%} of the peak while they compute* ({kind} layers); "
        f"messages {LINK_SHARE:.0%} of the bandwidth*, and nothing hides them but optimizer.overlap",
        f"  CUDA context {_gib(CONTEXT_BYTES)} GiB*, NCCL {_gib(COMMUNICATOR_BYTES)} GiB*, fragmentation {FRAGMENTATION:.0%} "
        f"of what comes and goes*, fullest expert rank {machines.expert_imbalance:g} x the mean*",
    ])  # fmt: skip


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f}"


# --------------------------------------------------------------------------------------------------- advice


@dataclass(frozen=True, kw_only=True)
class _Change:
    """One setting that lowers the memory of a rank and leaves the result of a step as it is."""

    words: str
    layout: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    is_costly: bool = False
    """Slow, or wants more GPUs: a last resort."""


def advice(capacity: Capacity) -> str:
    """The first change after which it fits, and what the others would save; several together where none is enough."""
    better = [(change, after) for change, after in _possible(capacity) if after.peak < capacity.peak]
    for change, after in better:
        if after.fits:
            others = "; ".join(_effect(c, a, capacity) for c, a in better if c is not change)
            also = f". Also lower: {others}" if others else ""
            return f"set {_effect(change, after, capacity)}, which fits{also}"
    return _several(capacity)


def _several(capacity: Capacity) -> str:
    """Take the change that saves most, again and again; costly ones only when the others save nothing."""
    taken: list[str] = []
    while not capacity.fits:
        useful = [(c, after) for c, after in _possible(capacity) if after.peak < 0.99 * capacity.peak]
        if not useful:
            reached = f"{', '.join(taken) or 'what is set'} reaches {_gib(capacity.peak)} GiB"
            return f"no set of changes known here is enough ({reached}); take larger GPUs, or a smaller model"
        change, capacity = min(useful, key=lambda item: (item[0].is_costly, item[1].peak))
        taken.append(change.words)
    return f"no single change is enough; set, in this order, {'; '.join(taken)}: {_gib(capacity.peak)} GiB"


def _effect(change: _Change, after: Capacity, before: Capacity) -> str:
    return f"{change.words} ({_gib(after.peak)} GiB, {(after.peak - before.peak) / GIB:+.2f})"


def _possible(capacity: Capacity) -> Iterator[tuple[_Change, Capacity]]:
    """The changes that model and grid allow, and what becomes of the capacity."""
    for change in (*_settings(capacity), *_grids(capacity.cfg.layout)):
        try:
            after = capacity.after(change)
            check_layout(after.cfg.layout, after.shape)
        except ValueError:  # the grid's own rules (pydantic), or the model's (ConfigError)
            continue
        yield change, after


def _settings(capacity: Capacity) -> Iterator[_Change]:
    """Those within the same grid, cheapest first."""
    cfg, longest = capacity.cfg, capacity.work.max_tokens
    if not cfg.optimizer.distributed:
        yield _Change(words="optimizer.distributed = true", optimizer={"distributed": True})
    if cfg.implementation == "local":
        words = "implementation = 'transformer_engine'"
        yield _Change(words=words, trainer={"implementation": "transformer_engine"})
    if not fuses_activation(cfg):
        fused = {"megatron": cfg.megatron | {"bias_activation_fusion": True}}
        yield _Change(words="megatron.bias_activation_fusion = true", trainer=fused)
    fewer = max(cfg.max_tokens_per_microbatch // 2, longest)
    if fewer < cfg.max_tokens_per_microbatch:
        words = f"max_tokens_per_microbatch = {fewer}"
        yield _Change(words=words, trainer={"max_tokens_per_microbatch": fewer})
    for recompute in {"none": ("selective", "full"), "selective": ("full",), "full": ()}[cfg.recompute]:
        yield _Change(words=f"recompute = '{recompute}'", trainer={"recompute": recompute})
    if cfg.optimizer.cpu_offload < 1:
        yield _Change(words="optimizer.cpu_offload = 1.0", optimizer={"cpu_offload": 1.0}, is_costly=True)


def _grids(layout: LayoutConfig) -> Iterator[_Change]:
    """Grids that divide the model further: as many ranks first, then twice as many."""
    yield _grid({"expert": 2 * layout.expert})
    for axis in ("tensor", "pipeline", "context"):
        if layout.data % 2 == 0:
            yield _grid({axis: 2 * getattr(layout, axis), "data": layout.data // 2})
    gpus = f" ({2 * layout.world_size} GPUs)"
    yield _grid({"data": 2 * layout.data}, gpus)
    yield _grid({"data": 2 * layout.data, "expert": 2 * layout.expert}, gpus)


def _grid(axes: dict[str, Any], gpus: str = "") -> _Change:
    words = " with ".join(f"layout.{name} = {size}" for name, size in axes.items()) + gpus
    return _Change(words=words, layout=axes, is_costly=bool(gpus))
