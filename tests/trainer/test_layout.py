"""The rank grid: arithmetic by hand, refusals, and agreement with Megatron's own numbering."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from megatron_vespo.config import ConfigError, LayoutConfig
from megatron_vespo.trainer.hf_config import ModelShape, read_model_shape
from megatron_vespo.trainer.layout import (
    check_layout,
    coordinates,
    grid,
    layers_of_stage,
    nearest_valid,
    rank_name,
)
from tests.trainer.tiny import trainer_config

SHAPE = ModelShape(
    num_layers=4, hidden_size=64, num_heads=4, num_groups=2, head_dim=16, ffn_size=96, vocab_size=272,
    max_positions=256, norm_eps=1e-6, rope_theta=1e6, tied_embeddings=False,
    num_experts=8, experts_per_token=2, expert_ffn_size=32,
)  # fmt: skip
DENSE = ModelShape(**(asdict(SHAPE) | {"num_experts": 0}))


def test_tensor_is_the_fastest_axis_and_pipeline_the_slowest():
    layout = LayoutConfig(tensor=2, context=2, data=2, pipeline=2)
    # rank 13 = 8 (second stage) + 5; 5 = 1 (tp) + 2 * (0 (cp) + 2 * 1 (dp))
    at = coordinates(layout, 13)
    assert (at.tensor, at.context, at.data, at.pipeline) == (1, 0, 1, 1)


def test_the_demo_layout_puts_both_expert_ranks_into_each_tensor_pair():
    layout = LayoutConfig(tensor=2, pipeline=2, expert=2)
    assert [(c.tensor, c.pipeline, c.expert) for c in (coordinates(layout, r) for r in range(4))] == [
        (0, 0, 0), (1, 0, 1), (0, 1, 0), (1, 1, 1),
    ]  # fmt: skip


def test_a_rank_is_named_by_the_axes_that_have_several_ranks():
    assert rank_name(LayoutConfig(tensor=2, pipeline=2, expert=2), 3) == "rank 3 (tp 1, pp 1, ep 1)"
    assert rank_name(LayoutConfig(), 0) == "rank 0"


@pytest.mark.parametrize(
    "axes",
    [
        {"tensor": 2, "pipeline": 2, "expert": 2},
        {"tensor": 2, "context": 2},
        {"data": 2, "expert": 2, "pipeline": 2},
        {"data": 4, "expert": 2},
    ],
    ids=str,
)
def test_coordinates_are_those_of_megatron(pool, tiny_moe, axes):
    cfg = trainer_config(**axes)
    theirs = pool.grid(cfg, tiny_moe).call("coordinates")
    assert theirs == [asdict(coordinates(cfg.layout, rank)) for rank in range(cfg.layout.world_size)]


def test_stages_hold_equal_runs_of_layers():
    assert [list(layers_of_stage(LayoutConfig(pipeline=2), SHAPE, stage)) for stage in range(2)] == [
        [0, 1],
        [2, 3],
    ]


def test_the_printed_grid_names_layers_and_experts_of_each_rank():
    lines = grid(LayoutConfig(tensor=2, pipeline=2, expert=2), SHAPE).splitlines()
    assert lines[0].startswith("4 rank(s) = tensor 2 x context 1 x data 1 x pipeline 2")
    assert lines[-1].split() == ["3", "1", "0", "0", "1", "1", "0", "2-3", "4-7"]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"tensor": 3}, r"trainer\.layout\.tensor = 3: must divide the 4 attention heads; nearest valid: data = 3 or"),
        ({"tensor": 4}, r"trainer\.layout\.tensor = 4: must divide the 2 key/value heads; nearest valid: tensor = 2, data = 2 or"),
        ({"pipeline": 3}, r"pipeline \* virtual_pipeline = 3: must divide the 4 layers; nearest valid: data = 3 or"),
        ({"expert": 3, "data": 3}, r"trainer\.layout\.expert = 3: must divide the 8 experts; nearest valid: data = 3"),
        ({"expert": 4, "data": 2}, r"expert = 4, expert_tensor = 1: their product must divide tensor \* context \* data = 2, .* nearest valid: data = 2, expert = 2"),
        ({"expert": 2, "tensor": 2, "expert_tensor": 2}, r"expert = 2, expert_tensor = 2: their product must divide .* nearest valid: tensor = 2, expert = 2"),
        ({"virtual_pipeline": 2}, r"trainer\.layout\.virtual_pipeline = 2: interleaves pipeline stages, and pipeline = 1; nearest valid: one rank"),
        ({"pipeline": 2, "virtual_pipeline": 4}, r"pipeline \* virtual_pipeline = 8: must divide the 4 layers; nearest valid: pipeline = 2, virtual_pipeline = 2"),
        ({"pipeline": 2, "first_stage_layers": 3, "last_stage_layers": 2}, r"the stages must hold 4 layers together, .* and would hold \[3, 2\]"),
        ({"first_stage_layers": 1}, r"first_stage_layers, last_stage_layers: need several stages"),
        ({"tensor": 7}, r"tensor = 7: must divide the 4 attention heads; nearest valid: data = 7"),
    ],
    ids=lambda x: str(x)[:40],
)  # fmt: skip
def test_a_grid_that_does_not_divide_the_model_is_refused_with_what_would(axes, message):
    with pytest.raises(ConfigError, match=message):
        check_layout(LayoutConfig(**axes), SHAPE)


def test_every_grid_that_is_named_is_valid_and_has_as_many_ranks():
    asked = LayoutConfig(tensor=4, pipeline=3, data=4, expert=16)
    found = nearest_valid(asked, SHAPE)
    assert len(found) == 3
    for other in found:
        assert other.world_size == asked.world_size
        check_layout(other, SHAPE)


@pytest.mark.parametrize(
    ("axes", "stages"),
    [
        ({"pipeline": 2, "virtual_pipeline": 2}, [[0, 2], [1, 3]]),
        ({"pipeline": 2, "first_stage_layers": 1}, [[0], [1, 2, 3]]),
        ({"pipeline": 3, "last_stage_layers": 2}, [[0], [1], [2, 3]]),
        ({"pipeline": 2, "first_stage_layers": 1, "last_stage_layers": 3}, [[0], [1, 2, 3]]),
    ],
    ids=str,
)
def test_chunks_are_dealt_out_in_turn_and_stages_may_be_uneven(axes, stages):
    layout = LayoutConfig(**axes)
    check_layout(layout, SHAPE)
    assert [layers_of_stage(layout, SHAPE, stage) for stage in range(layout.pipeline)] == stages


def test_experts_of_a_dense_model_are_refused():
    with pytest.raises(ConfigError, match="the model is dense"):
        check_layout(LayoutConfig(expert=2, data=2), DENSE)


def test_valid_grids_pass():
    for axes in (
        {},
        {"tensor": 2, "pipeline": 4, "expert": 2},
        {"data": 8, "expert": 8},
        {"tensor": 2, "context": 2, "expert": 4},
    ):
        check_layout(LayoutConfig(**axes), SHAPE)


def test_the_wrong_number_of_ranks_is_refused(pool, tiny_moe):
    from megatron_vespo.trainer.layout import Place, init_process_groups

    place = Place(rank=0, world_size=3, master_addr="127.0.0.1", master_port=1)
    with pytest.raises(ConfigError, match="world size = 3: the layout is a grid of 4 ranks"):
        init_process_groups(LayoutConfig(tensor=2, data=2), place, device="cpu", timeout_s=1)


def test_the_shape_is_read_from_config_json(tiny_moe, tiny_dense):
    moe, dense = read_model_shape(tiny_moe), read_model_shape(tiny_dense)
    assert moe == SHAPE
    assert (dense.num_experts, dense.tied_embeddings, dense.ffn_size) == (0, True, 96)
