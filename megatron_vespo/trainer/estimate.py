"""What one rank of the trainer holds in memory: arithmetic from the model's shape and the configuration alone.

Nothing is imported that needs a device, megatron or torch, so that a driver can refuse a layout before GPUs are booked.
benchmarks/plan.py compares the counts with real ranks.

Counted: weights, float32 gradient buffers, optimizer state, what autograd keeps for the backward pass (as many
microbatches as the pipeline schedule has in flight), one layer's backward workspace, the buffers of the log-prob pass, of
the optimizer step and of the weight export.  Not counted: the bucket padding of Megatron's buffers (below 0.1 % of a real
model), random number states, indices of a few bytes per token.

Names: t tokens of a microbatch on one context rank; under tensor parallelism a rank holds t / tensor of them outside the
divided matrices (sequence parallelism).  All sizes are bytes, of one rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from megatron_vespo.config import LayoutConfig, TrainerConfig
from megatron_vespo.trainer.hf_config import ModelShape
from megatron_vespo.trainer.layout import layers_of_stage

GIB = 1024**3

CONTEXT_BYTES = 1 * GIB
"""Assumed: CUDA context, loaded kernels and matrix-product workspaces of one process."""
COMMUNICATOR_BYTES = 1.5 * GIB
"""Assumed: NCCL's channels and buffers over all process groups of a rank; none for a single rank."""
FRAGMENTATION = 0.08
"""Assumed: share of what is allocated and freed in every step that the allocator cannot use."""
EXPORT_BLOCK_BYTES = 256 * 1024**2
"""hf_weights.BLOCK_BYTES, repeated here so that this module needs no torch; a test compares them."""
LOGIT_TILES = 2
"""Float32 tiles of logits that exist at one time in logprobs.py, each of `logprob_chunk_tokens` tokens' size."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one batch asks of the trainer."""

    num_sequences: int
    max_tokens: int
    """Longest sequence, prompt and response."""
    mean_tokens: float
    mean_response_tokens: float
    """Those that the LM head scores."""
    num_updates: int = 1
    """Optimizer updates on the batch, each on an equal share."""
    num_scoring: float = 0
    """Forward passes over the whole batch beside those of the updates."""
    has_reference: bool = False
    """A second copy of the weights lies in host memory, for the KL penalty."""
    sync_bucket_bytes: int = 0
    """Bucket in which rank 0 sends weights to the engine; 0: there is no engine."""


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, by how they are divided."""

    divided: int
    """Matrices that the tensor axis divides."""
    replicated: int
    """Norms and routers, which every tensor rank holds whole."""
    expert: int

    @property
    def dense(self) -> int:
        """Those whose gradients are summed over data and context ranks; experts' are over expert_data."""
        return self.divided + self.replicated

    @property
    def total(self) -> int:
        return self.dense + self.expert

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Parameters) -> Parameters:
        return self + other * -1

    def __mul__(self, num: int) -> Parameters:
        return Parameters(*(num * getattr(self, f.name) for f in fields(self)))


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank of a pipeline stage; the ranks of a stage differ only in that rank 0 exports the weights."""

    stage: int
    num_layers: int
    parameters: Parameters
    weights: float
    gradients: float
    optimizer: float
    """Float32 main weights (where the weights are not) and two moments."""
    activations: float
    """Kept for the backward pass by all microbatches in flight, with one recomputed layer where there is recomputation."""
    workspace: float
    """Gradients of one layer's insides, and inputs gathered over the tensor axis."""
    logprobs: float
    """Hidden states, a chunk's logits and the head's gradient; on the last stage."""
    update: float
    """Temporaries of the optimizer step."""
    transfer: float
    """Buffers of the weight export, and the engine's bucket on rank 0."""
    context: float
    """Assumed: what CUDA and NCCL take."""
    host: float
    """Host memory: offloaded optimizer state, reference weights, snapshot of a checkpoint being written."""

    @property
    def fixed(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.context

    @property
    def phases(self) -> dict[str, float]:
        """What comes and goes, by the phase of a step that needs it; phases follow one another."""
        return {
            "forward-backward": self.activations + self.workspace + self.logprobs,
            "optimizer step": self.update,
            "weight transfer": self.transfer,
        }

    @property
    def fragmentation(self) -> float:
        return FRAGMENTATION * max(self.phases.values())

    @property
    def peak(self) -> float:
        return self.fixed + max(self.phases.values()) + self.fragmentation

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name])


