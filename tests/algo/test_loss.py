"""The whole-loss example of the VESPO study: 3 ragged sequences, every number worked out independently."""

import numpy as np
import pytest
import torch

from megatron_vespo.algo.coefficients import coefficient
from megatron_vespo.algo.loss import kl_penalty, policy_loss, token_weights
from megatron_vespo.config import AlgorithmConfig
from tests.algo.ragged import Ragged, loss_and_gradient


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


EXAMPLE = Ragged(
    log_mu=[f64(-0.5, -1.0), f64(-0.2, -0.7, -1.5), f64(-0.1, -0.4, -0.9, -2.0)],
    log_pi=[f64(-0.4, -0.9), f64(-0.5, -0.8, -1.4), f64(-0.1, -0.6, -0.7, -1.6)],
    advantage_B=f64(1.0, -0.5, -0.5),
)
GRADIENT = [-0.0853126230025] * 2 + [0.0379301791826] * 3 + [0.0689743106466] * 4


def share(order: list[int], weight_B: np.ndarray, padding: int = 0) -> tuple[float, torch.Tensor]:
    """Loss and gradient of one microbatch of these sequences, with weights of the whole and so many tokens of weight 0."""
    batch = EXAMPLE[order]
    logp = torch.cat([*batch.log_pi, torch.full((padding,), -7.0, dtype=torch.float64)]).requires_grad_()
    c, advantage, weight = (
        torch.cat([x, torch.full((padding,), junk, dtype=torch.float64)])
        for x, junk in (
            (coefficient(AlgorithmConfig(), batch.ratios(), batch.advantage_B), 0.7),
            (batch.advantage_B[batch.seq_S], 1.0),
            (torch.from_numpy(weight_B[order])[batch.seq_S], 0.0),
        )
    )
    loss = policy_loss(logp, c, advantage, weight)
    loss.backward()
    assert logp.grad is not None
    return loss.item(), logp.grad


def test_known_loss_and_gradient():
    loss, gradient = loss_and_gradient(AlgorithmConfig(), EXAMPLE)
    c = coefficient(AlgorithmConfig(), EXAMPLE.ratios(), EXAMPLE.advantage_B)
    assert c[[0, 2, 5]].tolist() == pytest.approx([0.767813607022, 0.682743225286, 1.241537591639], rel=1e-11)
    assert loss.item() == pytest.approx(-0.1984280058295, rel=1e-11)
    assert gradient.tolist() == pytest.approx(GRADIENT, rel=1e-10)


def test_sequence_mean_divides_by_sequences():
    loss, _ = loss_and_gradient(AlgorithmConfig(), EXAMPLE, "seq_mean_token_sum")
    assert loss.item() == pytest.approx(-0.5952840174886, rel=1e-11)


@pytest.mark.parametrize("packs", [[[0, 1, 2]], [[2], [0], [1]], [[2, 0], [1]]], ids=str)
@pytest.mark.parametrize("padding", [0, 3])
def test_packs_in_any_order_and_padding_add_up_to_the_whole(packs, padding):
    weight = token_weights(EXAMPLE.num_tokens, "token_mean")
    total, gradient = 0.0, {}
    for order in packs:
        loss, parts = share(order, weight, padding)
        total += loss
        sizes = [EXAMPLE.num_tokens[i] for i in order]
        gradient |= dict(zip(order, parts[: sum(sizes)].split(sizes), strict=True))
        assert (parts[sum(sizes) :] == 0).all()
    assert total == pytest.approx(-0.1984280058295, rel=1e-11)
    assert torch.cat([gradient[i] for i in range(3)]).tolist() == pytest.approx(GRADIENT, rel=1e-10)


def test_an_empty_microbatch_adds_nothing_and_can_be_differentiated():
    logp = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    loss = policy_loss(logp, f64(), f64(), f64())
    loss.backward()
    assert loss.item() == 0


def test_only_log_pi_is_differentiated():
    logp, c = f64(-1.0).requires_grad_(), f64(0.5).requires_grad_()
    policy_loss(logp, c, f64(2.0), f64(1.0)).backward()
    assert logp.grad is not None and logp.grad.tolist() == [-1.0] and c.grad is None


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", [1 / 6, 0, 1 / 6]),
        ("seq_mean_token_sum", [1 / 3, 0, 1 / 3]),
        ("seq_mean_token_mean", [1 / 6, 0, 1 / 12]),
    ],
)
def test_weights_by_hand_and_a_sequence_without_tokens(aggregation, expected):
    # lengths 2, 0, 4: the empty one has no token to weigh, but counts among the 3 sequences
    np.testing.assert_allclose(token_weights([2, 0, 4], aggregation), expected)


def test_a_batch_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no token to train on"):
        token_weights([0, 0], "token_mean")


def test_the_penalty_is_the_divergence_in_expectation_and_its_slope_that_of_the_other_direction():
    # pi = (3/4, 1/4), reference = (1/2, 1/2): E_pi[k3] = KL = .75 ln 1.5 + .25 ln .5 = 0.130812; slope 1 - reference / pi
    pi = f64(0.75, 0.25)
    logp, reference = pi.log().requires_grad_(), f64(0.5, 0.5).log().requires_grad_()
    k3 = kl_penalty(logp, reference)
    assert (pi * k3).sum().item() == pytest.approx(0.130812, abs=1e-6) and (k3 > 0).all()
    k3.sum().backward()
    assert (
        logp.grad is not None and logp.grad.tolist() == pytest.approx([1 / 3, -1]) and reference.grad is None
    )
    logits = f64(0.3, -0.4).requires_grad_()
    log_pi = logits.log_softmax(0)
    (slope,) = torch.autograd.grad(
        (log_pi.exp().detach() * kl_penalty(log_pi, reference)).sum(), logits, retain_graph=True
    )
    (expected,) = torch.autograd.grad(
        (reference.exp().detach() * (reference.detach() - log_pi)).sum(), logits
    )
    torch.testing.assert_close(slope, expected)
