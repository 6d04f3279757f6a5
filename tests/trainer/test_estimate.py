"""The estimate against numbers from elsewhere: model cards, hand counts, and what real ranks hold."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vespo.config import LayoutConfig, OptimizerConfig, TrainerConfig
from megatron_vespo.trainer import estimate, hf_weights
from megatron_vespo.trainer.estimate import Workload, estimate_memory, stage_parameters
from megatron_vespo.trainer.hf_config import ModelShape
from megatron_vespo.trainer.layout import check_layout
from megatron_vespo.trainer.step_time import GPUS, Machines, bandwidth, estimate_time, model_flops

QWEN3_30B = ModelShape(
    num_layers=48, hidden_size=2048, num_heads=32, num_groups=4, head_dim=128, ffn_size=6144, vocab_size=151936,
    max_positions=40960, norm_eps=1e-6, rope_theta=1e6, tied_embeddings=False,
    num_experts=128, experts_per_token=8, expert_ffn_size=768,
)  # fmt: skip
QWEN3_235B = dataclasses.replace(
    QWEN3_30B, num_layers=94, hidden_size=4096, num_heads=64, ffn_size=12288, expert_ffn_size=1536
)
DENSE = dataclasses.replace(
    QWEN3_30B, num_experts=0, experts_per_token=0, expert_ffn_size=0, tied_embeddings=True
)
WORK = Workload(num_sequences=512, max_tokens=8192, mean_tokens=4096, mean_response_tokens=3072)
GRIDS = (
    LayoutConfig(),
    LayoutConfig(tensor=2, data=4, expert=8),
    LayoutConfig(tensor=4, pipeline=4, data=2, expert=4, expert_tensor=2),
    LayoutConfig(tensor=2, context=2, pipeline=2, virtual_pipeline=3, data=2, expert=2),
    LayoutConfig(pipeline=4, first_stage_layers=9, last_stage_layers=9, data=2, expert=2),
)


def trainer(layout: LayoutConfig | None = None, *, optimizer=None, **fields) -> TrainerConfig:
    return TrainerConfig(
        layout=layout or LayoutConfig(),
        optimizer=OptimizerConfig(learning_rate=1e-6, **(optimizer or {})),
        **fields,
    )


def peak(cfg: TrainerConfig, shape=QWEN3_30B, work=WORK) -> float:
    return max(rank.peak for rank in estimate_memory(shape, cfg, work))


# ----------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("shape", "total", "active"),
    [(QWEN3_30B, 30_532_122_624, 3.35e9), (QWEN3_235B, 235_093_634_560, 22.2e9)],
    ids=["30B-A3B", "235B-A22B"],
)
def test_the_published_models_have_as_many_parameters_as_their_checkpoints(shape, total, active):
    assert stage_parameters(shape, LayoutConfig(), 0).total == shape.num_parameters == total
    assert shape.active_parameters == pytest.approx(active, rel=0.005)


def test_transformers_counts_the_same():
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = dataclasses.replace(QWEN3_30B, num_layers=2)
    config = Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    assert stage_parameters(shape, LayoutConfig(), 0).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("layout", GRIDS, ids=str)
def test_the_parts_of_a_grid_make_the_whole_model(layout):
    check_layout(layout, QWEN3_30B)
    held = [stage_parameters(QWEN3_30B, layout, stage) for stage in range(layout.pipeline)]
    divided = layout.tensor * sum(p.divided for p in held)
    experts = layout.expert * layout.resolved_expert_tensor * sum(p.expert for p in held)
    assert divided + experts + sum(p.replicated for p in held) == QWEN3_30B.num_parameters


def test_a_tied_head_on_another_stage_is_a_copy():
    one, two = LayoutConfig(), LayoutConfig(pipeline=2)
    vocabulary = DENSE.vocab_size * DENSE.hidden_size
    together = sum(stage_parameters(DENSE, two, stage).total for stage in range(2))
    assert together - stage_parameters(DENSE, one, 0).total == vocabulary


# -------------------------------------------------------------------------------------- gradients, optimizer


def test_one_bfloat16_rank_holds_18_bytes_for_each_parameter():
    (rank,) = estimate_memory(QWEN3_30B, trainer(), WORK)
    assert rank.weights + rank.gradients + rank.optimizer == 18 * QWEN3_30B.num_parameters


def test_the_distributed_optimizer_divides_experts_over_fewer_ranks():
    layout = LayoutConfig(tensor=2, data=8, expert=8)  # 16 ranks: dense state over 8, that of experts over 2
    (rank,) = estimate_memory(QWEN3_30B, trainer(layout), WORK)
    held = rank.parameters
    assert rank.optimizer == pytest.approx(12 * held.dense / 8 + 12 * held.expert / 2)
    (whole,) = estimate_memory(QWEN3_30B, trainer(layout, optimizer={"distributed": False}), WORK)
    assert whole.optimizer == 12 * held.total


def test_a_frozen_router_has_neither_gradient_nor_optimizer_state():
    (free,), (frozen,) = (
        estimate_memory(QWEN3_30B, trainer(freeze_router=frozen), WORK) for frozen in (False, True)
    )
    routers = 48 * 128 * 2048
    assert free.weights == frozen.weights
    assert free.gradients - frozen.gradients == 4 * routers
    assert free.optimizer - frozen.optimizer == 12 * routers


def test_what_is_offloaded_or_referred_to_lies_in_host_memory():
    (before,) = estimate_memory(QWEN3_30B, trainer(), WORK)
    offloading = trainer(optimizer={"cpu_offload": 0.5})
    (after,) = estimate_memory(QWEN3_30B, offloading, dataclasses.replace(WORK, has_reference=True))
    snapshot = 2**39  # the next power of two above 12 bytes of 30.5 billion parameters
    assert before.host == snapshot
    assert after.optimizer == pytest.approx(before.optimizer * (1 - 0.5 * 8 / 12))  # main weights stay
    assert after.host == snapshot + before.optimizer / 2 + 2 * before.weights


# ---------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize(
    ("layout", "stage", "num_microbatches", "expected"),
    [
        (LayoutConfig(), 0, 8, 1),
        (LayoutConfig(pipeline=4), 0, 8, 4),
        (LayoutConfig(pipeline=4), 3, 8, 1),
        (LayoutConfig(pipeline=4), 0, 2, 2),
        # Two chunks: 6 warm-up passes + 4 of the first chunk + 1, each over half of the layers.
        (LayoutConfig(pipeline=4, virtual_pipeline=2), 0, 8, 5.5),
        (LayoutConfig(pipeline=4, virtual_pipeline=2), 3, 8, 2.5),
        (LayoutConfig(pipeline=4, virtual_pipeline=2), 0, 4, 4),
    ],
    ids=str,
)
def test_the_schedule_has_so_many_microbatches_in_flight(layout, stage, num_microbatches, expected):
    assert estimate.microbatches_in_flight(layout, stage, num_microbatches) == expected


def test_a_dense_layer_keeps_what_a_hand_count_says():
    # Fused norms, bfloat16, one rank, a token: 2 inputs and 2 outputs of norms (4 h); q + 2 kv; q before its norm; q, k
    # turned; 4 head_dim of rotary tables; attention's output; gate, up and, where one kernel makes it, their product
    # (3 f); then float32 1 / rms of 2 norms and of each head of q and k, and a log-sum-exp of each head of q.
    h, q, kv, d, f = 2048, 32 * 128, 4 * 128, 128, 6144
    expected = 2 * (4 * h + (q + 2 * kv) + q + (q + kv) + 4 * d + q + 3 * f) + 4 * (2 + 32 + 4 + 32)
    cfg = trainer(megatron={"bias_activation_fusion": True})
    layer = estimate.layer_activations(DENSE, cfg, 1000)
    assert layer.kept("none") == 1000 * expected


def test_full_recomputation_keeps_a_layers_input_and_one_layer():
    cfg = trainer(recompute="full")
    (rank,) = estimate_memory(QWEN3_30B, cfg, WORK)
    tokens = cfg.max_tokens_per_microbatch
    layer = estimate.layer_activations(QWEN3_30B, cfg, tokens)
    assert rank.activations == pytest.approx(48 * tokens * 2048 * 2 + layer.kept("none") + 8 * tokens)


def test_each_kind_of_recomputation_keeps_less_than_the_one_before():
    kept = [peak(trainer(recompute=kind)) for kind in ("none", "selective", "full")]
    assert kept == sorted(kept, reverse=True)


def test_microbatches_of_a_small_batch_are_no_larger_than_the_batch():
    work = dataclasses.replace(WORK, num_sequences=1, max_tokens=1000, mean_tokens=1000)
    assert estimate.largest_microbatch(trainer(), work) == 1000


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_dividing_more_never_costs_memory(recompute):
    def at(**axes) -> float:
        return peak(trainer(LayoutConfig(**axes), recompute=recompute))

    assert at(data=8, expert=8) < at(data=8, expert=4) < at(data=8, expert=2) < at(data=8)
    assert at(tensor=4, data=2, expert=8) < at(tensor=2, data=4, expert=8) < at(data=8, expert=8)
    assert at(context=2, data=4, expert=8) < at(data=8, expert=8)
    assert at(data=16, expert=8) < at(data=8, expert=8)


def test_the_export_block_is_that_of_the_export():
    assert estimate.EXPORT_BLOCK_BYTES == hf_weights.BLOCK_BYTES


# ----------------------------------------------------------------------------------------------------- time


H100 = Machines(gpu=GPUS["h100-80gb"])


def test_model_flops_are_six_for_each_active_parameter_and_token_and_attention():
    work = Workload(num_sequences=10, max_tokens=1000, mean_tokens=1000, mean_response_tokens=1000)
    norms = 48 * (2 * 2048 + 2 * 128) + 2048
    matrices = (
        QWEN3_30B.active_parameters - 151936 * 2048 - norms
    )  # the embedding is looked up, not multiplied
    attention = 3 * 48 * 2 * 1000 * 4096
    assert model_flops(QWEN3_30B, work) == 10_000 * (6 * matrices + attention)


def test_the_bubble_is_stages_less_one_over_microbatches_and_chunks():
    layout = LayoutConfig(pipeline=4, virtual_pipeline=3, data=2, expert=2)
    time = estimate_time(QWEN3_30B, trainer(layout), WORK, H100)
    compute = sum(seconds for name, seconds in time.parts.items() if name.startswith("compute"))
    # 512 sequences over 2 ranks, 4 of the mean length in a microbatch
    assert time.num_microbatches == 64
    assert time.parts["pipeline bubble"] == pytest.approx(compute * 3 / (64 * 3))


def test_a_collective_beyond_the_node_uses_the_network():
    gpu, share = H100.gpu, 0.7
    assert bandwidth(H100, 1, 8) == gpu.link_bytes_s * share
    assert bandwidth(H100, 8, 4) == gpu.network_bytes_s * share  # one member in each node
    assert bandwidth(H100, 2, 16) == 4 * gpu.network_bytes_s * share  # four in each


def test_experts_over_two_nodes_wait_for_the_network():
    near, far = (
        estimate_time(QWEN3_30B, trainer(LayoutConfig(data=16, expert=expert)), WORK, H100).parts
        for expert in (8, 16)
    )
    assert far["expert messages"] > near["expert messages"]


def test_the_utilization_is_that_of_the_whole_time():
    time = estimate_time(QWEN3_30B, trainer(LayoutConfig(data=8, expert=8)), WORK, H100)
    assert time.mfu == pytest.approx(time.model_flops / (8 * 989e12 * time.total))
    assert time.mfu < 0.35
    assert time.dominant in time.parts


def test_only_exposed_gradients_take_time():
    layout = LayoutConfig(data=8, expert=8)
    shown, hidden = (
        estimate_time(QWEN3_30B, trainer(layout, optimizer={"overlap": overlap}), WORK, H100).parts
        for overlap in (False, True)
    )
    assert shown["gradient reduction"] > 0
    assert "gradient reduction" not in hidden


# --------------------------------------------------------------------------------------------- real ranks


def test_real_ranks_hold_what_was_estimated():
    """Weights, gradients and optimizer state to 0.1 %, what autograd keeps to 1 %."""
    script = Path(__file__).parents[2] / "benchmarks" / "plan.py"
    cases = ["dense, 1 rank, fp32", "even moe, TP2xPP2xEP2, bf16, full recompute"]
    table = subprocess.run(
        [sys.executable, str(script), "--only", *cases], check=True, capture_output=True, text=True
    ).stdout
    rows = [re.findall(r"([+-]\d+\.\d+)%", line) for line in table.splitlines()]
    errors = [[abs(float(error)) for error in row] for row in rows if len(row) == 4]
    assert len(errors) == 3, table
    for weights, gradients, optimizer, activations in errors:
        assert max(weights, gradients, optimizer) <= 0.1, table
        assert activations <= 1, table
