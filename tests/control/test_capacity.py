"""`plan`: what it prints, what it refuses, and that its advice holds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_vespo.cli import app
from megatron_vespo.config import ConfigError
from megatron_vespo.control.capacity import describe, find_machines, load_either, read_capacity, verdict

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPE = CONFIGS / "qwen3_30b_a3b.toml"


@pytest.fixture
def qwen3_30b(tmp_path):
    """Its config.json alone: no weights, no tokenizer."""
    fields = {
        "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "vocab_size": 151936,
        "max_position_embeddings": 40960, "tie_word_embeddings": False, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": True, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path


def capacity(shape, *overrides, gpu="h100-80gb", config=RECIPE, **options):
    return read_capacity(load_either(config, overrides), machines=find_machines(gpu), shape=shape, **options)


def test_the_recipe_fits_its_gpus(qwen3_30b):
    needs = capacity(qwen3_30b)
    assert verdict(needs).startswith("It fits: ")
    text = describe(needs)
    assert "30,532,122,624 parameters" in text
    assert "16 x h100-80gb on 2 node(s)" in text
    for part in (
        "weights",
        "gradients",
        "optimizer state",
        "activations",
        "log-prob buffers",
        "weight transfer",
    ):
        assert re.search(rf"^{part}.* \d+\.\d\d$", text, re.MULTILINE), part
    assert "dominated by" in text


def test_the_command_needs_config_json_alone(qwen3_30b):
    run = CliRunner().invoke(app, ["plan", str(RECIPE), "--shape", str(qwen3_30b / "config.json")])
    assert run.exit_code == 0, run.output
    assert "It fits" in run.output


def test_what_cannot_fit_is_refused_with_a_change_that_does(qwen3_30b):
    tight = ("trainer.recompute='none'", "trainer.max_tokens_per_microbatch=32768")
    with pytest.raises(ConfigError, match=r"memory of one rank = .* cannot be trained; set ") as refusal:
        verdict(capacity(qwen3_30b, *tight))
    (change,) = re.findall(r"; set ([\w.]+ = \S+)", str(refusal.value))
    override = "trainer." + change.replace(" ", "")
    assert verdict(capacity(qwen3_30b, *tight, override)).startswith("It fits")


def test_where_no_single_change_is_enough_several_are_named(qwen3_30b):
    alone = (
        "trainer.layout.tensor=1",
        "trainer.layout.data=4",
        "trainer.layout.expert=2",
        "trainer.recompute='none'",
    )
    with pytest.raises(
        ConfigError, match=r"no single change is enough; set, in this order, .*; .*: \d+\.\d\d GiB"
    ):
        verdict(capacity(qwen3_30b, *alone))


def test_where_nothing_helps_it_says_so(qwen3_30b):
    one = (
        "trainer.layout.tensor=1",
        "trainer.layout.data=1",
        "trainer.layout.expert=1",
        "trainer.optimizer.cpu_offload=1.0",
    )
    with pytest.raises(ConfigError, match=r"no set of changes|no single change"):
        verdict(capacity(qwen3_30b, *one))


def test_the_layout_is_checked_first(qwen3_30b):
    with pytest.raises(ConfigError, match=r"trainer\.layout\.expert = 3: .*; nearest valid: "):
        capacity(qwen3_30b, "trainer.layout.expert=3", "trainer.layout.data=3")


@pytest.mark.parametrize("tokens", [0, -1, 20000])
def test_a_mean_beyond_the_longest_response_is_refused(qwen3_30b, tokens):
    with pytest.raises(ConfigError, match=r"--mean-response-tokens = .*expected above 0 and at most 14336"):
        capacity(qwen3_30b, mean_response_tokens=tokens)


def test_an_unknown_gpu_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"--gpu = 'h800': expected one of a100-80gb, h100-80gb"):
        find_machines("h800")


def test_a_sequence_beyond_the_microbatch_is_refused(qwen3_30b):
    with pytest.raises(
        ConfigError, match=r"max_tokens_per_microbatch = 8192: must hold the longest sequence"
    ):
        capacity(qwen3_30b, "trainer.max_tokens_per_microbatch=8192")


def test_fine_tuning_is_planned_too(qwen3_30b):
    layout = ("trainer.layout.data=8", "trainer.layout.expert=8", "trainer.dtype='bfloat16'")
    needs = capacity(qwen3_30b, *layout, config=CONFIGS / "demo_sft.toml")
    assert needs.work.sync_bucket_bytes == 0
    assert "weight transfer" not in needs.time.parts


def test_shorter_responses_shorten_the_step_and_leave_the_memory(qwen3_30b):
    worst, usual = capacity(qwen3_30b), capacity(qwen3_30b, mean_response_tokens=4000)
    assert usual.time.total < worst.time.total
    assert usual.peak == worst.peak


def test_several_updates_and_a_reference_are_scored_beforehand(qwen3_30b):
    once = capacity(qwen3_30b)
    more = capacity(qwen3_30b, "loop.updates_per_batch=4", "algorithm.kl_coeff=0.01")
    assert (once.work.num_scoring, more.work.num_scoring) == (0, 2)
    assert more.time.parts["compute: scoring"] > 0
    proximal = ("algorithm.reference=proximal", "algorithm.correction.kind=icepop")
    assert capacity(qwen3_30b, *proximal).work.num_scoring == 1
    m2po = capacity(qwen3_30b, "loop.updates_per_batch=4", "algorithm.name=m2po")
    assert m2po.work.num_scoring == 1 + 3 / 4  # the batch once, and three of its quarters once more
    assert more.memory[0].host > once.memory[0].host
