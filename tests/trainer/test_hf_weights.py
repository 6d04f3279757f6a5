"""Hugging Face directories in and out: bitwise round trip on every layout, the name tables, clear refusals.

Layouts of several ranks are tested twice: with Megatron's models on real ranks, and, for the tables alone, with
stand-ins for the model chunks of every rank in this process.
"""

from __future__ import annotations

import json
import math
import shutil
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from megatron_vespo.config import ConfigError, LayoutConfig
from megatron_vespo.trainer.hf_config import ModelShape, read_model_shape
from megatron_vespo.trainer.hf_weights import (
    TABLES,
    Cut,
    Export,
    check_weights,
    describe,
    described,
    hf_tensors,
    join,
    load_hf,
    represents,
    shard_of,
    split,
)
from megatron_vespo.trainer.layout import Groups
from megatron_vespo.types import RunError
from tests.trainer.tiny import make_batch, trainer_config

MOE = ModelShape(
    num_layers=8, hidden_size=16, num_heads=4, num_groups=2, head_dim=8, ffn_size=24, vocab_size=32,
    max_positions=64, norm_eps=1e-6, rope_theta=1e6, tied_embeddings=False,
    num_experts=4, experts_per_token=2, expert_ffn_size=12,
)  # fmt: skip
DENSE = replace(MOE, num_experts=0, experts_per_token=0)
LLAMA = replace(DENSE, qk_norm=False)


