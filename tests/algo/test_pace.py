import numpy as np
import pytest

from megatron_vespo.algo.pace import is_spent, living_weight, rate_factor
from megatron_vespo.config import AlgorithmConfig

GUARDED = AlgorithmConfig(min_living_weight=0.3)


def test_the_rate_follows_the_square_root_of_the_effective_sample_size_of_w():
    # W = 1, 1, 1, 3: 36 / (4 * 12) = 3/4
    log_w = np.log([1.0, 1, 1, 3])
    assert rate_factor(AlgorithmConfig(ess_learning_rate=True), log_w) == pytest.approx(np.sqrt(0.75))
    assert rate_factor(AlgorithmConfig(), log_w) == 1.0


@pytest.mark.parametrize("name", ["vespo", "reinforce", "gspo"])
def test_the_rate_is_whole_on_policy_and_never_zero(name):
    algorithm = AlgorithmConfig(name=name, ess_learning_rate=True)
    assert rate_factor(algorithm, np.zeros(5)) == 1.0
    assert rate_factor(algorithm, np.array([1e4, -1e4, 0, 0])) == 0.5  # one of four


def test_an_update_without_signal_has_its_whole_rate():
    assert rate_factor(AlgorithmConfig(ess_learning_rate=True), np.zeros(0)) == 1.0


def test_living_weight_is_the_smaller_of_mean_and_effective_share():
    assert living_weight(np.array([0.5, 0.5, 0.5])) == 0.5  # all alike: the mean
    assert living_weight(np.array([1.2, 0.0, 0.0])) == pytest.approx(
        1 / 3
    )  # one of three: its share, not 0.4
    assert living_weight(np.zeros(3)) == 0.0
    # (1 + 2)^2 / (2 * 5) = 0.9 whatever the size of the weights
    assert living_weight(1e200 * np.array([1.0, 2.0])) == pytest.approx(0.9)
    assert living_weight(1e-200 * np.array([1.0, 2.0])) == pytest.approx(1.5e-200)


@pytest.mark.parametrize(
    ("coefficient", "spent"),
    [([0.31, 0.31], False), ([0.29, 0.29], True), ([1.0, 0, 0, 0], True), ([0.0, 0.0], True), ([], False)],
)
def test_a_batch_is_spent_below_the_bound(coefficient, spent):
    assert is_spent(GUARDED, np.array(coefficient)) is spent
    assert not is_spent(AlgorithmConfig(), np.array(coefficient))
