"""Every statistic of a handful of sequences, worked out by hand."""

import numpy as np
import pytest

from megatron_vespo.algo.statistics import (
    HISTOGRAM_EDGES,
    by_lag,
    effective_fraction,
    effective_fraction_of,
    weight_statistics,
)


def test_a_few_sequences_by_hand():
    # W = 2, 1/2 (A > 0), 1 (A < 0), and one without an advantage, which counts for nothing
    log_w = np.log([2.0, 0.5, 1.0, 4.0])
    c, advantage, weight = (
        np.array([0.2, 1.0, 0.005, 9.0]),
        np.array([1.0, 1.0, -2.0, 0.0]),
        np.array([0.25, 0.25, 1.25, 0.25]),
    )
    got = weight_statistics(log_w, c, advantage, weight)
    assert got["log_w_pos_mean"] == pytest.approx(0) and got["log_w_pos_std"] == pytest.approx(np.log(2))
    assert got["log_w_neg_mean"] == got["log_w_neg_std"] == 0
    assert got["phi_pos_mean"] == pytest.approx(0.6) and got["phi_pos_std"] == pytest.approx(0.4)
    # E_Q[W] of A > 0 = (0.2 * 2 + 1 * 0.5) / 1.2
    assert got["tilted_w_pos"] == pytest.approx(0.75) and got["tilted_w_neg"] == pytest.approx(1)
    # (2 + .5 + 1)^2 / (3 (4 + .25 + 1)) and (1.205)^2 / (3 (0.04 + 1 + 0.000025))
    assert got["ess_fraction"] == pytest.approx(12.25 / 15.75)
    assert got["ess_phi_fraction"] == pytest.approx(1.452025 / 3.120075)
    assert got["dead_fraction"] == pytest.approx(1 / 3)
    # c A = (0.2, 1, -0.01): sum 1.19, sum of sizes 1.21; with the weights (1, 1, 5) / 4 the largest has 1 of 1.25
    assert got["net_advantage"] == pytest.approx(1.19 / 1.21)
    assert got["top1pct_share"] == pytest.approx(1 / 1.25)
    assert got["phi_mean"] == pytest.approx(1.205 / 3)
    assert got["top_sequences"] == [1, 0, 2]


def test_quantiles_and_histogram():
    log_w = np.linspace(-9.9, 9.9, 199)  # two of them beyond each end, by 0.1
    got = weight_statistics(log_w, np.ones(199), np.ones(199), np.ones(199))
    assert got["log_w_pos_p50"] == pytest.approx(0) and got["log_w_pos_p99"] == pytest.approx(9.702)
    counts = got["log_w_pos_histogram"]
    assert sum(counts) == 199 and len(counts) == len(HISTOGRAM_EDGES) - 1
    assert counts[0] == sum(log_w < -7.75) and counts[-1] == sum(log_w >= 7.75)
    assert "log_w_neg_mean" not in got  # a mean over no sequence is no number


def test_dead_and_enormous_weights_are_finite_numbers():
    got = weight_statistics(np.array([800.0, -800.0]), np.zeros(2), np.array([1.0, -1.0]), np.ones(2))
    assert got["dead_fraction"] == 1 and got["net_advantage"] == got["ess_phi_fraction"] == 0
    assert got["ess_fraction"] == pytest.approx(0.5) and "tilted_w_pos" not in got
    alive = weight_statistics(np.array([800.0, 1.0]), np.ones(2), np.ones(2), np.ones(2))
    assert "tilted_w_pos" not in alive  # W = exp(800) has no number
    assert all(np.isfinite(x).all() for x in (*got.values(), *alive.values()))


def test_without_any_advantage_there_is_nothing_to_tell():
    assert weight_statistics(np.zeros(3), np.ones(3), np.zeros(3), np.ones(3)) == {}


def test_the_effective_sample_size_is_one_for_equal_weights_and_one_over_n_for_one_survivor():
    assert effective_fraction(np.array([5.0, 5.0, 5.0])) == pytest.approx(1.0)
    assert effective_fraction(np.array([900.0, 0.0, 0.0, 0.0])) == pytest.approx(0.25)
    # weights 1 and 3: 16 / (2 * 10)
    assert effective_fraction(np.array([-2000.0, -2000 + np.log(3)])) == pytest.approx(0.8)
    assert effective_fraction_of(np.array([1e-200, 3e-200])) == pytest.approx(0.8)
    assert effective_fraction(np.full(2, -np.inf)) == effective_fraction_of(np.zeros(3)) == 0


def test_lags_are_told_apart():
    got = by_lag(np.array([1.0, 3.0, -2.0]), np.array([0, 0, 2], np.int32))
    assert got == {
        "log_w_lag_count": [2, 0, 1], "log_w_lag_mean": [2, 0, -2], "log_w_lag_std": [1, 0, 0]
    }  # fmt: skip
