import numpy as np
import pytest

from megatron_vespo.algo.advantages import group_advantages


def test_group_mean_is_subtracted():
    # mean of (1, 0, 0, 1) is 1/2
    np.testing.assert_array_equal(group_advantages([1, 0, 0, 1], scale="none"), [0.5, -0.5, -0.5, 0.5])


def test_std_scale_divides_by_the_unbiased_deviation():
    # deviations +-1/2, variance 4 * 1/4 / 3 = 1/3, so A = +-0.5 * sqrt(3)
    np.testing.assert_allclose(
        group_advantages([1, 0, 0, 1], scale="std"), np.array([1, -1, -1, 1]) * 0.8660254, rtol=1e-5
    )


@pytest.mark.parametrize("scale", ["none", "std"])
def test_equal_rewards_give_exact_zeros(scale):
    # 0.1 is not exact in binary: its mean need not equal it, so zeros must not be left to rounding
    assert (group_advantages([0.1] * 7, scale=scale) == 0).all()


@pytest.mark.parametrize("rewards", [[1.0], [1.0, float("nan")], [float("inf"), 0.0]])
def test_a_group_without_a_finite_baseline_is_refused(rewards):
    with pytest.raises(ValueError, match=r"group needs at least 2|must be finite"):
        group_advantages(rewards, scale="std")
