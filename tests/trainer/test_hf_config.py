"""Models that the trainer cannot build are refused by name, before any rank starts."""

from __future__ import annotations

import json

import pytest
from safetensors.numpy import load_file

from megatron_vespo.config import ConfigError
from megatron_vespo.trainer.hf_config import ModelShape, RopeScaling, read_model_shape

LLAMA_31_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
QWEN3_30B = ModelShape(
    num_layers=48, hidden_size=2048, num_heads=32, num_groups=4, head_dim=128, ffn_size=6144, vocab_size=151936,
    max_positions=40960, norm_eps=1e-6, rope_theta=1e6, tied_embeddings=False,
    num_experts=128, experts_per_token=8, expert_ffn_size=768,
)  # fmt: skip


def changed(source, target, **fields):
    config = json.loads((source / "config.json").read_text()) | fields
    (target / "config.json").write_text(json.dumps(config))
    return target


def written(directory, **config):
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_a_directory_without_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"expected a Hugging Face directory with config\.json"):
        read_model_shape(tmp_path / "missing")


@pytest.mark.parametrize("model_type", ["mixtral", None])
def test_an_unknown_architecture_is_refused_and_those_that_are_built_are_listed(
    tiny_moe, tmp_path, model_type
):
    listed = r"qwen3_moe \(Qwen3MoeForCausalLM\), qwen3 \(Qwen3ForCausalLM\), llama \(LlamaForCausalLM"
    with pytest.raises(ConfigError, match=f"model_type = '{model_type}', expected one of {listed}"):
        read_model_shape(changed(tiny_moe, tmp_path, model_type=model_type))


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("tiny_moe", {"attention_bias": True}, "attention_bias = True, the trainer builds only False"),
        ("tiny_moe", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("tiny_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
        ("tiny_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ("tiny_moe", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("tiny_moe", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config = .*'fp8'"),
        (
            "tiny_moe",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}},
            "rope_type = 'yarn', the trainer builds only 'default' or 'llama3'",
        ),
        ("tiny_moe", {"num_experts_per_tok": 9}, "implies 9 of 8 experts per token"),
        ("tiny_dense", {"layer_types": ["sliding_attention"] * 4}, r"layer_types = \['sliding_attention'\]"),
        ("tiny_dense", {"num_key_value_heads": 3}, "4 attention heads over 3 key/value heads"),
        ("tiny_llama", {"num_hidden_layers": 0}, "implies num_layers = 0"),
        ("tiny_llama", {"mlp_bias": True}, "mlp_bias = True"),
        ("tiny_llama", {"attention_bias": True}, "attention_bias = True"),
        (
            "tiny_llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}},
            "rope_type = 'linear'",
        ),
        (
            "tiny_llama",
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}},
            r"transformers cannot read config\.json .*low_freq_factor",
        ),
        ("tiny_llama", {"hidden_size": "64"}, r"transformers cannot read config\.json .*hidden_size"),
        ("tiny_llama", {"num_attention_heads": 0}, r"transformers cannot read config\.json"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_variants_that_are_not_built_are_refused(request, tmp_path, kind, fields, message):
    with pytest.raises(ConfigError, match=message):
        read_model_shape(changed(request.getfixturevalue(kind), tmp_path, **fields))


@pytest.mark.parametrize("text", ['{"model_type": "qwen3"', "[]"])
def test_a_damaged_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"is not JSON|model_type = 'None'"):
        read_model_shape(tmp_path)


def test_a_llama_config_of_the_hub_is_read(tmp_path):
    shape = read_model_shape(
        written(
            tmp_path, model_type="llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
            num_attention_heads=32, num_key_value_heads=8, head_dim=64, vocab_size=128256, rms_norm_eps=1e-5,
            max_position_embeddings=131072, rope_theta=500000.0, rope_scaling=LLAMA_31_ROPE | {"factor": 32.0},
            tie_word_embeddings=True, torch_dtype="bfloat16", attention_bias=False, mlp_bias=False,
        )
    )  # fmt: skip
    assert (shape.family, shape.qk_norm, shape.num_experts) == ("llama", False, 0)
    assert (shape.rope_theta, shape.norm_eps, shape.tied_embeddings) == (500000.0, 1e-5, True)
    assert shape.rope_scaling == RopeScaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    assert shape.num_parameters == 1_235_814_400  # Llama-3.2-1B's published number


def test_llama_3_has_no_scaling_and_as_many_key_heads_as_heads_unless_told(tmp_path):
    shape = read_model_shape(
        written(
            tmp_path, model_type="llama", hidden_size=64, num_attention_heads=4, rope_theta=5e5, rope_scaling=None
        )
    )  # fmt: skip
    assert shape.rope_scaling is None
    assert (shape.num_groups, shape.head_dim) == (4, 16)


@pytest.mark.parametrize("kind", ["tiny_moe", "tiny_dense", "tiny_llama"])
def test_parameters_are_counted_as_they_lie_in_the_checkpoint(request, kind):
    directory = request.getfixturevalue(kind)
    weights = load_file(directory / "model.safetensors")
    assert read_model_shape(directory).num_parameters == sum(x.size for x in weights.values())


def test_qwen3_30b_a3b_has_30_5_billion_parameters_of_which_a_token_meets_3_3():
    assert QWEN3_30B.family == "qwen3_moe"
    assert QWEN3_30B.num_parameters == 30_532_122_624  # its model card: 30.5B in total
    # Without 48 layers x 120 experts x 3 x 2048 x 768 of them: 3.3B activated
    assert QWEN3_30B.active_parameters == 30_532_122_624 - 27_179_089_920
