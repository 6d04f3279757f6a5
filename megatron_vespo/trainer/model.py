"""A Hugging Face shape becomes this rank's part of a Megatron-Core GPT model.

All model building is in this file, because Megatron-Core 0.19 announces the end of GPTModel.  The model takes packed
sequences (THD) and is built without an LM head in its forward: the last stage gives hidden states, and logprobs.py
applies the head in chunks, so that full-vocabulary logits of a whole microbatch never exist.

It imports megatron: a rank imports it only after `cpu.install()` (or on CUDA); a driver, which builds nothing, may
import it for `check_overrides` without.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vespo.config import ConfigError, TrainerConfig
from megatron_vespo.trainer.hf_config import ModelShape
from megatron_vespo.trainer.layout import layers_of_chunk

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

OWNED = {
    "calculate_per_token_loss": "the loss is a sum with one global denominator",
    "moe_aux_loss_coeff": "set trainer.moe_aux_loss_coeff, which is scaled for the sum-form loss",
    "moe_enable_routing_replay": "set trainer.router_replay",
    "moe_router_fusion": "the fused router hides its choices: neither record nor replay would see them",
    "moe_z_loss_coeff": "its scale assumes divisions that the sum-form loss does not make",
    "sequence_parallel": "it follows from trainer.layout.tensor",
    "tensor_model_parallel_size": "set trainer.layout.tensor",
    "pipeline_model_parallel_size": "set trainer.layout.pipeline",
    "context_parallel_size": "set trainer.layout.context",
    "expert_model_parallel_size": "set trainer.layout.expert",
    "expert_tensor_parallel_size": "set trainer.layout.expert_tensor",
    "virtual_pipeline_model_parallel_size": "set trainer.layout.virtual_pipeline",
    "num_layers_in_first_pipeline_stage": "set trainer.layout.first_stage_layers",
    "num_layers_in_last_pipeline_stage": "set trainer.layout.last_stage_layers",
    "pipeline_model_parallel_layout": "set trainer.layout.first_stage_layers and last_stage_layers",
    "microbatch_group_size_per_vp_stage": "packing.py plans microbatches for groups of one per pipeline stage",
    "mtp_num_layers": "multi-token prediction is not supported",
    "finalize_model_grads_func": "the trainer sums gradients its own way",
    "no_sync_func": "set trainer.optimizer.overlap",
    "variable_seq_lengths": "packing.py gives all microbatches of a pipeline one length",
    "recompute_granularity": "set trainer.recompute",
    "recompute_method": "set trainer.recompute",
    "recompute_num_layers": "set trainer.recompute",
    "recompute_modules": "set trainer.recompute",
    "moe_router_pre_softmax": "the model's config.json says it",
}
OWNED |= dict.fromkeys(
    (
        "layernorm_zero_centered_gamma", "moe_expert_capacity_factor", "moe_input_jitter_eps", "moe_router_enable_expert_bias",
        "moe_router_force_load_balancing", "moe_router_group_topk", "moe_router_num_groups", "moe_router_topk_scaling_factor",
        "moe_shared_expert_intermediate_size", "rotary_interleaved", "window_size",
    ),
    "it would make the trainer another function than the engine",
) | dict.fromkeys(
    ("cuda_graph_impl", "cuda_graph_scope", "enable_cuda_graph", "external_cuda_graph"),
    "a captured graph would bypass record and replay of expert choices",
)  # fmt: skip
"""TransformerConfig fields that trainer.megatron may not override, and why, beside the tables below."""

SHAPE_FIELDS = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "num_query_groups": "num_groups",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "ffn_size",
    "layernorm_epsilon": "norm_eps",
    "qk_layernorm": "qk_norm",
}
MOE_SHAPE_FIELDS = {
    "num_moe_experts": "num_experts",
    "moe_router_topk": "experts_per_token",
    "moe_ffn_hidden_size": "expert_ffn_size",
}
"""Megatron's names of what ModelShape says."""

