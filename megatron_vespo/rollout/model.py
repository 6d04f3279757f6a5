"""What a Hugging Face directory says about the model that an engine serves.

Every answer of the engine is checked against these facts: it reports experts without their shape, and it drops
pushed weights whose names it does not know.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from tokenizers import Tokenizer

from megatron_vespo.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The shape of the engine's answers."""

    vocab_size: int
    max_positions: int
    num_layers: int
    """Of the transformer, with and without a router."""
    router_layers: tuple[int, ...]
    """Indices of the layers that route; empty for a dense model."""
    num_experts: int
    experts_per_token: int
    stop_token_ids: tuple[int, ...]
    """Sampling one of these ends a response."""

    @property
    def is_moe(self) -> bool:
        return bool(self.router_layers)


def read_facts(model: Path) -> ModelFacts:
    """Read config.json, generation_config.json and the tokenizer of a Hugging Face directory.

    Raises:
        ConfigError: a file is missing or no end-of-turn token is named anywhere.
    """
    config = _read_json(model, "config.json")
    return ModelFacts(
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        num_layers=config["num_hidden_layers"],
        router_layers=_router_layers(config),
        num_experts=_num_experts(config),
        experts_per_token=config.get("num_experts_per_tok") or 0,
        stop_token_ids=_stop_token_ids(model, config),
    )


def read_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the directory's safetensors files.

    Raises:
        ConfigError: there is no safetensors file.
    """
    shapes = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    if not shapes:
        raise ConfigError(
            f"model = '{model}': no *.safetensors file there; give a complete Hugging Face directory"
        )
    return shapes


def ties_embeddings(model: Path) -> bool:
    """Whether the output head is the input embedding, so that `lm_head.weight` need not exist."""
    return bool(_read_json(model, "config.json").get("tie_word_embeddings"))


def _read_json(model: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((model / name).read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"model = '{model}': no {name} there; give a complete Hugging Face directory"
        ) from None
    except json.JSONDecodeError as err:
        raise ConfigError(
            f"model = '{model}': {name} is not JSON ({err}); write the directory again"
        ) from err


def _num_experts(config: dict[str, Any]) -> int:
    # transformers 5 writes num_local_experts where 4 wrote num_experts
    return config.get("num_experts") or config.get("num_local_experts") or 0


def _router_layers(config: dict[str, Any]) -> tuple[int, ...]:
    """Qwen3-MoE's rule: every `decoder_sparse_step`-th layer, except `mlp_only_layers`."""
    if not _num_experts(config):
        return ()
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    return tuple(i for i in range(config["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0)


def _stop_token_ids(model: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """Every end-of-turn id that generation_config.json, config.json or the tokenizer names."""
    named: set[int] = set()
    generation = (
        _read_json(model, "generation_config.json") if (model / "generation_config.json").exists() else {}
    )
    for source in (generation, config):
        ids = source.get("eos_token_id")
        named |= {ids} if isinstance(ids, int) else set(ids or ())
    token = _read_json(model, "tokenizer_config.json").get("eos_token")
    if not (model / "tokenizer.json").exists():
        raise ConfigError(
            f"model = '{model}': no tokenizer.json there; give a complete Hugging Face directory"
        )
    if token:
        content = token["content"] if isinstance(token, dict) else token
        token_id = Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id(content)
        named |= {token_id} if token_id is not None else set()
    if not named:
        raise ConfigError(
            f"model = '{model}': no eos_token_id in generation_config.json or config.json and no eos_token in "
            "tokenizer_config.json, so no response could end; set one of them"
        )
    return tuple(sorted(named))