def estimate_memory(
    shape: ModelShape, cfg: TrainerConfig, work: Workload, *, expert_imbalance: float = 1.0
) -> list[RankMemory]:
    """The heaviest rank of every pipeline stage.

    Args:
        expert_imbalance: tokens of the fullest expert rank / their mean.
    """
    return [_rank_memory(shape, cfg, work, stage, expert_imbalance) for stage in range(cfg.layout.pipeline)]


def uses_transformer_engine(cfg: TrainerConfig) -> bool:
    """What "auto" becomes on a GPU machine with the gpu extra; this machine may be another."""
    return cfg.device == "cuda" and cfg.implementation != "local"


def fuses_activation(cfg: TrainerConfig) -> bool:
    """Whether SiLU, its product with the other half and the router's weight are one kernel, which keeps only its input."""
    return bool(cfg.megatron.get("bias_activation_fusion", False))


def itemsize(cfg: TrainerConfig) -> int:
    return 4 if cfg.dtype == "float32" else 2


# ----------------------------------------------------------------------------------------------- parameters


def layer_parameters(shape: ModelShape, layout: LayoutConfig) -> Parameters:
    """One decoder layer on one rank."""
    h, q, kv = shape.hidden_size, _query_size(shape), _key_size(shape)
    divided = h * (q + 2 * kv) + q * h
    replicated = 2 * h  # norms before attention and feed-forward
    replicated += 2 * shape.head_dim if shape.qk_norm else 0
    expert = 0
    if shape.num_experts:
        replicated += shape.num_experts * h
        per_expert = 3 * h * shape.expert_ffn_size
        expert = shape.num_experts * per_expert // (layout.expert * layout.resolved_expert_tensor)
    else:
        divided += 3 * h * shape.ffn_size
    return Parameters(divided // layout.tensor, replicated, expert)


def stage_parameters(shape: ModelShape, layout: LayoutConfig, stage: int) -> Parameters:
    """What one rank of a stage holds: its layers, the embedding on the first stage, norm and head on the last."""
    held = layer_parameters(shape, layout) * len(layers_of_stage(layout, shape, stage))
    vocabulary = Parameters(shape.vocab_size * shape.hidden_size // layout.tensor, 0, 0)
    is_last = stage == layout.pipeline - 1
    if stage == 0:
        held += vocabulary
    if is_last:
        held += Parameters(0, shape.hidden_size, 0)
        if not (stage == 0 and shape.tied_embeddings):  # a tied head of another stage is a copy
            held += vocabulary
    return held


def trained_parameters(shape: ModelShape, cfg: TrainerConfig, stage: int) -> Parameters:
    """Those of a stage's rank that have gradients."""
    held = stage_parameters(shape, cfg.layout, stage)
    num_layers = len(layers_of_stage(cfg.layout, shape, stage))
    routers = Parameters(0, shape.num_experts * shape.hidden_size, 0) * num_layers
    return held - routers if cfg.freeze_router else held


def optimizer_bytes(trained: Parameters, cfg: TrainerConfig) -> float:
    """Adam's two moments, and main weights where the model's own are not float32."""
    return (8 if cfg.dtype == "float32" else 12) * trained_state(trained, cfg)


def trained_state(trained: Parameters, cfg: TrainerConfig) -> float:
    """Parameters whose optimizer state a rank holds."""
    layout = cfg.layout
    share, expert_share = 1.0, 1.0
    if cfg.optimizer.distributed:
        stage_ranks = layout.data * layout.context * layout.tensor
        share = 1 / (layout.data * layout.context)
        expert_share = layout.expert * layout.resolved_expert_tensor / stage_ranks
    return share * trained.dense + expert_share * trained.expert


def _query_size(shape: ModelShape) -> int:
    return shape.num_heads * shape.head_dim


def _key_size(shape: ModelShape) -> int:
    return shape.num_groups * shape.head_dim


# ---------------------------------------------------------------------------------------------- activations


@dataclass(frozen=True, kw_only=True)
class LayerActivations:
    """What one decoder layer keeps of one microbatch for the backward pass, by what recomputation spares of it."""

    boundary: float
    """The layer's input, all that full recomputation keeps."""
    outside: float
    """Norms, projections and the inputs of the two insides."""
    core: float
    """Within core attention."""
    feed_forward: float
    """Within the feed-forward or expert layer; selective recomputation drops both insides, and makes one after the other."""

    def kept(self, recompute: str) -> float:
        return {
            "none": self.outside + self.core + self.feed_forward,
            "selective": self.outside,
            "full": self.boundary,
        }[recompute]

    def recomputed(self, recompute: str) -> float:
        """Made again for the one layer whose backward pass runs."""
        return {
            "none": 0.0,
            "selective": max(self.core, self.feed_forward),
            "full": self.kept("none"),
        }[recompute]


def layer_activations(
    shape: ModelShape,
    cfg: TrainerConfig,
    num_tokens: float,
    *,
    longest: float = 0.0,
    expert_imbalance: float = 1.0,
) -> LayerActivations:
    """Tensors kept for the backward pass by one layer, `num_tokens` = t packed tokens.

    Per token, in elements, q and kv being the sizes of this rank's queries and keys:
        attention       normed input h, fused projections q + 2 kv, queries before their norm q, rotated q + kv,
                        rotary tables 4 head_dim, output q (q more where local layers put sequences together), log-sum-exp
        feed-forward    normed input h; gate and up 2 f, then SiLU f, up f, their product f (3 f in all where fused:
                        trainer.megatron.bias_activation_fusion)
        experts         normed input h; per chosen expert its input h and as feed-forward, f once more for the
                        router's weight; the router's float32 scores and its map
        a norm          its input and 1 / rms where fused (CUDA); on CPU torch keeps input and result in float32

    Attention keeps nothing of t x t, except for local layers under context parallelism: their masks.

    Args:
        longest: tokens of the longest sequence, for those masks.
    """
    e, own = itemsize(cfg), num_tokens / cfg.layout.tensor
    te = uses_transformer_engine(cfg)
    norm_and_result = _norm(cfg, own, shape.hidden_size) + own * e * shape.hidden_size
    feed_forward = (
        _experts(shape, cfg, own, expert_imbalance)
        if shape.num_experts
        else num_tokens * e * (3 if fuses_activation(cfg) else 5) * shape.ffn_size / cfg.layout.tensor
    )
    core = 4 * shape.num_heads / cfg.layout.tensor  # log-sum-exp
    if not te:
        core += e * (_query_size(shape) / cfg.layout.tensor + _mask_columns(cfg.layout, longest))
    return LayerActivations(
        boundary=own * e * shape.hidden_size,
        outside=2 * norm_and_result + _attention(shape, cfg, num_tokens),
        core=num_tokens * core,
        feed_forward=feed_forward,
    )


def _attention(shape: ModelShape, cfg: TrainerConfig, num_tokens: float) -> float:
    """From the fused projections to the output projection's input, without the core's own."""
    e, tensor = itemsize(cfg), cfg.layout.tensor
    q, kv = _query_size(shape) / tensor, _key_size(shape) / tensor
    fused, keys = q + 2 * kv, kv  # values are read in place from the fused projections
    if cfg.layout.context > 1 and not uses_transformer_engine(cfg):
        keys = 2 * kv * cfg.layout.context  # gathered, as are values
        if cfg.device == "cpu" and cfg.dtype == "bfloat16":
            fused = 0  # the norms of queries and keys have float32 copies, so that nothing reads it any more
    norms = 0.0
    if shape.qk_norm:
        heads, groups = shape.num_heads / tensor, shape.num_groups / tensor
        norms = _query_key_norms(cfg, num_tokens, (q, heads), (kv, groups))
    return norms + num_tokens * e * (fused + q + keys + 4 * shape.head_dim + q)


def _mask_columns(layout: LayoutConfig, longest: float) -> float:
    """Mean keys in the mask of a query: those of two of the 2 * context chunks of a sequence, up to the chunk's end."""
    return longest * (2 * layout.context + 1) / (4 * layout.context) if layout.context > 1 else 0.0


def _norm(cfg: TrainerConfig, num_tokens: float, width: float, rows: float = 1) -> float:
    """RMSNorm's own: its input and the reciprocal of each row; its output is counted where it goes."""
    per_element = itemsize(cfg) if cfg.device == "cuda" else 8
    return num_tokens * (per_element * width + 4 * rows)


def _query_key_norms(
    cfg: TrainerConfig, num_tokens: float, queries: tuple[float, float], keys: tuple[float, float]
) -> float:
    """Of (width, rows a token).  Keys are read in place from the fused projections, but copied to float32 where they must."""
    (q, heads), (kv, groups) = queries, keys
    per_key = 0 if cfg.device == "cuda" else 8 if cfg.dtype == "bfloat16" else 4
    return _norm(cfg, num_tokens, q, rows=heads) + num_tokens * (per_key * kv + 4 * groups)


def _experts(shape: ModelShape, cfg: TrainerConfig, own: float, imbalance: float) -> float:
    e, k = itemsize(cfg), shape.experts_per_token
    router = own * (
        5 * shape.num_experts + 20 * k
    )  # float32 scores, bool map; float32 weights, two int64 indices
    width = (3 if fuses_activation(cfg) else 6) * shape.expert_ffn_size
    shard = cfg.layout.resolved_expert_tensor
    dispatched = dispatched_tokens(shape, cfg, own, imbalance)
    return router + dispatched * (e * (shape.hidden_size + width / shard) + 4)


def dispatched_tokens(shape: ModelShape, cfg: TrainerConfig, own: float, imbalance: float) -> float:
    """(token, expert) pairs that one rank's experts compute, if `own` tokens come from each rank."""
    uneven = imbalance if cfg.layout.expert > 1 else 1.0
    return own * shape.experts_per_token * cfg.layout.resolved_expert_tensor * uneven


def microbatches_in_flight(layout: LayoutConfig, stage: int, num_microbatches: int) -> float:
    """Microbatches whose activations a stage holds at one time, in units of all of its layers.

    1F1B: pipeline - stage        interleaved: (2 (pipeline - stage - 1) + (chunks - 1) pipeline + 1) / chunks
    """
    chunks = layout.virtual_pipeline
    ahead = layout.pipeline - stage - 1
    if chunks == 1:
        return min(num_microbatches, ahead + 1)
    return min(num_microbatches * chunks, 2 * ahead + (chunks - 1) * layout.pipeline + 1) / chunks


def num_microbatches(cfg: TrainerConfig, work: Workload) -> int:
    """Microbatches of each data rank in one update; interleaving needs a multiple of the stages."""
    sequences = work.num_sequences / work.num_updates / cfg.layout.data
    together = max(1, int(cfg.max_tokens_per_microbatch // work.mean_tokens))  # sequences are never split
    num = math.ceil(sequences / together)
    if cfg.layout.virtual_pipeline > 1:
        num = math.ceil(num / cfg.layout.pipeline) * cfg.layout.pipeline
    return num


def largest_microbatch(cfg: TrainerConfig, work: Workload) -> float:
    """Tokens of the fullest microbatch on one context rank."""
    per_rank = math.ceil(work.num_sequences / work.num_updates / cfg.layout.data) * work.max_tokens
    return min(cfg.max_tokens_per_microbatch, per_rank) / cfg.layout.context


def stage_activations(
    shape: ModelShape, cfg: TrainerConfig, work: Workload, stage: int, *, expert_imbalance: float = 1.0
) -> float:
    """What the backward passes of all microbatches in flight on a stage need."""
    tokens = largest_microbatch(cfg, work)
    longest = min(work.max_tokens, tokens * cfg.layout.context)
    layer = layer_activations(shape, cfg, tokens, longest=longest, expert_imbalance=expert_imbalance)
    num_layers = len(layers_of_stage(cfg.layout, shape, stage))
    in_flight = microbatches_in_flight(cfg.layout, stage, num_microbatches(cfg, work))
    held = in_flight * num_layers * layer.kept(cfg.recompute)
    if stage == 0:
        held += 8 * tokens * in_flight  # token ids, for the embedding's gradient
    head = 0.0
    if stage == cfg.layout.pipeline - 1:
        own = tokens / cfg.layout.tensor
        head = _norm(cfg, own, shape.hidden_size) + own * shape.hidden_size * itemsize(cfg)
    return held + max(
        head, layer.recomputed(cfg.recompute)
    )  # the head's are gone when the layers' backward begins


# ------------------------------------------------------------------------------------------------- one rank


def _rank_memory(
    shape: ModelShape, cfg: TrainerConfig, work: Workload, stage: int, expert_imbalance: float
) -> RankMemory:
    held = stage_parameters(shape, cfg.layout, stage)
    trained = trained_parameters(shape, cfg, stage)
    weights, state = itemsize(cfg) * held.total, optimizer_bytes(trained, cfg)
    # Moments leave the GPU; the distributed optimizer's main weights stay there, and the host has a copy of its own.
    on_gpu = state * (1 - cfg.optimizer.cpu_offload * 8 / 12)
    is_last = stage == cfg.layout.pipeline - 1
    tokens = largest_microbatch(cfg, work)
    return RankMemory(
        stage=stage,
        num_layers=len(layers_of_stage(cfg.layout, shape, stage)),
        parameters=held,
        weights=weights,
        gradients=4 * trained.total,
        optimizer=on_gpu,
        activations=stage_activations(shape, cfg, work, stage, expert_imbalance=expert_imbalance),
        workspace=_workspace(shape, cfg, tokens, expert_imbalance),
        logprobs=_logprob_bytes(shape, cfg, tokens) if is_last else 0.0,
        update=_update_bytes(on_gpu, cfg),
        transfer=_transfer_bytes(shape, cfg, work, stage),
        context=_context_bytes(cfg),
        # Offloaded state; the snapshot of a checkpoint, whose pinned memory torch rounds up to a power of two; the
        # reference, and the policy while it is away.
        host=state * cfg.optimizer.cpu_offload
        + _power_of_two(4 * trained_state(trained, cfg) * 3)
        + (2 * weights if work.has_reference else 0.0),
    )


def _power_of_two(num_bytes: float) -> float:
    return 2.0 ** math.ceil(math.log2(max(num_bytes, 1)))


def _workspace(shape: ModelShape, cfg: TrainerConfig, num_tokens: float, imbalance: float) -> float:
    """Gradients that live at one time in the backward pass of the wider half of a layer."""
    e, h, tensor = itemsize(cfg), shape.hidden_size, cfg.layout.tensor
    gathered = num_tokens * e * h if tensor > 1 else 0.0
    attention = num_tokens * e * 2 * (_query_size(shape) + 2 * _key_size(shape)) / tensor
    width = 4 * shape.ffn_size / tensor
    rows = num_tokens
    if shape.num_experts:
        width = 2 * h + 4 * shape.expert_ffn_size / cfg.layout.resolved_expert_tensor
        rows = dispatched_tokens(shape, cfg, num_tokens / tensor, imbalance)
    return gathered + max(attention, rows * e * width)


def _logprob_bytes(shape: ModelShape, cfg: TrainerConfig, num_tokens: float) -> float:
    """In the head's backward: gathered hidden states and their float32 gradient, twice; tiles of logits; the head's gradient."""
    e, rows = itemsize(cfg), shape.vocab_size / cfg.layout.tensor
    logits = 4 * LOGIT_TILES * min(cfg.logprob_chunk_tokens, num_tokens) * rows
    return num_tokens * shape.hidden_size * (e + 8) + logits + e * rows * shape.hidden_size


def _update_bytes(state: float, cfg: TrainerConfig) -> float:
    """torch's Adam, taken without Transformer Engine, holds one float32 temporary of its weights; the fused one none."""
    per_parameter = 8 if cfg.dtype == "float32" else 12
    return 0.0 if uses_transformer_engine(cfg) else 4 * state / per_parameter


def _transfer_bytes(shape: ModelShape, cfg: TrainerConfig, work: Workload, stage: int) -> float:
    """Rank 0 (stage 0) receives a block and joins its shards to whole tensors; the others send their part of one."""
    largest = shape.vocab_size * shape.hidden_size * itemsize(cfg)
    block = max(EXPORT_BLOCK_BYTES, largest)
    if stage == 0:
        return 2 * block + work.sync_bucket_bytes
    return max(EXPORT_BLOCK_BYTES, largest / cfg.layout.tensor)


def _context_bytes(cfg: TrainerConfig) -> float:
    if cfg.device == "cpu":
        return 0.0
    return CONTEXT_BYTES + (COMMUNICATOR_BYTES if cfg.layout.world_size > 1 else 0)
