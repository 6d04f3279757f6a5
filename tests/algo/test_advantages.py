import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.algo.advantages import batch_normalised, group_advantages, zero_mean

rewards_of_a_group = st.lists(st.sampled_from([0.0, 0.1, 1.0, -2.5]), min_size=2, max_size=9)
options = pytest.mark.parametrize(
    ("scale", "baseline"), [(s, b) for s in ("none", "std") for b in ("mean", "leave_one_out")]
)


def test_group_mean_is_subtracted():
    # mean of (1, 0, 0, 1) is 1/2
    np.testing.assert_array_equal(group_advantages([1, 0, 0, 1], scale="none"), [0.5, -0.5, -0.5, 0.5])


def test_std_scale_divides_by_the_unbiased_deviation():
    # deviations +-1/2, variance 4 * 1/4 / 3 = 1/3, so A = +-0.5 * sqrt(3)
    np.testing.assert_allclose(
        group_advantages([1, 0, 0, 1], scale="std"), np.array([1, -1, -1, 1]) * 0.8660254, rtol=1e-5
    )


@settings(deadline=None)
@given(rewards_of_a_group)
def test_leave_one_out_subtracts_the_mean_of_the_others(rewards):
    expected = [
        reward - sum(rewards[:i] + rewards[i + 1 :]) / (len(rewards) - 1) for i, reward in enumerate(rewards)
    ]
    advantage = group_advantages(rewards, scale="none", baseline="leave_one_out")
    np.testing.assert_allclose(advantage, expected, atol=1e-12)


@settings(deadline=None)
@given(rewards_of_a_group, st.floats(-10, 10), st.floats(0.1, 10))
def test_a_group_is_balanced_and_only_differences_of_rewards_count(rewards, shift, factor):
    for baseline in ("mean", "leave_one_out"):
        plain = group_advantages(rewards, scale="none", baseline=baseline)
        assert abs(plain.sum()) < 1e-9
        moved = group_advantages([factor * r + shift for r in rewards], scale="none", baseline=baseline)
        np.testing.assert_allclose(moved, factor * plain, atol=1e-9)
        # divided by the deviation, not even their size; up to the floor that is added to it
        scaled = group_advantages(rewards, scale="std", baseline=baseline)
        moved = group_advantages([factor * r + shift for r in rewards], scale="std", baseline=baseline)
        np.testing.assert_allclose(moved, scaled, rtol=1e-3, atol=1e-9)


@options
def test_equal_rewards_give_exact_zeros(scale, baseline):
    # 0.1 is not exact in binary: its mean need not equal it, so zeros must not be left to rounding
    assert (group_advantages([0.1] * 7, scale=scale, baseline=baseline) == 0).all()


@options
@pytest.mark.parametrize("rewards", [[], [1.0], [1.0, float("nan")], [float("inf"), 0.0]])
def test_a_group_without_a_finite_baseline_is_refused(rewards, scale, baseline):
    with pytest.raises(ValueError, match=r"group needs at least 2|must be finite"):
        group_advantages(rewards, scale=scale, baseline=baseline)


def test_the_batch_scale_keeps_the_proportions_of_uneven_groups():
    # groups of 2, 3 and 2: a wide one, a narrow one, one without signal; squares 1 + 1 + 0 + .01 + .01 over 7 sequences
    advantage = np.array([1.0, -1.0, 0.0, 0.1, -0.1, 0.0, 0.0])
    scaled = batch_normalised(advantage)
    np.testing.assert_allclose(scaled, advantage / np.sqrt(2.02 / 7), rtol=1e-5)
    assert (scaled[advantage == 0] == 0).all()
    np.testing.assert_array_equal(batch_normalised(np.zeros(3)), np.zeros(3))


def test_zero_mean_restores_the_balance_of_each_group_by_hand():
    advantage = np.array([1.0, -1.0, 2.0, -1.0, -1.0])
    c = np.array([1.0, 0.5, 0.25, 1.0, 0.0])
    # group 7: net 1 - .5 = .5 over 1.5 living; group 3: .5 - 1 = -.5 over 1.25
    shifted = zero_mean(advantage, c, np.array([7, 7, 3, 3, 3]))
    np.testing.assert_allclose(shifted, [1 - 1 / 3, -1 - 1 / 3, 2.4, -0.6, -0.6])


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.floats(-2, 2), st.sampled_from([0.0, 1e-30, 0.3, 1.2])),
        min_size=1,
        max_size=12,
    )
)
def test_zero_mean_balances_every_group_that_can_be(rows):
    group, advantage, c = (np.array(x) for x in zip(*rows, strict=True))
    shifted = zero_mean(advantage, c, group)
    for name in np.unique(group):
        one = group == name
        if advantage[one].any() and c[one].any():
            assert abs((c * shifted)[one].sum()) < 1e-12
            # one shift for the whole group
            np.testing.assert_allclose(np.diff((shifted - advantage)[one]), 0, atol=1e-12)
        else:
            np.testing.assert_array_equal(shifted[one], advantage[one])


def test_on_policy_zero_mean_changes_nothing():
    advantage = group_advantages([1, 0, 0, 1, 1], scale="std")
    np.testing.assert_allclose(zero_mean(advantage, np.ones(5), np.zeros(5, np.int64)), advantage)
