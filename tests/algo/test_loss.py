"""The whole-loss example of the VESPO study: 3 ragged sequences, every number worked out independently."""

import numpy as np
import pytest
import torch

from megatron_vespo.algo.coefficients import Ratios, coefficient
from megatron_vespo.algo.loss import policy_loss, token_weights
from megatron_vespo.config import AlgorithmConfig

LOG_MU = [[-0.5, -1.0], [-0.2, -0.7, -1.5], [-0.1, -0.4, -0.9, -2.0]]
LOG_PI = [[-0.4, -0.9], [-0.5, -0.8, -1.4], [-0.1, -0.6, -0.7, -1.6]]
ADVANTAGE = [1.0, -0.5, -0.5]


def loss_and_gradient(order, weight_N, extra_zero_weight_tokens=0):
    """Loss and d loss / d log pi of the sequences in `order`, packed into one microbatch."""
    logp = torch.tensor(
        [x for i in order for x in LOG_PI[i]] + [-7.0] * extra_zero_weight_tokens,
        dtype=torch.float64,
        requires_grad=True,
    )
    mu = torch.tensor(
        [x for i in order for x in LOG_MU[i]] + [-7.0] * extra_zero_weight_tokens, dtype=torch.float64
    )
    lengths = torch.tensor([len(LOG_PI[i]) for i in order])
    lengths[-1] += extra_zero_weight_tokens
    seq = torch.repeat_interleave(torch.arange(len(order)), lengths)
    log_ratio = (logp - mu).detach()
    log_w = torch.zeros(len(order), dtype=torch.float64).index_add(0, seq, log_ratio)
    advantage = torch.tensor([ADVANTAGE[i] for i in order], dtype=torch.float64)
    c = coefficient(
        AlgorithmConfig(),
        Ratios(log_ratio_S=log_ratio, log_w_N=log_w, num_tokens_N=lengths.double(), seq_S=seq),
        advantage,
    )
    weight = torch.tensor([weight_N[i] for i in order], dtype=torch.float64)[seq]
    if extra_zero_weight_tokens:
        weight[-extra_zero_weight_tokens:] = 0
    loss = policy_loss(logp, c, advantage[seq], weight)
    loss.backward()
    assert logp.grad is not None
    return loss.item(), logp.grad, c


def test_known_loss_and_gradient():
    weight = token_weights([2, 3, 4], "token_mean")
    loss, gradient, c = loss_and_gradient([0, 1, 2], weight)
    assert c[[0, 2, 5]].tolist() == pytest.approx([0.767813607022, 0.682743225286, 1.241537591639], rel=1e-11)
    assert loss == pytest.approx(-0.1984280058295, rel=1e-11)
    expected = [-0.0853126230025] * 2 + [0.0379301791826] * 3 + [0.0689743106466] * 4
    assert gradient.tolist() == pytest.approx(expected, rel=1e-10)


def test_sequence_mean_divides_by_sequences():
    loss, _, _ = loss_and_gradient([0, 1, 2], token_weights([2, 3, 4], "seq_mean_token_sum"))
    assert loss == pytest.approx(-0.5952840174886, rel=1e-11)


def test_microbatches_in_any_order_add_up_to_the_whole():
    weight = token_weights([2, 3, 4], "token_mean")
    whole, gradient, _ = loss_and_gradient([0, 1, 2], weight)
    parts = [loss_and_gradient([i], weight) for i in (2, 0, 1)]
    assert sum(part[0] for part in parts) == pytest.approx(whole, rel=1e-12)
    torch.testing.assert_close(torch.cat([parts[1][1], parts[2][1], parts[0][1]]), gradient)


def test_tokens_of_weight_zero_change_nothing():
    weight = token_weights([2, 3, 4], "token_mean")
    loss, _, _ = loss_and_gradient([0, 1, 2], weight)
    padded, gradient, _ = loss_and_gradient([0, 1, 2], weight, extra_zero_weight_tokens=3)
    assert padded == loss and (gradient[-3:] == 0).all()


def test_a_sequence_without_tokens_has_weight_zero_and_a_batch_without_tokens_is_refused():
    np.testing.assert_array_equal(token_weights([2, 0, 2], "token_mean"), [0.25, 0, 0.25])
    with pytest.raises(ValueError, match="no token to train on"):
        token_weights([0, 0], "token_mean")