ARCHITECTURE = {
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
MOE_ARCHITECTURE = {
    "moe_router_score_function": "softmax",
    "moe_router_dtype": "fp32",
}
"""What is the same for every model that we build."""


def use_transformer_engine(cfg: TrainerConfig) -> bool:
    """Resolve `trainer.implementation` on this machine: the one place that decides.

    Raises:
        ConfigError: what was asked for by name (Transformer Engine, DeepEP) cannot be used.
    """
    # The meta package "transformer_engine" installs without its compiled half; only the latter is usable.
    installed = importlib.util.find_spec("transformer_engine_torch") is not None
    usable = cfg.device == "cuda" and installed
    reason = "it is not installed" if cfg.device == "cuda" else "it needs device = 'cuda'"
    if cfg.implementation == "transformer_engine" and not usable:
        raise ConfigError(
            f"trainer.implementation = 'transformer_engine': {reason}; install the gpu extra, "
            "or set implementation = 'local'"
        )
    chosen = usable and cfg.implementation != "local"
    if cfg.token_dispatcher == "flex":
        missing = importlib.util.find_spec("deep_ep") is None
        if missing or not chosen:
            what = "the package deep_ep is not installed" if missing else "Transformer Engine is not in use"
            raise ConfigError(
                f"trainer.token_dispatcher = 'flex': {what}; mend that, or set token_dispatcher = 'alltoall'"
            )
    return chosen


def transformer_config(cfg: TrainerConfig, shape: ModelShape) -> TransformerConfig:
    """Megatron's configuration of this model on this layout, with `trainer.megatron` on top.

    Raises:
        ConfigError: as `check_overrides`.
    """
    check_overrides(cfg)
    fields = _model_fields(shape) | _numeric_fields(cfg) | _layout_fields(cfg) | _switches(cfg, shape)
    fields |= _recompute_fields(cfg, shape)
    if shape.num_experts:
        fields |= _moe_fields(cfg)
    return TransformerConfig(**(fields | cfg.megatron))


def check_overrides(cfg: TrainerConfig) -> None:
    """Refuse what `trainer.megatron` may not say; performance switches (`_switches`) are the only ones of ours it may.

    Raises:
        ConfigError: it names an unknown field, or one that the trainer itself sets.
    """
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    ours = (
        SHAPE_FIELDS
        | MOE_SHAPE_FIELDS
        | ARCHITECTURE
        | MOE_ARCHITECTURE
        | _numeric_fields(cfg)
        | _layout_fields(cfg)
        | _moe_fields(cfg)
    )
    owned = (
        dict.fromkeys(ours, "the trainer sets it from the model and the configuration's own fields") | OWNED
    )
    for name in cfg.megatron:
        if reason := owned.get(name):
            raise ConfigError(f"trainer.megatron.{name}: cannot be overridden, {reason}; take it out")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "see megatron.core's TransformerConfig."
            raise ConfigError(f"unknown field 'trainer.megatron.{name}': {hint}")


def build_model(cfg: TrainerConfig, shape: ModelShape, *, stage: int) -> list[GPTModel]:
    """This rank's model chunks (one without interleaving), with random weights.

    The forward of a chunk gives hidden states [t, 1, h]; under sequence parallelism t is this rank's slice.
    """
    config = transformer_config(cfg, shape)  # one object: what is set on it later holds for every chunk
    return [_build_chunk(cfg, config, shape, stage, chunk) for chunk in range(cfg.layout.virtual_pipeline)]


def _build_chunk(
    cfg: TrainerConfig, config: TransformerConfig, shape: ModelShape, stage: int, chunk: int
) -> GPTModel:
    layout = cfg.layout
    vp_stage = chunk if layout.virtual_pipeline > 1 else None
    spec: Any  # GPTModel takes block specs as well as the layer specs that it is annotated with
    if use_transformer_engine(cfg):
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    else:
        num_layers = len(layers_of_chunk(layout, shape, stage, chunk))
        norm: Any = RMSNorm
        spec = TransformerBlockSubmodules(layer_specs=[_local_layer(config)] * num_layers, layer_norm=norm)
    model: Any = GPTModel(
        config,
        spec,
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.max_positions,
        pre_process=stage == 0 and chunk == 0,
        post_process=stage == layout.pipeline - 1 and chunk == layout.virtual_pipeline - 1,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,  # type: ignore[arg-type]  # annotated int, used as a number
        parallel_output=True,
        vp_stage=vp_stage,
    )
    if shape.rope_scaling:
        # GPTModel's own rope_scaling = True takes only the factor, and fixes the other three at Llama-3.1's numbers.
        rope = model.rotary_pos_emb
        rope.inv_freq = rope._apply_scaling(rope.inv_freq, **dataclasses.asdict(shape.rope_scaling))
    if model.post_process:
        model.output_layer.forward = _hidden_states_instead_of_logits
    if cfg.freeze_router:
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.router.weight"):
                parameter.requires_grad_(False)
    return model.to(config.params_dtype)


def head_weight(model: Any) -> Tensor:
    """[V / tensor, h], this rank's rows of the LM head (the embedding itself where it is tied); last stage only."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def _hidden_states_instead_of_logits(hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
    # GPTModel transposes what it takes for [s, b, V] logits; handing it the transposed view makes that a no-op.
    return hidden.transpose(0, 1), None


def _model_fields(shape: ModelShape) -> dict[str, Any]:
    fields = {name: getattr(shape, ours) for name, ours in SHAPE_FIELDS.items()} | ARCHITECTURE
    if shape.num_experts:
        fields |= {name: getattr(shape, ours) for name, ours in MOE_SHAPE_FIELDS.items()} | MOE_ARCHITECTURE
        # softmax over the chosen logits == renormalized top-k
        fields["moe_router_pre_softmax"] = not shape.normalized_top_k
        fields["moe_enable_routing_replay"] = True  # routing.py listens there
    return fields


def _numeric_fields(cfg: TrainerConfig) -> dict[str, Any]:
    dtype = DTYPES[cfg.dtype]
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": False,
        "calculate_per_token_loss": True,  # no division by microbatches or data ranks: see optimizer.py
        "use_cpu_initialization": cfg.device == "cpu",
    }


def _layout_fields(cfg: TrainerConfig) -> dict[str, Any]:
    layout = cfg.layout
    interleaved = layout.virtual_pipeline > 1
    return {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline if interleaved else None,
        "num_layers_in_first_pipeline_stage": layout.first_stage_layers,
        "num_layers_in_last_pipeline_stage": layout.last_stage_layers,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.resolved_expert_tensor,
        "sequence_parallel": layout.tensor > 1,  # else Megatron refuses MoE with tensor parallelism
        # Of two stages each is the other's both neighbours: batched messages of both directions would be confused.
        "batch_p2p_comm": not interleaved,
        "overlap_p2p_comm": interleaved,
        "batch_p2p_sync": False,
        "deallocate_pipeline_outputs": cfg.device == "cuda",  # gloo may still be sending them
    }


def _moe_fields(cfg: TrainerConfig) -> dict[str, Any]:
    balanced = cfg.moe_aux_loss_coeff > 0
    return {
        "moe_token_dispatcher_type": token_dispatcher(cfg),
        "moe_router_load_balancing_type": "aux_loss" if balanced else "none",
        "moe_aux_loss_coeff": cfg.moe_aux_loss_coeff,  # forward_backward.py scales it for each update
    }


def token_dispatcher(cfg: TrainerConfig) -> str:
    """Resolve `trainer.token_dispatcher`; gloo has no all-gather of unequal parts, which alltoall needs for divided experts."""
    if cfg.token_dispatcher != "auto":
        return cfg.token_dispatcher
    divided = cfg.layout.expert > 1 and cfg.layout.resolved_expert_tensor > 1
    return "allgather" if divided and cfg.device == "cpu" else "alltoall"


def _recompute_fields(cfg: TrainerConfig, shape: ModelShape) -> dict[str, Any]:
    if cfg.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if cfg.recompute == "selective":
        modules = ["core_attn", "moe" if shape.num_experts else "mlp"]
        return {"recompute_granularity": "selective", "recompute_modules": modules}
    return {}


def _switches(cfg: TrainerConfig, shape: ModelShape) -> dict[str, Any]:
    """How fast, not what: fusions that need extra kernels come with Transformer Engine."""
    engine = use_transformer_engine(cfg)
    fields: dict[str, Any] = {
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
    }
    if shape.num_experts:
        fields |= {
            "moe_grouped_gemm": engine,
            "moe_permute_fusion": engine,
        }
    return fields


# ------------------------------------------------------------------------------- the torch-only layer spec


def _local_layer(config: TransformerConfig) -> ModuleSpec:
    """One decoder layer of torch and megatron-core parts alone (no Transformer Engine, no Apex)."""
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    layer: Any = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    attention.core_attention = SDPACoreAttention
    return spec


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, which tells Megatron that its gradient is partial under sequence parallelism.

    Upstream's WrappedTorchNorm refuses sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


@dataclass(kw_only=True)
class Packed(PackedSeqParams):
    """Megatron's description of a packed microbatch, with what SDPACoreAttention would otherwise fetch per layer."""

    lengths: list[int]
    """Padded tokens of every segment, over all context ranks."""
    natural: Tensor | None
    """[t * context] where each token of the pack, in natural order, stands in the gathered zig-zag slices; None
    without context parallelism."""


def packed(boundaries: Sequence[int], max_seqlen: int, context: int, device: torch.device) -> Packed:
    """The description of a microbatch whose segments end at `boundaries` [n + 1], padding included.

    `max_seqlen` is the longest segment's exactly: Megatron takes positions on across segments where it is all of them.

    Padding belongs to the segment before it, whose tokens cannot see it.
    """
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device=device)
    lengths = [end - start for start, end in itertools.pairwise(boundaries)]
    return Packed(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen, max_seqlen_kv=max_seqlen,
        lengths=lengths,
        natural=_natural_order(boundaries, context, device) if context > 1 else None,
    )  # fmt: skip


