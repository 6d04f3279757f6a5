"""phi against known answers computed independently in extended precision."""

import pytest
import torch

from megatron_vespo.algo.coefficients import COEFFICIENTS, Ratios, coefficient
from megatron_vespo.config import AlgorithmConfig

VESPO = AlgorithmConfig(name="vespo")


def phi(log_w: float, advantage: float) -> float:
    """phi of one sequence of one token, in float64."""
    one = torch.zeros(1, dtype=torch.int64)
    log_w_N = torch.tensor([log_w], dtype=torch.float64)
    return coefficient(
        VESPO,
        Ratios(log_ratio_S=log_w_N, log_w_N=log_w_N, num_tokens_N=torch.ones(1), seq_S=one),
        torch.tensor([advantage]),
    ).item()


@pytest.mark.parametrize(
    ("log_w", "positive", "negative"),
    [
        (-20, 8.5330475730e-17, 6.4702348990e-26),
        (-10, 4.1393738985e-08, 6.9137723089e-13),
        (-5, 8.9363437675e-04, 2.2300737663e-06),
        (-2, 2.4512037815e-01, 1.3972410581e-02),
        (-1, 9.0155130837e-01, 1.7626638407e-01),
        (-0.1, 1.0892482135, 8.9612547561e-01),
        (0, 1.0, 1.0),
        (0.1, 8.9090920931e-01, 1.0938003193),
        (0.5, 3.8822748404e-01, 1.2245304429),
        (1, 4.2644989758e-02, 6.4625335808e-01),
        (1.5, 5.8431682656e-04, 8.5146826621e-02),
        (2, 2.5881086401e-07, 1.1384219865e-03),
        (3, 5.4895504631e-23, 2.1436979731e-13),
    ],
)
def test_known_answers(log_w, positive, negative):
    assert phi(log_w, advantage=+1) == pytest.approx(positive, rel=1e-9)
    assert phi(log_w, advantage=-1) == pytest.approx(negative, rel=1e-9)


def test_phi_of_one_is_exactly_one_and_zero_advantage_counts_as_positive():
    assert phi(0.0, +1) == phi(0.0, -1) == 1.0
    assert phi(0.5, 0.0) == phi(0.5, +1) != phi(0.5, -1)


@pytest.mark.parametrize("log_w", [-1e4, -100, 100, 1e4])
def test_far_off_policy_is_zero_without_nan(log_w):
    # the slowest decay is W^2 at W = exp(-100): e^3 * e^-200
    assert 0 <= phi(log_w, -1) <= phi(log_w, +1) < 1e-85


def test_the_whole_sequence_has_one_coefficient_and_splitting_it_changes_it():
    log_ratio = torch.tensor([0.3, -0.1, 0.4], dtype=torch.float64)
    whole = Ratios(
        log_ratio_S=log_ratio,
        log_w_N=log_ratio.sum()[None],
        num_tokens_N=torch.tensor([3.0]),
        seq_S=torch.tensor([0, 0, 0]),
    )
    c = coefficient(VESPO, whole, torch.tensor([1.0]))
    assert (c == c[0]).all()
    split = Ratios(
        log_ratio_S=log_ratio,
        log_w_N=torch.stack([log_ratio[:1].sum(), log_ratio[1:].sum()]),
        num_tokens_N=torch.tensor([1.0, 2.0]),
        seq_S=torch.tensor([0, 1, 1]),
    )
    assert not torch.allclose(coefficient(VESPO, split, torch.tensor([1.0, 1.0])), c)


def test_on_policy_every_algorithm_is_reinforce():
    zero = torch.zeros(4)
    ratios = Ratios(
        log_ratio_S=zero,
        log_w_N=torch.zeros(2, dtype=torch.float64),
        num_tokens_N=torch.full((2,), 2.0),
        seq_S=torch.tensor([0, 0, 1, 1]),
    )
    for name in COEFFICIENTS:
        c = coefficient(AlgorithmConfig(name=name), ratios, torch.tensor([1.0, -1.0]))
        assert c.tolist() == [1, 1, 1, 1], name


def test_no_gradient_flows_through_a_coefficient():
    logp = torch.tensor([0.2, 0.1], requires_grad=True)
    ratios = Ratios(
        log_ratio_S=logp,
        log_w_N=logp.double().sum()[None],
        num_tokens_N=torch.tensor([2.0]),
        seq_S=torch.tensor([0, 0]),
    )
    assert not coefficient(VESPO, ratios, torch.tensor([1.0])).requires_grad
