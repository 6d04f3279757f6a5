"""Hugging Face directories in and out: bitwise round trip on every layout, clear refusals."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from conftest import trainer_config
from safetensors.numpy import load_file, save_file

from megatron_vespo.config import ConfigError
from megatron_vespo.types import RunError


@pytest.mark.parametrize(
    ("kind", "axes"),
    [
        ("tiny_moe", {"tensor": 2, "pipeline": 2, "expert": 2}),
        ("tiny_moe", {"data": 4, "expert": 2}),
        ("tiny_moe", {"tensor": 2}),  # experts divided over tensor ranks
        ("tiny_dense", {"tensor": 2, "pipeline": 2}),  # tied embedding on both stages
        ("tiny_dense", {"tensor": 2, "context": 2}),
    ],
    ids=str,
)
def test_what_is_loaded_is_saved_bit_for_bit(pool, request, tmp_path, kind, axes):
    source = request.getfixturevalue(kind)
    pool.grid(trainer_config(**axes), source).call("save_hf", tmp_path / "out")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_the_saved_directory_loads_in_transformers(pool, tiny_moe, tmp_path):
    from transformers import AutoModelForCausalLM

    pool.grid(trainer_config(pipeline=2), tiny_moe).call("save_hf", tmp_path / "out")
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_export_yields_the_same_order_whatever_the_layout_and_only_on_rank_0(pool, tiny_moe):
    names = []
    for axes in ({}, {"tensor": 2, "pipeline": 2, "expert": 2}, {"data": 2, "expert": 2}):
        first, *others = pool.grid(trainer_config(**axes), tiny_moe).call("weights")
        names.append(list(first))
        assert not any(others)
    assert names[0] == names[1] == names[2]
    assert names[0][0] == "model.embed_tokens.weight" and names[0][-2:] == [
        "model.norm.weight",
        "lm_head.weight",
    ]


def test_an_existing_directory_is_never_overwritten(pool, tiny_moe, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(RunError, match="exists already and is never overwritten"):
        pool.grid(trainer_config(tensor=2), tiny_moe).call("save_hf", tmp_path / "out")


def test_sharded_checkpoints_are_read_through_their_index(pool, tiny_moe, tmp_path):
    weights = load_file(tiny_moe / "model.safetensors")
    names = sorted(weights)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(tiny_moe / "config.json", tmp_path)
    loaded = pool.grid(trainer_config(tensor=2), tmp_path).weights()
    assert all(np.array_equal(loaded[name], weights[name]) for name in weights)


def broken(source, target, change):
    shutil.copy(source / "config.json", target)
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors")
    return target


def without_one(weights):
    del weights["model.layers.2.mlp.experts.5.up_proj.weight"]


def with_a_wrong_shape(weights):
    weights["model.layers.1.self_attn.o_proj.weight"] = np.zeros((64, 32), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_one, r"no tensor 'model\.layers\.2\.mlp\.experts\.5\.up_proj\.weight' in its safetensors"),
        (
            with_a_wrong_shape,
            r"model\.layers\.1\.self_attn\.o_proj\.weight of \[\[64, 32\]\] on rank 0; config\.json implies \[64, 64\]",
        ),
    ],
)
def test_missing_or_misshapen_tensors_are_named(pool, tiny_moe, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        pool.grid(trainer_config(), broken(tiny_moe, tmp_path, change))


def test_missing_and_damaged_files_are_refused(pool, tiny_moe, tmp_path):
    shutil.copy(tiny_moe / "config.json", tmp_path)
    with pytest.raises(ConfigError, match=r"expected model\.safetensors or model\.safetensors\.index\.json"):
        pool.grid(trainer_config(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tiny_moe / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ConfigError, match=r"cannot read model\.safetensors"):
        pool.grid(trainer_config(), tmp_path)
