import numpy as np
import pytest

from megatron_vespo.algo.mismatch import (
    expert_gap,
    expert_overlap,
    sequence_nats,
    token_gap,
)


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_token_gap_by_hand():
    # d = (0.5, -0.5): k1 = 0, k3 = mean(e^.5 - 1.5, e^-.5 - 0.5) = (0.148721 + 0.106531) / 2
    gap = token_gap(f32(-0.5, -1.5), f32(-1.0, -1.0))
    assert gap["k1_nats"] == 0
    assert gap["k3_nats"] == pytest.approx(0.127626, abs=1e-6)
    assert gap["abs_mean_nats"] == gap["abs_max_nats"] == 0.5 and gap["square_mean_nats2"] == 0.25


def test_k3_estimates_the_divergence_from_the_sampling_distribution():
    # Two coins, tokens in exact proportion to mu = (3/4, 1/4), pi = (1/2, 1/2):
    # KL(mu||pi) = .75 ln 1.5 + .25 ln .5 = 0.130812
    mu, pi = np.array([0.75, 0.25]), np.array([0.5, 0.5])
    tokens = np.array([0, 0, 0, 1])
    gap = token_gap(np.log(pi)[tokens].astype(np.float32), np.log(mu)[tokens].astype(np.float32))
    assert gap["k3_nats"] == pytest.approx(0.130812, abs=1e-6) == gap["k1_nats"]


def test_sequence_nats_add_up_in_float64():
    tiny = np.full(4_000_000, 1e-7, np.float32)  # a float32 running sum would lose most of these to rounding
    (total,) = sequence_nats([np.concatenate([f32(1000.0), tiny])], [np.zeros(4_000_001, np.float32)])
    assert total == pytest.approx(1000.4, abs=1e-6)


def test_expert_overlap_ignores_order_and_counts_sets():
    # 2 rows, 2 layers, top-2: (same set, other order) (one of two shared) / (disjoint) (equal)
    chosen = np.array([[[0, 1], [2, 3]], [[0, 1], [4, 5]]], np.int16)
    reference = np.array([[[1, 0], [3, 7]], [[2, 3], [4, 5]]], np.int16)
    overlap = expert_overlap(chosen, reference)
    np.testing.assert_array_equal(overlap, [[1, 0.5], [0, 1]])
    assert expert_gap(overlap) == {
        "overlap_mean": 0.625,
        "mismatch_fraction": 0.5,
        "any_flip_fraction": 1.0,
        "overlap_layer": [0.5, 0.75],
    }


def test_experts_of_different_tokens_are_refused():
    with pytest.raises(ValueError, match="same tokens, layers and experts"):
        expert_overlap(np.zeros((3, 2, 2), np.int16), np.zeros((4, 2, 2), np.int16))
