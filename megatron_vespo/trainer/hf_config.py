"""The shape of a Hugging Face model: what `config.json` says, as far as the trainer can build it."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_vespo.config import ConfigError

ARCHITECTURES = {
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM (Llama-3, 3.1, 3.2)",
}
"""What the trainer builds, by config.json's model_type."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama-3.1's stretched rotary frequencies ("llama3"); the names are those of Megatron and of config.json.

    With w = 2 pi / frequency and L = original_max_position_embeddings: a frequency is kept where
    w < L / high_freq_factor, divided by `factor` where w > L / low_freq_factor, and blended in between.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes and switches of one Qwen3-MoE, Qwen3 or Llama-3 model."""

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
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool
    qk_norm: bool = True
    """Whether queries and keys are normalized per head: Qwen3's are, Llama's are not."""
    num_experts: int = 0
    """0 for a dense model."""
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    normalized_top_k: bool = True
    """Whether the chosen experts' weights sum to 1."""

    @property
    def family(self) -> str:
        """config.json's model_type, which follows from what a layer has."""
        if self.num_experts:
            return "qwen3_moe"
        return "qwen3" if self.qk_norm else "llama"

    @property
    def num_parameters(self) -> int:
        """All of them; a tied embedding counts once."""
        return self._count(self.num_experts)

    @property
    def active_parameters(self) -> int:
        """Those that one token meets: only the chosen experts of each layer."""
        return self._count(self.experts_per_token)

    def _count(self, experts: int) -> int:
        h = self.hidden_size
        attention = 2 * h * self.head_dim * (self.num_heads + self.num_groups)
        norms = 2 * h + (2 * self.head_dim if self.qk_norm else 0)
        mlp = 3 * h * self.ffn_size
        if self.num_experts:
            mlp = self.num_experts * h + experts * 3 * h * self.expert_ffn_size
        vocab = self.vocab_size * h * (1 if self.tied_embeddings else 2)
        return self.num_layers * (attention + norms + mlp) + vocab + h


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
    shape = ModelShape(
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
        rope_scaling=_rope_scaling(_rope(hf)),
        tied_embeddings=hf.tie_word_embeddings,
        qk_norm=hf.model_type != "llama",
        **moe,
    )
    _refuse_impossible(model, shape)
    return shape


def _read_config(model: Path) -> Any:
    """transformers' configuration object, which knows the defaults of fields that config.json leaves out."""
    file = model / "config.json"
    supported = ", ".join(f"{kind} ({name})" for kind, name in ARCHITECTURES.items())
    if not file.is_file():
        raise ConfigError(
            f"model = '{model}': expected a Hugging Face directory with config.json; give the path of a "
            f"downloaded model of one of {supported}"
        )
    try:
        config = json.loads(file.read_text())
    except ValueError as err:
        raise ConfigError(f"model = '{model}': config.json is not JSON ({err}); download it again") from err
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type not in ARCHITECTURES:
        raise ConfigError(
            f"model = '{model}': model_type = '{model_type}', expected one of {supported}, which the trainer "
            "builds; choose another model"
        )
    # The classes, not AutoConfig: that one imports half of transformers, seconds on every rank.
    from huggingface_hub.errors import StrictDataclassError
    from transformers import LlamaConfig, Qwen3Config, Qwen3MoeConfig

    classes = {"llama": LlamaConfig, "qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig}
    try:
        return classes[model_type].from_pretrained(model)
    except (StrictDataclassError, ArithmeticError, KeyError, TypeError, ValueError) as err:
        reason = " ".join(str(err).split())
        raise ConfigError(
            f"model = '{model}': transformers cannot read config.json ({reason}); mend it, or download it again"
        ) from err


def _rope(hf: Any) -> dict[str, Any]:
    """transformers 5 keeps rope_theta inside rope_parameters, 4 beside rope_scaling."""
    return getattr(hf, "rope_parameters", None) or {"rope_theta": hf.rope_theta, **(hf.rope_scaling or {})}


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    if rope.get("rope_type", "default") == "default":
        return None
    return RopeScaling(**{field.name: rope[field.name] for field in fields(RopeScaling)})


def _refuse_variants(model: Path, hf: Any) -> None:
    """The trainer must compute the same function as the engine; what it does not build is refused by name."""
    full = {"full_attention"}
    wanted: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "attention_bias": (hf.attention_bias, (False,)),
        "mlp_bias": (getattr(hf, "mlp_bias", False), (False,)),
        "hidden_act": (hf.hidden_act, ("silu",)),
        "use_sliding_window": (getattr(hf, "use_sliding_window", False), (False,)),
        "layer_types": (sorted(set(getattr(hf, "layer_types", None) or full) - full), ([],)),
        "rope_type": (_rope(hf).get("rope_type", "default"), ("default", "llama3")),
        "partial_rotary_factor": (_rope(hf).get("partial_rotary_factor", 1.0), (1.0,)),
        "quantization_config": (getattr(hf, "quantization_config", None), (None,)),
    }
    if hf.model_type == "qwen3_moe":
        wanted["decoder_sparse_step"] = (hf.decoder_sparse_step, (1,))
        wanted["mlp_only_layers"] = (list(hf.mlp_only_layers or []), ([],))
    for name, (found, built) in wanted.items():
        if found not in built:
            raise ConfigError(
                f"model = '{model}': config.json has {name} = {found!r}, the trainer builds only "
                f"{' or '.join(map(repr, built))}; choose another model"
            )


def _refuse_impossible(model: Path, shape: ModelShape) -> None:
    """transformers has checked the types; numbers that would fail far from here are refused."""
    least_one = ["num_layers", "hidden_size", "num_heads", "num_groups", "head_dim", "vocab_size"]
    least_one += ["experts_per_token", "expert_ffn_size"] if shape.num_experts else ["ffn_size"]
    problems = [f"{name} = {getattr(shape, name)}" for name in least_one if getattr(shape, name) < 1]
    if not problems and shape.num_heads % shape.num_groups:
        problems = [f"{shape.num_heads} attention heads over {shape.num_groups} key/value heads"]
    if shape.experts_per_token > shape.num_experts:
        problems.append(f"{shape.experts_per_token} of {shape.num_experts} experts per token")
    if problems:
        raise ConfigError(
            f"model = '{model}': config.json implies {', '.join(problems)}, which no model can have; download it again"
        )
