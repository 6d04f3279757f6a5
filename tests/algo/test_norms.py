from __future__ import annotations

import pytest

from megatron_vespo.algo.norms import NORMS, explain, level


@pytest.mark.parametrize(
    ("name", "value", "condition", "expected"),
    [
        ("mismatch/k3_nats", 1.5e-3, "moe", "healthy"),  # Qwen3-30B-A3B, SGLang against Megatron
        ("mismatch/k3_nats", 1.5e-3, "dense", "warn"),
        ("mismatch/k3_nats", 1.3e-2, "moe", "broken"),
        ("mismatch/k3_nats", 1e-3, "float32", "broken"),
        ("mismatch/k1_nats", -0.05, "moe", "broken"),  # by size
        ("mismatch/pearson", 0.999, "moe", "healthy"),
        ("mismatch/pearson", 0.9, "moe", "broken"),
        ("structure/token_shift", -1, "moe", "broken"),
        ("structure/token_shift", 0, "moe", "healthy"),
        ("cause/routing_r", 0.7, "moe", None),
        ("no such metric", 1.0, "moe", None),
    ],
)
def test_a_number_is_judged_by_the_bounds_of_its_condition(name, value, condition, expected):
    assert level(name, value, condition) == expected


def test_every_metric_is_explained_with_formula_and_source():
    for name, norm in NORMS.items():
        text = explain(name)
        assert norm.formula in text and norm.source and norm.meaning.endswith("."), name


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(KeyError, match="mismatch/k3_nats"):
        explain("mismatch/k3")
