"""Models that the trainer cannot build are refused by name, before any rank starts."""

from __future__ import annotations

import json

import pytest

from megatron_vespo.config import ConfigError
from megatron_vespo.trainer.hf_config import read_model_shape


def changed(source, target, **fields):
    config = json.loads((source / "config.json").read_text()) | fields
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_a_directory_without_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"expected a Hugging Face directory with config\.json"):
        read_model_shape(tmp_path / "missing")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llama"}, "model_type = 'llama', expected one of qwen3_moe, qwen3"),
        ({"model_type": None}, "model_type = 'None', expected"),
        ({"attention_bias": True}, "attention_bias = True, the trainer builds only False"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}, "rope_type = 'yarn'"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_variants_that_are_not_built_are_refused(tiny_moe, tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        read_model_shape(changed(tiny_moe, tmp_path, **fields))


def test_a_damaged_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"')
    with pytest.raises(ConfigError, match="is not JSON"):
        read_model_shape(tmp_path)
