import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from megatron_vespo.algo.mismatch import (
    TokenGap,
    bf16_fraction,
    bootstrap,
    correlation,
    growth_exponent,
    phi_statistics,
    robust_line,
    sequence_nats,
    sequence_statistics,
    surprise,
    token_gap,
    token_statistics,
    token_sums,
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


MU, PI = np.array([8, 4, 3, 1]) / 16, np.array([4, 4, 2, 6]) / 16
SAMPLED = np.repeat(np.arange(4), [8, 4, 3, 1])  # each outcome as often as mu has it: means are expectations
LOGP, REFERENCE = np.log(PI)[SAMPLED], np.log(MU)[SAMPLED]


def statistics(logp: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    return TokenGap.of(logp, reference).statistics()


def test_estimators_are_exact_where_every_outcome_counts_with_its_probability():
    found, mid = statistics(LOGP, REFERENCE), (MU + PI) / 2
    kl, kl_reverse = entropy(MU, PI), entropy(PI, MU)  # scipy: sum p log(p / q)
    expected = {
        "k1_nats": kl,
        "k3_nats": kl,
        "k3r_nats": kl_reverse,
        "js_nats": (entropy(MU, mid) + entropy(PI, mid)) / 2,
        "chi2": (PI**2 / MU).sum() - 1,
        "chi2_rev": (MU**2 / PI).sum() - 1,
        "renyi2_nats": np.log((PI**2 / MU).sum()),
        "ratio_mean": 1.0,
        "ess_token": 1 / (PI**2 / MU).sum(),
        "k2_nats": (MU * np.log(PI / MU) ** 2).sum() / 2,
        "abs_mean_nats": (MU * np.abs(np.log(PI / MU))).sum(),
        "mult_err": (MU * np.maximum(PI / MU, MU / PI)).sum(),
        "prob_abs_mean": (MU * np.abs(PI - MU)).sum(),
        "prob_abs_max": 5 / 16,
        "exact_zero_fraction": 4 / 16,  # outcome 1
        "f_1p1": 12 / 16,
        "f_3": 1 / 16,
        "f_10": 0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_statistics_are_those_that_verl_nemo_rl_and_trl_log():
    rng = np.random.default_rng(0)
    lengths, width = [3, 7, 5, 1], 7
    mask = np.arange(width) < np.array(lengths)[:, None]
    rollout = np.where(mask, -rng.exponential(1, mask.shape), 0)
    old = np.where(mask, rollout + rng.normal(0, 0.5, mask.shape), 0)
    d, num = (old - rollout) * mask, mask.sum()
    sums = token_sums(old[mask], rollout[mask], np.repeat(np.arange(4), lengths), 4)
    tokens, sequences = statistics(old[mask], rollout[mask]), sequence_statistics(sums)
    mean_old, mean_rollout = ((x * mask).sum(1) / mask.sum(1) for x in (old, rollout))
    verl = {
        "kl": (rollout - old)[mask].mean(),
        "k3_kl": (np.exp(d) - d - 1)[mask].mean(),
        "chi2_token": np.exp(2 * d)[mask].mean() - 1,
        "chi2_seq": np.exp(2 * d.sum(1)).mean() - 1,
        "ppl_ratio": (np.exp(-mean_old) / np.exp(-mean_rollout)).mean(),
        "log_ppl_abs_diff": np.abs(mean_old - mean_rollout).mean(),
        "rollout_probs_diff_mean": np.abs(np.exp(old) - np.exp(rollout))[mask].mean(),
        "rollout_probs_diff_max": np.abs(np.exp(old) - np.exp(rollout))[mask].max(),
        "rollout_actor_probs_pearson_corr": np.corrcoef(np.exp(old)[mask], np.exp(rollout)[mask])[0, 1],
    }
    ours = [tokens["k1_nats"], tokens["k3_nats"], tokens["chi2"], sequences["chi2_seq"], sequences["ppl_ratio"],
            sequences["log_ppl_abs_nats"], tokens["prob_abs_mean"], tokens["prob_abs_max"], tokens["pearson"]]  # fmt: skip
    assert ours == pytest.approx(list(verl.values()), rel=1e-9)
    nemo_rl = {
        "token_mult_prob_error": (np.exp(np.abs(d)) * mask).sum() / num,
        "gen_kl_error": ((np.exp(old - rollout) - (old - rollout) - 1) * mask).sum() / num,
        "masked_sequences": ((np.exp(np.abs(d)) * mask).sum(1) / mask.sum(1) > 2).mean(),
    }
    ours = [tokens["mult_err"], tokens["k3_nats"], sequences["seq_outlier_fraction"]]
    assert ours == pytest.approx(list(nemo_rl.values()), rel=1e-9)
    trl = {
        "sampling_logp_difference/mean": np.abs(d)[mask].mean(),
        "sampling_logp_difference/max": np.abs(d)[mask].max(),
        "importance_sampling_ratio/mean": np.exp(d)[mask].mean(),
    }
    ours = [tokens["abs_mean_nats"], tokens["abs_max_nats"], tokens["ratio_mean"]]
    assert ours == pytest.approx(list(trl.values()), rel=1e-9)


LOGPS = st.floats(-30, 0, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(LOGPS, LOGPS), min_size=1, max_size=60), st.integers(0, 60))
def test_gaps_of_two_parts_add_up_to_the_gap_of_the_whole(pairs: list[tuple[float, float]], cut: int):
    logp, reference = (np.array(x, np.float32) for x in zip(*pairs, strict=True))
    whole = TokenGap.of(logp, reference)
    parts = TokenGap.of(logp[:cut], reference[:cut]) + TokenGap.of(logp[cut:], reference[cut:])
    np.testing.assert_array_equal(parts.histogram, whole.histogram)
    np.testing.assert_allclose(parts.sums_X, whole.sums_X, rtol=1e-12, atol=1e-12)
    assert (parts.abs_max, parts.prob_abs_max) == (whole.abs_max, whole.prob_abs_max)
    size = np.sort(np.abs(logp.astype(np.float64) - reference))
    for q in (0.01, 0.5, 0.9, 0.999):
        exact = size[max(int(np.ceil(q * len(size))), 1) - 1]
        assert parts.quantile(q) == pytest.approx(exact, rel=0.0111, abs=2.0**-33)


def test_a_log_prob_that_is_no_number_is_counted_apart():
    found = statistics(f32(-1, np.nan, -2, -3), f32(-1.5, -1, -np.inf, -3))
    assert (found["num_tokens"], found["nonfinite_fraction"]) == (2, 0.5)
    assert found["abs_mean_nats"] == 0.25 and found["k1_nats"] == -0.25


def test_statistics_without_tokens_or_with_gaps_beyond_all_numbers_hold_no_nan():
    assert statistics(f32(), f32()) == {"num_tokens": 0}
    found = statistics(f32(0, -1), f32(-800, -1))
    assert np.isfinite(list(found.values())).all() and "chi2" not in found and found["abs_max_nats"] == 800


def test_the_grid_of_rounded_log_probs_is_found():
    rng = np.random.default_rng(1)
    rounded = -rng.integers(0, 64, 500) / 32  # multiples of 2^-5
    found = statistics(rounded, rounded + (2 * rng.integers(-4, 4, 500) + 1) / 32)
    assert found["grid_fraction"] == 1 and found["grid_step_nats"] == 1 / 32
    noise = statistics(rounded + rng.normal(0, 0.01, 500), rounded)
    assert noise["grid_fraction"] < 0.01 and "grid_step_nats" not in noise


def test_the_tail_index_is_that_of_a_pareto_distribution():
    rng = np.random.default_rng(2)
    for index in (1.5, 4.0):
        gap = 0.01 * (1 + rng.pareto(index, 200_000))
        assert statistics(-gap, np.zeros_like(gap))["tail_index"] == pytest.approx(index, rel=0.1)


def test_sequence_statistics_by_hand():
    # D = 0.5 over 2 tokens, -0.3 over 3; the third sequence has no tokens
    sums = token_sums(
        np.array([-1, -1, -2, -2, -2.3]), np.array([-1, -1.5, -2, -2, -2.0]), np.array([0, 0, 1, 1, 1]), 3
    )
    found, w = sequence_statistics(sums), np.exp([0.5, -0.3])
    expected = {
        "seq_num": 2, "seq_nats_mean": 0.1, "seq_nats_std": 0.4, "seq_nats_min": -0.3, "seq_nats_max": 0.5,
        "seq_nats_abs_max": 0.5, "seq_geo_mean_nats": (0.25 - 0.1) / 2, "seq_geo_abs_max_nats": 0.25,
        "seq_slope_nats": (0.5 * 2 - 0.3 * 3) / 13, "ess_seq": w.sum() ** 2 / (2 * (w**2).sum()),
        "chi2_seq": (w**2).mean() - 1, "renyi2_seq_nats": np.log((w**2).mean()), "seq_length_p95": 2.95,
        "seq_top_weight": w[0] ** 2 / (w**2).sum(), "seq_outlier_fraction": 0, "seq_outlier_k2_share": 0,
        "seq_budget_nats": (np.expm1([0.5, -0.3]) - [0.5, -0.3]).sum() / 5 * 2.95,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert sequence_statistics(sums[2:]) == {}


def test_sums_of_sequences_are_those_of_their_tokens_in_any_order():
    order = np.random.default_rng(3).permutation(16)
    sums = token_sums(LOGP[order], REFERENCE[order], SAMPLED[order].astype(np.int32), 4)
    np.testing.assert_allclose(sums.sum(0), TokenGap.of(LOGP, REFERENCE).sums_X, atol=1e-12)
    k1 = token_statistics(sums)["k1_nats"]  # sequence i holds outcome i only
    np.testing.assert_allclose(k1, np.log(MU / PI), atol=1e-12)


def test_the_kernel_of_a_sequence_of_the_same_weights_is_one():
    found = phi_statistics(np.zeros(5), (2.0, 3.0), (3.0, 2.0))
    assert found["phi_pos_mean"] == found["phi_neg_p05"] == pytest.approx(1)
    # phi = W^k exp(lam (1 - W)), W = 1/2: 1/4 e^1.5 and 1/8 e
    found = phi_statistics(np.full(3, np.log(0.5)), (2.0, 3.0), (3.0, 2.0))
    assert found["phi_pos_p50"] == pytest.approx(np.exp(1.5) / 4)
    assert found["phi_neg_p50"] == pytest.approx(np.exp(1.0) / 8)


def test_growth_tells_independent_tokens_from_one_error_per_sequence():
    rng, num = np.random.default_rng(4), np.full(400, 64, np.int32)
    assert growth_exponent(rng.normal(0, 0.1, 400 * 64), num) == pytest.approx(0.5, abs=0.05)
    assert growth_exponent(np.repeat(rng.normal(0, 0.1, 400), 64), num) == pytest.approx(1.0, abs=1e-9)
    assert growth_exponent(np.zeros(400 * 64), num) is None
    assert growth_exponent(rng.normal(size=7 * 64), num[:7]) is None
    assert growth_exponent(np.zeros(0), np.zeros(0, np.int32)) is None


def test_the_robust_line_looks_past_a_few_extreme_tokens():
    rng = np.random.default_rng(5)
    x = -rng.exponential(1, 2000)
    y = 0.8 * x - 0.05 + rng.normal(0, 0.01, 2000)
    y[:40] -= 20
    line = robust_line(x, y)
    assert line == pytest.approx((0.8, -0.05), abs=0.01)
    assert robust_line(x[:2], y[:2]) is None and robust_line(np.ones(5), y[:5]) is None


def test_surprise_is_zero_for_tokens_of_the_distribution_and_negative_for_a_colder_one():
    rng, p = np.random.default_rng(6), np.array([0.6, 0.3, 0.1])
    h = np.full(20_000, entropy(p))
    mean, error = surprise(np.log(p)[rng.choice(3, 20_000, p=p)], h)
    assert abs(mean) < 4 * error < 0.05
    cold = p**2 / (p**2).sum()
    mean, error = surprise(np.log(p)[rng.choice(3, 20_000, p=cold)], h)
    assert mean == pytest.approx((-np.log(p) * (cold - p)).sum(), abs=4 * error)


def test_rounding_to_bfloat16_is_seen():
    logp = -np.random.default_rng(7).exponential(1, 4000).astype(np.float32)
    assert bf16_fraction(torch.from_numpy(logp).bfloat16().float().numpy()) == 1
    assert bf16_fraction(logp) < 0.01 and bf16_fraction(f32(0, 0)) is None


def test_correlation_leaves_out_what_is_missing():
    x, y = np.array([1, 2, 3, np.nan, 4]), np.array([2, 4, 5, 1, np.nan])
    assert correlation(x, y) == pytest.approx(np.corrcoef([1, 2, 3], [2, 4, 5])[0, 1])
    assert correlation(x, np.ones(5)) is None and correlation(x[:2], y[:2]) is None


def test_bootstrap_intervals_are_as_wide_as_the_sequences_scatter():
    sums = np.stack([np.random.default_rng(8).normal(1, 2, 400), np.ones(400)], 1)
    (low, high) = bootstrap(sums, lambda s: {"mean": s[:, 0] / s[:, 1]}, num=1000)["mean"]
    mean, error = sums[:, 0].mean(), sums[:, 0].std() / 20
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.25 * error)
    assert bootstrap(sums[:1], lambda s: {"mean": s[:, 0]}) == {}
