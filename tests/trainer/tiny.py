"""Tiny Hugging Face models, configurations and batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_vespo.config import AlgorithmConfig, LayoutConfig, OptimizerConfig, TrainerConfig
from megatron_vespo.types import TrainSequence
from tests.trainer.ranks import Pool

VOCAB = 272
VESPO = AlgorithmConfig(name="vespo")


def largest_gap(a: dict, b: dict) -> float:
    """Between two sets of tensors with the same names."""
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


def trainer_config(*, max_tokens=512, optimizer=None, **layout) -> TrainerConfig:
    return TrainerConfig(
        device="cpu",
        dtype="float32",
        layout=LayoutConfig(**layout),
        # An eps of the size of gradients keeps Adam's first steps from amplifying their noise.
        optimizer=OptimizerConfig(
            **({"learning_rate": 1e-3, "eps": 1e-2, "distributed": False} | (optimizer or {}))
        ),
        max_tokens_per_microbatch=max_tokens,
        logprob_chunk_tokens=16,
        collective_timeout_s=60,
    )


def make_batch(num=6, seed=0, behavior_noise: float | None = None) -> list[TrainSequence]:
    """Ragged sequences of 8 to 30 tokens, prompts of 3 to 6; behavior log-probs near log(1 / vocab)."""
    rng = np.random.default_rng(seed)
    batch = []
    for i in range(num):
        length, num_prompt = int(rng.integers(8, 31)), int(rng.integers(3, 7))
        behavior = None
        if behavior_noise is not None:
            behavior = (-np.log(VOCAB) + behavior_noise * rng.standard_normal(length - num_prompt)).astype(
                np.float32
            )
        batch.append(
            TrainSequence(
                uid=f"prompt-{i}",
                token_ids=rng.integers(0, VOCAB, length).astype(np.int32),
                num_prompt_tokens=num_prompt,
                advantage=float(rng.standard_normal()),
                behavior_logp=behavior,
            )
        )
    return batch


def make_moderate_batch(pool: Pool, model: Path) -> list[TrainSequence]:
    """Six sequences whose log W lie within 1 nat of 0, so that no gradient is small; an environment wrote a part of four.

    Their masks hide, in turn: nothing, one stretch, the beginning, the end, nearly everything, nothing.
    """
    batch, noise = make_batch(6), np.random.default_rng(0)
    scored = pool.grid(trainer_config(), model).score(batch)
    hidden = {1: slice(3, 14), 2: slice(0, 2), 3: slice(-4, None), 4: slice(1, None)}
    moderate = []
    for i, (s, x) in enumerate(zip(batch, scored, strict=True)):
        behavior = x.logp + 0.1 * noise.standard_normal(len(x.logp)).astype(np.float32)
        sampled = None
        if i in hidden:
            sampled = np.ones(len(behavior), np.bool_)
            sampled[hidden[i]] = False
            behavior[~sampled] = 0.0
        moderate.append(replace(s, behavior_logp=behavior, sampled=sampled))
    return moderate


def trained(s: TrainSequence) -> np.ndarray:
    """[T] which response tokens carry loss."""
    return np.ones(s.num_response_tokens, np.bool_) if s.sampled is None else s.sampled


def write_model(directory, *, moe, tie_word_embeddings, llama=False):
    import torch
    import transformers as hf

    sizes = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "rope_theta": 1e6,
        "tie_word_embeddings": tie_word_embeddings, "initializer_range": 0.1,
    }  # fmt: skip
    experts = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    }
    rope = {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 32.0, "low_freq_factor": 1.5, "high_freq_factor": 5.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(1)
    if moe:
        model = hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**sizes, **experts))
    elif llama:
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**(sizes | {"rope_theta": 1e4, "rope_parameters": rope})))
    else:
        model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**sizes))
    model.save_pretrained(directory)
    (directory / "tokenizer_config.json").write_text("{}\n")
    return directory
