"""Checkpoints: a resumed run is the run that never stopped, and nothing else is resumed."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from conftest import make_batch, trainer_config

from megatron_vespo.trainer import checkpoint
from megatron_vespo.types import RunError


@pytest.mark.parametrize(
    ("axes", "update"),
    [
        ({"tensor": 2, "pipeline": 2, "expert": 2, "optimizer": {"distributed": True}}, {}),
        ({"data": 2, "expert": 2, "optimizer": {"distributed": True}}, {"dtype": "bfloat16"}),
        ({}, {}),
        ({"data": 2, "expert": 2}, {"dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_a_resumed_run_continues_bit_for_bit(pool, tiny_moe, tmp_path, axes, update):
    cfg = trainer_config(**axes).model_copy(update=update)
    batches = [make_batch(4, seed=i) for i in range(4)]
    grid = pool.grid(cfg, tiny_moe)
    for i in (0, 1):
        grid.step(batches[i], i)
    grid.call("save", tmp_path / "step-2", 2, {"prompts": {"epoch": 1}})
    uninterrupted = [grid.step(batches[i], i).loss for i in (2, 3)]

    grid = pool.grid(cfg, tiny_moe)
    assert grid.call("load", tmp_path / "step-2")[0] == (2, {"prompts": {"epoch": 1}})
    resumed = [grid.step(batches[i], i).loss for i in (2, 3)]
    assert resumed == uninterrupted
    assert checkpoint.read_state(tmp_path / "step-2") == (2, {"prompts": {"epoch": 1}})


@pytest.fixture
def saved(pool, tiny_moe, tmp_path):
    cfg = trainer_config(data=2, expert=2)
    grid = pool.grid(cfg, tiny_moe)
    grid.call("save", tmp_path / "step-1", 1, {})
    return grid, tmp_path / "step-1"


def test_damage_is_refused_on_every_rank_and_loads_nothing(saved):
    grid, directory = saved
    file = directory / "rank-00001.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunError, match=r"rank-00001\.pt': is missing or damaged"):
        grid.call("load", directory)
    file.unlink()
    with pytest.raises(RunError, match=r"rank-00001\.pt': is missing or damaged \(found None"):
        grid.call("load", directory)
    (directory / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"cannot read manifest\.json"):
        grid.call("load", directory)
    assert np.isfinite(grid.step(make_batch(2)).loss)  # the ranks are still in step with one another


def test_another_layout_model_or_optimizer_is_refused_by_name(pool, tiny_moe, tiny_dense, saved):
    _, directory = saved
    for cfg, model, message in (
        (trainer_config(tensor=2), tiny_moe, r"layout\.tensor = 1, this run has 2"),
        (trainer_config(data=2, expert=1), tiny_moe, r"layout\.expert = 2, this run has 1"),
        (trainer_config(data=2), tiny_dense, r"this run has"),
        (
            trainer_config(data=2, expert=2, optimizer={"distributed": True}),
            tiny_moe,
            r"numerics\.distributed_optimizer = False",
        ),
    ):
        with pytest.raises(RunError, match=message):
            pool.grid(cfg, model).call("load", directory)


def test_a_checkpoint_is_never_overwritten(saved):
    grid, directory = saved
    with pytest.raises(RunError, match="exists already; a checkpoint is never overwritten"):
        grid.call("save", directory, 1, {})


def test_latest_sees_complete_checkpoints_alone_and_prune_keeps_the_newest(tmp_path):
    for step in (2, 10, 9):
        directory = tmp_path / f"step-{step}"
        directory.mkdir()
        (directory / "manifest.json").write_text(json.dumps({"step": step, "state": {}}))
    (tmp_path / "step-11.tmp").mkdir()
    shutil.copy(tmp_path / "step-2" / "manifest.json", tmp_path / "step-11.tmp")
    (tmp_path / "step-12").mkdir()  # no manifest: not a checkpoint
    assert checkpoint.latest(tmp_path).name == "step-10"
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(d.name for d in tmp_path.iterdir()) == ["step-10", "step-12", "step-9"]
    assert checkpoint.latest(tmp_path / "none") is None