def _natural_order(boundaries: Sequence[int], context: int, device: torch.device) -> Tensor:
    local = boundaries[-1] // context
    starts = []
    for begin, end in itertools.pairwise(boundaries):
        half = (end - begin) // (2 * context)
        for chunk in range(2 * context):
            late = chunk >= context
            rank = 2 * context - 1 - chunk if late else chunk
            starts.append((rank * local + begin // context + half * late, half))
    return torch.cat([torch.arange(start, start + size, device=device) for start, size in starts])


class SDPACoreAttention(MegatronModule):
    """Causal attention within each packed segment by torch's scaled_dot_product_attention.

    Takes [t, heads, head_dim], gives [t, heads * head_dim].  Under context parallelism a rank holds chunks r and
    2 * context - 1 - r of every segment (packing.py) and gathers the others' keys and values.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        self.context_group = groups.cp
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: Packed,
        **_: Any,
    ) -> Tensor:
        lengths, context = packed_seq_params.lengths, self.context_group.size()
        if context > 1:
            key, value = (
                gather_from_sequence_parallel_region(x, group=self.context_group)[packed_seq_params.natural]
                for x in (key, value)
            )
        segments = zip(
            query.split([length // context for length in lengths]),
            key.split(lengths),
            value.split(lengths),
            strict=True,
        )
        return torch.cat([self._segment(*segment) for segment in segments]).flatten(1)

    def _segment(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One segment: this rank's queries, all keys and values of it, [tokens, heads, head_dim] each."""
        size, rank = self.context_group.size(), self.context_group.rank()
        if size == 1:
            return self._attend(query, key, value, None)
        outs = []
        for chunk, part in zip((rank, 2 * size - 1 - rank), query.chunk(2), strict=True):
            visible = (chunk + 1) * len(part)
            mask = torch.ones(len(part), visible, dtype=torch.bool, device=query.device).tril(
                visible - len(part)
            )
            outs.append(self._attend(part, key[:visible], value[:visible], mask))
        return torch.cat(outs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)
