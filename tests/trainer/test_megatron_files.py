"""Checkpoints that Megatron-Core itself has written, from other layouts and with other names."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vespo.types import RunError
from tests.trainer.tiny import largest_gap, trainer_config

TRANSFORMER_ENGINE = {"mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight"}
"""Its layers fuse no norm with experts."""


@pytest.fixture(scope="module")
def other_moe(tiny_moe, tmp_path_factory):
    """The architecture of `tiny_moe` with other weights."""
    directory = tmp_path_factory.mktemp("other_moe")
    for file in tiny_moe.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(5)
    weights = {
        name: torch.randn(weight.shape, generator=generator)
        for name, weight in load_file(tiny_moe / "model.safetensors").items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("renamed", [{}, TRANSFORMER_ENGINE], ids=["local", "transformer engine"])
@pytest.mark.parametrize(
    ("writers", "readers"),
    [({}, {}), ({"tensor": 2, "expert": 2}, {}), ({"pipeline": 2}, {"tensor": 2, "expert": 2})],
    ids=str,
)
def test_weights_of_any_layout_arrive_in_any_other(
    pool, tiny_moe, other_moe, tmp_path, writers, readers, renamed
):
    grid = pool.grid(trainer_config(**writers), other_moe)
    written = grid.weights()
    grid.call("save_megatron", tmp_path, renamed)

    grid = pool.grid(trainer_config(**readers), tiny_moe)
    assert largest_gap(grid.weights(), written) > 1
    grid.call("load_megatron", tmp_path)

    assert largest_gap(grid.weights(), written) == 0
    assert largest_gap(grid.masters("weight"), written) == 0  # a step would begin from them


def test_a_checkpoint_of_another_architecture_is_refused(pool, tiny_moe, tiny_dense, tmp_path):
    pool.grid(trainer_config(), tiny_dense).call("save_megatron", tmp_path, {})
    grid = pool.grid(trainer_config(), tiny_moe)

    with pytest.raises(RunError, match=r"cannot be read as this model's.*; give as shape"):
        grid.call("load_megatron", tmp_path)


def test_a_directory_that_is_no_checkpoint_is_refused(pool, tiny_moe, tmp_path):
    grid = pool.grid(trainer_config(), tiny_moe)

    with pytest.raises(RunError, match="not a distributed checkpoint"):
        grid.call("load_megatron", tmp_path)