@pytest.fixture(scope="session")
def untied_llama(tiny_llama, tmp_path_factory):
    """The tiny Llama with an LM head of its own, and without rotary scaling: a Llama-3."""
    directory = tmp_path_factory.mktemp("llama3")
    config = json.loads((tiny_llama / "config.json").read_text())
    config |= {"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    (directory / "config.json").write_text(json.dumps(config))
    weights = load_file(tiny_llama / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = np.random.default_rng(0).normal(0, 0.1, embedding.shape).astype(np.float32)
    save_file(weights, directory / "model.safetensors")
    (directory / "tokenizer_config.json").write_text("{}\n")
    return directory


# ---------------------------------------------------------------------------------------------- real ranks


@pytest.mark.parametrize(
    ("kind", "axes"),
    [
        ("tiny_moe", {"tensor": 2, "pipeline": 2, "expert": 2}),
        ("tiny_moe", {"data": 4, "expert": 2}),
        ("tiny_moe", {"tensor": 2}),  # experts divided over tensor ranks
        ("tiny_moe", {"pipeline": 2, "virtual_pipeline": 2, "data": 2, "expert": 2}),
        ("tiny_moe", {"pipeline": 2, "first_stage_layers": 1}),
        ("tiny_dense", {"tensor": 2, "pipeline": 2}),  # tied embedding on both stages
        ("tiny_dense", {"tensor": 2, "context": 2}),
        ("tiny_dense", {"pipeline": 2, "virtual_pipeline": 2}),
        ("tiny_llama", {"tensor": 2, "pipeline": 2}),
        ("untied_llama", {"tensor": 2, "pipeline": 2}),
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


@pytest.mark.parametrize("kind", ["tiny_llama", "untied_llama"])
@pytest.mark.parametrize("axes", [{}, {"tensor": 2, "pipeline": 2}], ids=str)
def test_the_log_probs_of_a_llama_are_those_of_transformers(pool, request, kind, axes):
    from transformers import AutoModelForCausalLM

    directory, batch = request.getfixturevalue(kind), make_batch(4)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    scores = pool.grid(trainer_config(**axes), directory).score(batch)
    for sequence, score in zip(batch, scores, strict=True):
        tokens = torch.tensor(sequence.token_ids.astype(np.int64))
        with torch.no_grad():
            logp = model(tokens[None, :-1]).logits[0].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        np.testing.assert_allclose(score.logp, logp[sequence.num_prompt_tokens - 1 :], atol=1e-5)


def test_the_saved_directory_loads_in_transformers(pool, tiny_moe, tmp_path):
    from transformers import AutoModelForCausalLM

    pool.grid(trainer_config(pipeline=2), tiny_moe).call("save_hf_in_files", tmp_path / "out", 100_000)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_export_yields_the_same_order_whatever_the_layout_and_only_on_rank_0(pool, tiny_moe):
    names = []
    for axes in ({}, {"tensor": 2, "pipeline": 2, "expert": 2}, {"data": 2, "expert": 2}):
        first, *others = pool.grid(trainer_config(**axes), tiny_moe).call("weights")
        names.append(list(first))
        assert not any(others)
    assert names[0] == names[1] == names[2] == list(hf_tensors(read_model_shape(tiny_moe)))
    assert names[0][0] == "model.embed_tokens.weight"
    assert names[0][-2:] == ["model.norm.weight", "lm_head.weight"]


@pytest.mark.parametrize("block_bytes", [1, 20_000])
def test_an_export_in_many_blocks_yields_the_same(pool, tiny_moe, block_bytes):
    grid = pool.grid(trainer_config(tensor=2, pipeline=2, expert=2), tiny_moe)
    expected = load_file(tiny_moe / "model.safetensors")
    got = grid.call("weights_in_blocks", block_bytes)[0]
    assert got.keys() == expected.keys()
    assert all(np.array_equal(got[name], expected[name]) for name in expected)


def test_a_model_is_saved_in_files_of_bounded_size_that_load_again(pool, tiny_moe, tmp_path):
    grid = pool.grid(trainer_config(tensor=2, pipeline=2, expert=2), tiny_moe)
    grid.call("save_hf_in_files", tmp_path / "out", 100_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) > 5 and sorted(set(index["weight_map"].values())) == [file.name for file in files]
    assert all(sum(x.nbytes for x in load_file(file).values()) <= 100_000 for file in files)
    expected = load_file(tiny_moe / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in expected.values())
    check_weights(tmp_path / "out", read_model_shape(tmp_path / "out"))
    loaded = pool.grid(trainer_config(tensor=2), tmp_path / "out").weights()
    assert all(np.array_equal(loaded[name], expected[name]) for name in expected)


def test_an_existing_directory_is_never_overwritten(pool, tiny_moe, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(RunError, match="exists already and is never overwritten"):
        pool.grid(trainer_config(tensor=2), tiny_moe).call("save_hf", tmp_path / "out")


@pytest.mark.parametrize("limit", [100, 10_000, 300_000], ids=["config", "first", "middle"])
def test_where_the_disk_is_full_all_ranks_stop_and_nothing_is_left(pool, tiny_moe, tmp_path, limit):
    (tmp_path / "out").mkdir()
    grid = pool.grid(trainer_config(tensor=2, expert=2, pipeline=2), tiny_moe)
    grid.call("limit_file_size", limit)
    try:
        with pytest.raises(RunError, match=r"cannot write the model there \(.*File too large"):
            grid.call("save_hf", tmp_path / "out" / "model")
    finally:
        grid.call("limit_file_size", -1)
    assert not list((tmp_path / "out").iterdir())
    grid.call("save_hf", tmp_path / "out" / "model")  # the ranks are still in step
    assert len(load_file(tmp_path / "out" / "model" / "model.safetensors")) == 135


def broken(source, target, change):
    shutil.copy(source / "config.json", target)
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors")
    return target


def with_nan_in_the_last_row(weights):
    weights["model.layers.1.self_attn.k_proj.weight"][-1, 0] = np.nan


def test_a_nan_that_one_rank_reads_stops_all_of_them(pool, tiny_moe, tmp_path):
    # Rank 0 answers first: it reads the first half of the rows, and must still report what rank 1 found.
    message = r"'model\.layers\.1\.self_attn\.k_proj\.weight' in model\.safetensors holds NaN or infinity"
    with pytest.raises(ConfigError, match=message):
        pool.grid(trainer_config(tensor=2), broken(tiny_moe, tmp_path, with_nan_in_the_last_row))


# -------------------------------------------------------------------------------------------------- tables

LAYER = {  # family -> (names of the local spec, names of Transformer Engine's) of the parameters of one layer
    "llama": (
        "input_layernorm.weight self_attention.linear_qkv.weight self_attention.linear_proj.weight "
        "pre_mlp_layernorm.weight mlp.linear_fc1.weight mlp.linear_fc2.weight",
        "self_attention.linear_qkv.layer_norm_weight self_attention.linear_qkv.weight self_attention.linear_proj.weight "
        "mlp.linear_fc1.layer_norm_weight mlp.linear_fc1.weight mlp.linear_fc2.weight",
    ),
    "qwen3_moe": (
        "input_layernorm.weight self_attention.linear_qkv.weight self_attention.q_layernorm.weight "
        "self_attention.k_layernorm.weight self_attention.linear_proj.weight pre_mlp_layernorm.weight mlp.router.weight "
        "mlp.experts.local_experts.0.linear_fc1.weight mlp.experts.local_experts.0.linear_fc2.weight "
        "mlp.experts.local_experts.1.linear_fc1.weight mlp.experts.local_experts.1.linear_fc2.weight",
        "self_attention.linear_qkv.layer_norm_weight self_attention.linear_qkv.weight self_attention.q_layernorm.weight "
        "self_attention.k_layernorm.weight self_attention.linear_proj.weight pre_mlp_layernorm.weight mlp.router.weight "
        "mlp.experts.linear_fc1.weight0 mlp.experts.linear_fc2.weight0 mlp.experts.linear_fc1.weight1 "
        "mlp.experts.linear_fc2.weight1",
    ),
}
QK_NORM = " self_attention.q_layernorm.weight self_attention.k_layernorm.weight"
LAYER["qwen3"] = tuple(names + QK_NORM for names in LAYER["llama"])
SHAPES = {"llama": LLAMA, "qwen3": DENSE, "qwen3_moe": MOE}


@pytest.mark.parametrize("family", TABLES)
@pytest.mark.parametrize("spec", [0, 1], ids=["local", "transformer_engine"])
def test_every_parameter_of_a_layer_has_its_hugging_face_tensors(family, spec):
    shape = replace(SHAPES[family], num_experts=min(2, SHAPES[family].num_experts))
    cuts = [
        describe(f"decoder.layers.1.{name}", shape, first_layer=4) for name in LAYER[family][spec].split()
    ]
    named = [name for cut in cuts for name in cut.names]
    assert sorted(named) == sorted(name for name in hf_tensors(shape) if name.startswith("model.layers.5."))


@pytest.mark.parametrize(
    "name",
    ["mlp.experts.local_experts.1.linear_fc1.weight", "mlp.experts.linear_fc1.weight1"],
)
def test_experts_and_layers_are_counted_from_the_first_of_the_chunk(name):
    cut = describe(f"decoder.layers.11.{name}", MOE, first_layer=20, first_expert=2)
    prefix = "model.layers.31.mlp.experts.3"
    assert cut == Cut((f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight"), "gate_up", is_expert=True)


def test_a_tied_output_layer_is_the_embedding():
    tied = replace(DENSE, tied_embeddings=True)
    assert describe("output_layer.weight", DENSE).names == ("lm_head.weight",)
    assert describe("output_layer.weight", tied).names == ("model.embed_tokens.weight",)
    assert "lm_head.weight" not in hf_tensors(tied)


@pytest.mark.parametrize(
    "name", ["decoder.layers.0.mlp.linear_fc1.bias", "decoder.layers.0.mlp.router.weight", "x"]
)
def test_a_parameter_that_is_not_in_the_table_is_named(name):
    with pytest.raises(AssertionError, match=f"{name} has no Hugging Face counterpart in a qwen3 model"):
        describe(name, DENSE)


@pytest.mark.parametrize("kind", ["tiny_moe", "tiny_dense", "tiny_llama", "untied_llama"])
def test_names_and_shapes_are_those_that_transformers_saves(request, kind):
    directory = request.getfixturevalue(kind)
    saved = {name: x.shape for name, x in load_file(directory / "model.safetensors").items()}
    assert hf_tensors(read_model_shape(directory)) == saved


# --------------------------------------------------------------------------------------- shards and wholes


def test_the_rows_of_a_fused_qkv_stand_group_by_group():
    shape = replace(DENSE, num_heads=4, num_groups=2, head_dim=1, hidden_size=1)
    q, k, v = (torch.tensor(x)[:, None] for x in ([0, 1, 2, 3], [10, 11], [20, 21]))
    cut = Cut(("q", "k", "v"), "qkv")
    assert split(cut.how, (q, k, v), 0, 1, shape).flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert split(cut.how, (q, k, v), 1, 2, shape).flatten().tolist() == [2, 3, 11, 21]


def test_each_rank_holds_its_rows_of_the_gate_above_its_rows_of_the_up_projection():
    gate, up = torch.arange(4)[:, None], torch.arange(10, 14)[:, None]
    assert split(Cut(("g", "u"), "gate_up"), (gate, up), 1, 2, DENSE).flatten().tolist() == [2, 3, 12, 13]


@given(
    how=st.sampled_from(["whole", "rows", "columns", "qkv", "gate_up"]),
    size=st.integers(1, 4),
    groups=st.integers(1, 3),
    heads=st.integers(1, 3),
    width=st.integers(1, 4),
)
def test_joining_what_was_split_gives_the_whole_tensors(how, size, groups, heads, width):
    num_groups = size * groups
    shape = replace(DENSE, num_groups=num_groups, num_heads=num_groups * heads, head_dim=width)
    rows = {
        "qkv": [num_groups * heads * width, num_groups * width, num_groups * width],
        "gate_up": [size * groups] * 2,
    }.get(how, [size * groups])
    wholes = [torch.randn(n, size * width) for n in rows]
    cut = Cut(tuple("abc"[: len(rows)]), how)
    shards = [split(cut.how, wholes, i, size, shape) for i in range(size)]
    assert how == "whole" or sum(x.numel() for x in shards) == sum(x.numel() for x in wholes)
    joined = join(how, shards, shape)
    assert len(joined) == len(wholes)
    assert all(torch.equal(a, b) for a, b in zip(joined, wholes, strict=True))


# ------------------------------------------------------------------------- every rank's chunks, in one process


class FakeChunk:
    """Named parameters of one model chunk as Megatron would hold them, all zero."""

    def __init__(self, shape, layout, layers, experts, *, first, last, spec):
        self._parameters = {}
        if first:
            self._add("embedding.word_embeddings.weight", layout.tensor, shape)
        for layer in range(layers):
            for name in LAYER[shape.family][spec].split():
                if name.endswith(("_experts.0.linear_fc1.weight", "_experts.0.linear_fc2.weight", "weight0")):
                    for e in range(experts):
                        each = name.replace("experts.0", f"experts.{e}").replace("weight0", f"weight{e}")
                        self._add(f"decoder.layers.{layer}.{each}", layout.resolved_expert_tensor, shape)
                elif "experts" not in name:
                    self._add(f"decoder.layers.{layer}.{name}", layout.tensor, shape)
        if last:
            self._add("decoder.final_layernorm.weight", 1, shape)
            if not (first and shape.tied_embeddings):
                self._add("output_layer.weight", layout.tensor, shape)

    def _add(self, name, size, shape):
        """Megatron's shapes, by hand."""
        h, q, k = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_groups * shape.head_dim
        ffn = shape.expert_ffn_size if "experts" in name else shape.ffn_size
        if name.endswith(("q_layernorm.weight", "k_layernorm.weight")):
            sizes = (shape.head_dim,)
        elif "layernorm" in name or "layer_norm" in name:
            sizes = (h,)
        elif "router" in name:
            sizes = (shape.num_experts, h)
        elif "qkv" in name:
            sizes = ((q + 2 * k) // size, h)
        elif "linear_proj" in name:
            sizes = (h, q // size)
        elif "linear_fc1" in name:
            sizes = (2 * ffn // size, h)
        elif "linear_fc2" in name:
            sizes = (h, ffn // size)
        else:
            sizes = (shape.vocab_size // size, h)
        self._parameters[name] = torch.zeros(sizes)

    def named_parameters(self):
        return iter(self._parameters.items())


def fake_ranks(shape, layout, spec=0):
    """(chunks, groups) of every rank of a layout; all stages as long as one another."""
    layers = shape.num_layers // layout.pipeline // layout.virtual_pipeline
    for rank in range(layout.world_size):
        groups = Groups(layout, rank, torch.device("cpu"), None, None)
        stage, chunks = groups.at.pipeline, []
        for chunk in range(layout.virtual_pipeline):
            first = stage == 0 and chunk == 0
            last = stage == layout.pipeline - 1 and chunk == layout.virtual_pipeline - 1
            experts = shape.num_experts // layout.expert
            chunks.append(FakeChunk(shape, layout, layers, experts, first=first, last=last, spec=spec))
        yield chunks, groups


def random_model(directory, shape, seed=0):
    rng = np.random.default_rng(seed)
    weights = {name: rng.standard_normal(size).astype(np.float32) for name, size in hf_tensors(shape).items()}
    save_file(weights, directory / "model.safetensors")
    return weights


@pytest.fixture(scope="module")
def alone():
    """torch.distributed with this process alone in it: what is collective here has one rank."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("GLOO_SOCKET_IFNAME", "lo")
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


TIED = {"tied_embeddings": True}


@pytest.mark.parametrize("spec", [0, 1], ids=["local", "transformer_engine"])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        (MOE, {"tensor": 2, "pipeline": 2, "expert": 2}),
        (MOE, {"pipeline": 2, "virtual_pipeline": 2, "data": 2, "expert": 2}),
        (
            MOE,
            {"tensor": 2, "pipeline": 4, "virtual_pipeline": 2, "data": 2, "expert": 2, "expert_tensor": 2},
        ),
        (replace(DENSE, **TIED), {"tensor": 2, "pipeline": 2, "virtual_pipeline": 4}),
        (replace(LLAMA, **TIED), {"context": 2, "data": 2}),
        (LLAMA, {"tensor": 2, "pipeline": 2, "data": 2}),
    ],
    ids=str,
)
def test_all_ranks_together_hold_the_checkpoint_once(alone, tmp_path, shape, axes, spec):
    weights = random_model(tmp_path, shape)
    layout = LayoutConfig(**axes)
    shards: dict[Cut, dict[int, torch.Tensor]] = {}
    for chunks, groups in fake_ranks(shape, layout, spec):
        load_hf(chunks, tmp_path, shape, groups)
        for cut, parameter in described(chunks, shape, groups):
            index, size = shard_of(cut, groups)
            expected = split(cut.how, [torch.tensor(weights[n]) for n in cut.names], index, size, shape)
            assert torch.equal(parameter, expected)
            if represents(cut, groups.at, shape):
                assert index not in shards.setdefault(cut, {})
                shards[cut][index] = parameter
    joined = {}
    for cut, parts in shards.items():
        assert list(parts) == list(range(len(parts)))  # in rank order
        joined |= dict(zip(cut.names, join(cut.how, list(parts.values()), shape), strict=True))
    assert joined.keys() == weights.keys()
    assert all(np.array_equal(joined[name].numpy(), weights[name]) for name in weights)


def test_an_export_holds_one_block_at_a_time(alone):
    chunks, groups = next(fake_ranks(MOE, LayoutConfig()))
    export = Export(chunks, MOE, groups, block_bytes=8192)  # two of the fused qkv, which are the largest
    handed, most = [], 0
    for _, tensor in export.run():
        handed.append(weakref.ref(tensor))
        del tensor
        most = max(most, sum(x().nbytes for x in handed if x() is not None))
    assert most <= 8192 < export.num_bytes == sum(4 * math.prod(size) for size in hf_tensors(MOE).values())


def test_interleaved_chunks_are_dealt_out_over_the_stages_in_turn():
    layout = LayoutConfig(pipeline=2, virtual_pipeline=2)
    held = []
    for chunks, groups in fake_ranks(DENSE, layout):
        cuts = [cut.names[0] for cut, _ in described(chunks, DENSE, groups)]
        held.append([int(name.split(".")[2]) for name in cuts if "input_layernorm" in name])
    assert held == [[0, 1, 4, 5], [2, 3, 6, 7]]


# -------------------------------------------------------------------------------------------- wrong weights


def without_one(weights):
    del weights["model.layers.2.mlp.experts.3.up_proj.weight"]


def with_a_wrong_shape(weights):
    weights["model.layers.1.self_attn.o_proj.weight"] = np.zeros((16, 16), np.float32)


def with_a_scale(weights):
    weights["model.layers.0.self_attn.q_proj.weight_scale_inv"] = np.zeros((1, 1), np.float32)


def changed_model(directory, shape, change):
    weights = random_model(directory, shape)
    change(weights)
    save_file(weights, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("shape", [MOE, DENSE, LLAMA, replace(LLAMA, **TIED)], ids=lambda x: x.family)
def test_right_weights_pass(tmp_path, shape):
    random_model(tmp_path, shape)
    check_weights(tmp_path, shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without_one,
            r"expected the 171 tensors of a qwen3_moe model of 8 layers and 4 experts, as config\.json says, but 1 are "
            r"missing \(first: 'model\.layers\.2\.mlp\.experts\.3\.up_proj\.weight'\); the download is incomplete",
        ),
        (
            with_a_wrong_shape,
            r"'model\.layers\.1\.self_attn\.o_proj\.weight' in model\.safetensors has shape \[16, 16\], "
            r"config\.json implies \[16, 32\]",
        ),
        (with_a_scale, r"1 others are there \(first: '.*q_proj\.weight_scale_inv'"),
    ],
)
def test_missing_misshapen_and_unknown_tensors_are_named(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        check_weights(changed_model(tmp_path, MOE, change), MOE)


@pytest.mark.parametrize(
    ("found", "expected", "message"),
    [
        (MOE, replace(MOE, num_layers=7), r"but 21 others are there \(first: 'model\.layers\.7\."),
        (MOE, replace(MOE, num_experts=3), r"but 24 others .* 'model\.layers\.0\.mlp\.experts\.3\.down"),
        (
            MOE,
            replace(MOE, num_experts=5),
            r"the 195 .* 24 are missing .*'model\.layers\.0\.mlp\.experts\.4\.gate",
        ),
        (DENSE, LLAMA, r"but 16 others are there \(first: '.*k_norm\.weight'"),
        (LLAMA, DENSE, r"the 91 tensors .* but 16 are missing \(first: '.*q_norm\.weight'"),
        (MOE, DENSE, r"24 are missing \(first: '.*'\) and 104 others are there"),
        (replace(DENSE, **TIED), DENSE, r"1 are missing \(first: 'lm_head\.weight'\)"),
    ],
)
def test_the_weights_of_another_model_are_refused(tmp_path, found, expected, message):
    random_model(tmp_path, found)
    with pytest.raises(ConfigError, match=message):
        check_weights(tmp_path, expected)


def test_what_transformers_ignores_is_ignored(tmp_path):
    tied = replace(LLAMA, **TIED)
    weights = random_model(tmp_path, tied)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(weights, tmp_path / "model.safetensors")
    check_weights(tmp_path, tied)


def loaded(directory, shape):
    chunks, groups = next(fake_ranks(shape, LayoutConfig()))
    load_hf(chunks, directory, shape, groups)
    return dict(chunks[0].named_parameters())


def test_a_second_copy_of_a_tied_head_must_be_the_embedding(alone, tmp_path):
    tied = replace(LLAMA, **TIED)
    weights = random_model(tmp_path, tied)
    embedding = weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": embedding.copy()}, tmp_path / "model.safetensors")
    loaded(tmp_path, tied)
    save_file(weights | {"lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"'lm_head\.weight' differs from 'model\.embed_tokens\.weight'"):
        loaded(tmp_path, tied)


@pytest.mark.parametrize("change", [without_one, with_a_wrong_shape], ids=lambda x: x.__name__)
def test_a_rank_refuses_what_it_would_load_wrongly(alone, tmp_path, change):
    with pytest.raises(ConfigError, match=r"no tensor 'model\.layers\.2|has shape \[16, 16\]"):
        loaded(changed_model(tmp_path, MOE, change), MOE)


def test_a_truncated_checkpoint_is_refused_by_the_check_and_by_the_rank(alone, tmp_path):
    random_model(tmp_path, MOE)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    for refuse in (check_weights, loaded):
        with pytest.raises(ConfigError, match=r"cannot read model\.safetensors"):
            refuse(tmp_path, MOE)


def test_a_checkpoint_in_bfloat16_is_loaded_into_parameters_of_float32(alone, tmp_path):
    from safetensors.torch import save_file as save_torch

    weights = {name: torch.randn(size).bfloat16() for name, size in hf_tensors(LLAMA).items()}
    save_torch(weights, tmp_path / "model.safetensors")
    check_weights(tmp_path, LLAMA)
    got = loaded(tmp_path, LLAMA)["decoder.layers.3.mlp.linear_fc2.weight"]
    assert got.dtype == torch.float32
    assert torch.equal(got, weights["model.layers.3.mlp.down_proj.weight"].float())


def test_every_parameter_is_counted_in_the_table():
    for shape in (MOE, DENSE, LLAMA, replace(LLAMA, **TIED)):
        assert sum(math.prod(size) for size in hf_tensors(shape).values()) == shape.num_parameters
