"""The shape of a Hugging Face model: what `config.json` says, as far as the trainer can build it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vespo.config import ConfigError

MODEL_TYPES = ("qwen3_moe", "qwen3")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes and switches of one Qwen3 or Qwen3-MoE model."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_groups: int
    """Key/value heads (query groups)."""
    head_dim: int
    ffn_size: int
    """Dense feed-forward width; unused where num_experts > 0."""
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    tied_embeddings: bool
    num_experts: int = 0
    """0 for a dense model."""
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    normalized_top_k: bool = True
    """Whether the chosen experts' weights sum to 1."""


def read_model_shape(model: Path) -> ModelShape:
    """Read `config.json` of a Hugging Face directory.

    Raises:
        ConfigError: the directory or file is missing, or describes a model that the trainer cannot build.
    """
    hf = _read_config(model)
    _refuse_variants(model, hf)
    moe = {}
    if hf.model_type == "qwen3_moe":
        moe = {
            "num_experts": hf.num_experts,
            "experts_per_token": hf.num_experts_per_tok,
            "expert_ffn_size": hf.moe_intermediate_size,
            "normalized_top_k": hf.norm_topk_prob,
        }
    return ModelShape(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        num_heads=hf.num_attention_heads,
        num_groups=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        ffn_size=hf.intermediate_size,
        vocab_size=hf.vocab_size,
        max_positions=hf.max_position_embeddings,
        norm_eps=hf.rms_norm_eps,
        rope_theta=float(_rope(hf)["rope_theta"]),
        tied_embeddings=hf.tie_word_embeddings,
        **moe,
    )


def _read_config(model: Path) -> Any:
    """transformers' configuration object, which knows the defaults of fields that config.json leaves out."""
    file = model / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"model = '{model}': expected a Hugging Face directory with config.json; give the path of a "
            "downloaded Qwen3 or Qwen3-MoE model"
        )
    try:
        model_type = json.loads(file.read_text()).get("model_type")
    except ValueError as err:
        raise ConfigError(f"model = '{model}': config.json is not JSON ({err}); download it again") from err
    if model_type not in MODEL_TYPES:
        raise ConfigError(
            f"model = '{model}': model_type = '{model_type}', expected one of {', '.join(MODEL_TYPES)}, "
            "which the trainer builds; choose another model"
        )
    # The classes, not AutoConfig: that one imports half of transformers, seconds on every rank.
    from transformers import Qwen3Config, Qwen3MoeConfig

    return {"qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig}[model_type].from_pretrained(model)


def _rope(hf: Any) -> dict[str, Any]:
    """transformers 5 keeps rope_theta inside rope_parameters, 4 beside rope_scaling."""
    return getattr(hf, "rope_parameters", None) or {"rope_theta": hf.rope_theta, **(hf.rope_scaling or {})}


def _refuse_variants(model: Path, hf: Any) -> None:
    """The trainer must compute the same function as the engine; what it does not build is refused by name."""
    wanted: dict[str, tuple[Any, Any]] = {
        "attention_bias": (hf.attention_bias, False),
        "hidden_act": (hf.hidden_act, "silu"),
        "use_sliding_window": (getattr(hf, "use_sliding_window", False), False),
        "rope_type": (_rope(hf).get("rope_type", "default"), "default"),
    }
    if hf.model_type == "qwen3_moe":
        wanted["decoder_sparse_step"] = (hf.decoder_sparse_step, 1)
        wanted["mlp_only_layers"] = (list(hf.mlp_only_layers or []), [])
    for name, (found, expected) in wanted.items():
        if found != expected:
            raise ConfigError(
                f"model = '{model}': config.json has {name} = {found!r}, the trainer builds only {expected!r}; "
                "choose another model"
            )
