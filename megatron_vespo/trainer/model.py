"""A Hugging Face shape becomes this rank's part of a Megatron-Core GPT model.

All model building is in this file, because Megatron-Core 0.19 announces the end of GPTModel.  The model is
built without an LM head in its forward: the last stage gives hidden states, and logprobs.py applies the head
in chunks, so that full-vocabulary logits of a whole microbatch never exist.

It imports megatron: a rank imports it only after `cpu.install()` (or on CUDA); a driver, which builds nothing, may
import it for `check_overrides` without.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vespo.config import ConfigError, TrainerConfig
from megatron_vespo.trainer.hf_config import ModelShape
from megatron_vespo.trainer.layout import layers_of_stage

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

OWNED = {
    "calculate_per_token_loss": "the loss is a sum with one global denominator",
    "moe_aux_loss_coeff": "its scale assumes divisions that the sum-form loss does not make",
    "moe_z_loss_coeff": "its scale assumes divisions that the sum-form loss does not make",
    "sequence_parallel": "it follows from trainer.layout.tensor",
    "tensor_model_parallel_size": "set trainer.layout.tensor",
    "pipeline_model_parallel_size": "set trainer.layout.pipeline",
    "context_parallel_size": "set trainer.layout.context",
    "expert_model_parallel_size": "set trainer.layout.expert",
    "expert_tensor_parallel_size": "set trainer.layout.expert_tensor",
    "virtual_pipeline_model_parallel_size": "interleaved pipeline stages are not supported",
    "pipeline_model_parallel_layout": "stages hold equal numbers of layers",
    "mtp_num_layers": "multi-token prediction is not supported",
    "finalize_model_grads_func": "step.py sets it",
    "variable_seq_lengths": "step.py sets it",
    "moe_router_pre_softmax": "the model's config.json says it",
}
"""TransformerConfig fields that trainer.megatron may not override, and why, beside the tables below."""

SHAPE_FIELDS = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "num_query_groups": "num_groups",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "ffn_size",
    "layernorm_epsilon": "norm_eps",
}
MOE_SHAPE_FIELDS = {
    "num_moe_experts": "num_experts",
    "moe_router_topk": "experts_per_token",
    "moe_ffn_hidden_size": "expert_ffn_size",
}
"""Megatron's names of what ModelShape says."""

ARCHITECTURE = {
    "normalization": "RMSNorm",
    "qk_layernorm": True,
    "add_bias_linear": False,
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
MOE_ARCHITECTURE = {
    "moe_router_score_function": "softmax",
    "moe_router_dtype": "fp32",
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
}
"""What is the same for every Qwen3 model."""


def use_transformer_engine(cfg: TrainerConfig) -> bool:
    """Resolve `trainer.implementation` on this machine: the one place that decides.

    Raises:
        ConfigError: Transformer Engine was asked for by name and cannot be used.
    """
    # The meta package "transformer_engine" installs without its compiled half; only the latter is usable.
    installed = importlib.util.find_spec("transformer_engine_torch") is not None
    usable = cfg.device == "cuda" and installed
    if cfg.implementation == "transformer_engine" and not usable:
        reason = "it is not installed" if cfg.device == "cuda" else "it needs device = 'cuda'"
        raise ConfigError(
            f"trainer.implementation = 'transformer_engine': {reason}; install the gpu extra, "
            "or set implementation = 'local'"
        )
    return usable and cfg.implementation != "local"


def transformer_config(cfg: TrainerConfig, shape: ModelShape) -> TransformerConfig:
    """Megatron's configuration of this model on this layout, with `trainer.megatron` on top.

    Raises:
        ConfigError: as `check_overrides`.
    """
    check_overrides(cfg)
    fields = _model_fields(shape) | _numeric_fields(cfg) | _layout_fields(cfg) | _switches(cfg, shape)
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
    )
    owned = (
        dict.fromkeys(ours, "the trainer sets it from the model, trainer.dtype and trainer.device") | OWNED
    )
    for name in cfg.megatron:
        if reason := owned.get(name):
            raise ConfigError(f"trainer.megatron.{name}: cannot be overridden, {reason}; take it out")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "see megatron.core's TransformerConfig."
            raise ConfigError(f"unknown field 'trainer.megatron.{name}': {hint}")


def build_model(cfg: TrainerConfig, shape: ModelShape, *, stage: int) -> GPTModel:
    """This rank's part of the model, with random weights.

    Its forward gives hidden states [s, b, h] on every stage; under sequence parallelism s is this rank's slice.
    """
    config = transformer_config(cfg, shape)
    spec: Any  # GPTModel takes block specs as well as the layer specs that it is annotated with
    if use_transformer_engine(cfg):
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    else:
        num_layers = len(layers_of_stage(cfg.layout, shape, stage))
        norm: Any = RMSNorm
        spec = TransformerBlockSubmodules(layer_specs=[_local_layer(config)] * num_layers, layer_norm=norm)
    model: Any = GPTModel(
        config,
        spec,
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.max_positions,
        pre_process=stage == 0,
        post_process=stage == cfg.layout.pipeline - 1,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,  # type: ignore[arg-type]  # annotated int, used as a number
        parallel_output=True,
    )
    if model.post_process:
        model.output_layer.forward = _hidden_states_instead_of_logits
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
    return fields


def _numeric_fields(cfg: TrainerConfig) -> dict[str, Any]:
    dtype = DTYPES[cfg.dtype]
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": False,
        "calculate_per_token_loss": True,  # no division by microbatches or data ranks: see step.py
        "use_cpu_initialization": cfg.device == "cpu",
    }


def _layout_fields(cfg: TrainerConfig) -> dict[str, Any]:
    layout = cfg.layout
    return {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.resolved_expert_tensor,
        "sequence_parallel": layout.tensor > 1,  # else Megatron refuses MoE with tensor parallelism
        "batch_p2p_sync": False,
        "deallocate_pipeline_outputs": cfg.device == "cuda",  # gloo may still be sending them
    }


def _switches(cfg: TrainerConfig, shape: ModelShape) -> dict[str, Any]:
    """How fast, not what: fusions off, which need extra kernels, and the plainest way to exchange tokens."""
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
            "moe_token_dispatcher_type": "alltoall",
            "moe_grouped_gemm": use_transformer_engine(cfg),
            "moe_permute_fusion": False,
        }
    if cfg.recompute:
        fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
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


class SDPACoreAttention(MegatronModule):
    """Causal attention by torch's scaled_dot_product_attention, [s, b, heads, head_dim] in, [s, b, h] out.

    Right-padded rows need no mask: what follows a token cannot influence it.  Under context parallelism a rank
    holds the zig-zag slice of packing.py and gathers the others' keys and values.
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
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        if options.get("packed_seq_params") is not None:
            raise NotImplementedError("the local layer spec takes padded rows, not packed sequences")
        mask = None
        if self.context_group.size() > 1:
            mask = self._zigzag_mask(query.shape[0], query.device)
            key = gather_from_sequence_parallel_region(key, group=self.context_group)
            value = gather_from_sequence_parallel_region(value, group=self.context_group)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(2)

    def _zigzag_mask(self, local_length: int, device: torch.device) -> Tensor:
        """[local, total] True where a query may see a key, both in the order of the zig-zag slices."""
        size, half = self.context_group.size(), local_length // 2

        def positions(rank: int) -> Tensor:
            step = torch.arange(half, device=device)
            return torch.cat([rank * half + step, (2 * size - 1 - rank) * half + step])

        keys = torch.cat([positions(rank) for rank in range(size)])
        return keys[None, :] <= positions(self.context_group.rank())[:, None]
